"""Files in memory that are kept from swap, for as long as somebody has them mapped.

A page is kept from swap while any mapping of it is locked (mlock(2)). Our own mapping is locked
before the plaintext is written, and ends with the folder. By then the mappings of those who read
the file are locked too. A lock ends with its mapping, so no lock is left behind, and no list of
locks has to be kept.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt._system.libc import libc

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = ["LockedMapping", "lock_mappings"]

_FAILED: Final = ctypes.c_void_p(-1).value


class LockedMapping:
    """A locked mapping of a whole memfd; no mapping where the limit (ulimit -l) forbids it.

    Attributes:
        locked: whether the pages are kept from swap.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.locked = False
        self._size = size
        # The mapping is of a read-only descriptor: while a mapping exists that could be made
        # writable, the kernel refuses F_SEAL_WRITE (memfd_create(2)).
        reader = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, reader, 0)
        finally:
            os.close(reader)
        self._address: int | None = None if address == _FAILED else address
        if self._address is not None:
            self.locked = libc.mlock(self._address, size) == 0
            if not self.locked:
                self.close()

    def close(self) -> None:
        """End the mapping, and its lock; may be called again."""
        if self._address is not None:
            libc.munmap(self._address, self._size)
            self._address = None


def lock_mappings(files: Container[tuple[int, int]]) -> None:
    """Lock this process's mappings of ``files`` (device, inode), where the limit permits."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, device, inode, *_ = line.split()
        major, minor = (int(part, 16) for part in device.split(":"))
        if (os.makedev(major, minor), int(inode)) in files:
            start, end = (int(part, 16) for part in span.split("-"))
            libc.mlock(start, end - start)
