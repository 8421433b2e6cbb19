"""Memory for plaintext: out of core dumps, kept from swap within the limit, wiped at its end."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import resource
from typing import TYPE_CHECKING, Final, Self

from keymgmt._crypto.dek import wipe
from keymgmt._system.libc import libc
from keymgmt._system.swap import unencrypted_swap
from keymgmt.errors import KeymgmtError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = ["PrivateMemory", "guard", "private_bytes", "unguard"]

log = logging.getLogger("keymgmt")

_MADV_DONTDUMP: Final = 16  # <linux/mman.h>; the module mmap has it from 3.13 on
_MADV_DODUMP: Final = 17
_MLOCK_ONFAULT: Final = 1


def guard(address: int, size: int) -> bool:
    """Keep memory out of core dumps and, within the limit of the process, from swap.

    The system does this by whole pages, so other bytes in the same pages are locked and left out
    too.

    Returns:
        Whether the memory is kept from swap (mlock2). If it is not, and there is swap, the log
        says so.
    """
    if not size:
        return False
    start, length = _pages(address, size)
    libc.madvise(start, length, _MADV_DONTDUMP)
    # MLOCK_ONFAULT locks each page when it is first written, in the thread that fills it. Plain
    # mlock(2) would make all pages ready here, in one thread.
    if libc.mlock2(start, length, _MLOCK_ONFAULT) == 0:
        return True
    _say_unlocked(ctypes.get_errno())
    return False


def unguard(address: int, size: int) -> None:
    """Undo ``guard``, for memory that is used for something else next."""
    start, length = _pages(address, size)
    libc.madvise(start, length, _MADV_DODUMP)
    libc.munlock(start, length)


def _pages(address: int, size: int) -> tuple[int, int]:
    start, end = address & -mmap.PAGESIZE, address + size
    return start, end - start + -end % mmap.PAGESIZE


@functools.cache
def _say_unlocked(number: int) -> None:
    if swap := unencrypted_swap():
        log.warning(
            "model memory may be swapped out to %s: it is not locked (%s, limit %d KiB); "
            "raise it (ulimit -l, LimitMEMLOCK=) or have no swap, or an encrypted one",
            ", ".join(swap),
            os.strerror(number),
            resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] >> 10,
        )


class PrivateMemory(mmap.mmap):
    """Fresh bytes that wipe themselves when the last view of them is gone.

    A view is any object over these bytes: a memoryview, a numpy array, a tensor. Each holds this
    object alive, so nothing is wiped that somebody can still read. The mmap is never closed.

    Attributes:
        locked: whether the memory is kept from swap.
    """

    locked: bool

    def __new__(cls, size: int) -> Self:
        """Take memory; nothing is touched yet.

        Args:
            size: bytes, 1 at least.

        Raises:
            KeymgmtError: the system refuses that much.
        """
        try:
            memory = super().__new__(cls, -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise KeymgmtError(
                f"the system refuses {size:,} bytes of memory: {error.strerror}",
                hint="look at ulimit -v and the limits of the container",
            ) from None
        memory.locked = guard(ctypes.addressof(ctypes.c_char.from_buffer(memory)), size)
        return memory

    def __del__(self) -> None:
        if not self.closed:  # closed means that no memory was taken
            wipe(self)


@contextlib.contextmanager
def private_bytes(size: int) -> Iterator[tuple[bytes, memoryview]]:
    """A new ``bytes`` object, a writable view of it to fill it through, and a wipe at the end.

    For calls that take nothing but ``bytes``. The object is ours alone until it is handed on
    (PyBytes_FromStringAndSize(NULL, size) permits filling it then), and the caller keeps no
    reference beyond the block.
    """
    make = ctypes.pythonapi.PyBytes_FromStringAndSize
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t]
    if not size:  # Python has one empty object for all; nothing to fill, nothing to wipe
        yield b"", memoryview(bytearray())
        return
    locate = ctypes.pythonapi.PyBytes_AsString
    locate.restype, locate.argtypes = ctypes.c_void_p, [ctypes.py_object]
    data: bytes = make(None, size)
    array = (ctypes.c_char * size).from_address(locate(data))
    try:
        yield data, memoryview(array).cast("B")
    finally:
        ctypes.memset(array, 0, size)


@contextlib.contextmanager
def joined_bytes(parts: Collection[bytes | memoryview]) -> Iterator[bytes]:
    """The parts as one ``bytes``, as ``private_bytes``."""
    with private_bytes(sum(map(len, parts))) as (data, room):
        position = 0
        for part in parts:
            room[position : position + len(part)] = part
            position += len(part)
        yield data
