"""The ciphertext of one file: the interface through which the payload engine reads it.

The implementation for a file on a disk is here too.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final, Protocol

from keymgmt._system.pages import unwritten
from keymgmt.errors import IntegrityError

__all__ = ["Ciphertext", "FileCiphertext", "Parts", "read_exactly", "write_exactly"]

_AHEAD: Final = 8  # segments that are read from the disk at once


class Parts(Protocol):
    """A reader of a ciphertext, for one thread."""

    def read(self, offset: int, length: int, until: int = 0) -> memoryview:
        """Read bytes into private memory; they are valid until the next call.

        Args:
            offset: position of the first byte.
            length: number of bytes.
            until: the position up to which this thread will read on; 0 if that is unknown.

        Raises:
            IntegrityError: the file ends before that, or was replaced meanwhile.
            OSError, KeymgmtError: it cannot be read.
        """


class Ciphertext(Protocol):
    """A ciphertext that many threads read at once.

    Attributes:
        threads: the number of threads that should; None for one for each processor.
    """

    threads: int | None

    def length(self) -> int:
        """The length of the file in bytes, now."""

    def parts(self) -> Parts:
        """Something to read it with, for one thread."""

    def close(self) -> None:
        """Release it; may be called again."""


class FileCiphertext:
    """A ciphertext in a file that is open for reading."""

    threads: int | None = None

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def length(self) -> int:
        """Bytes of the file; ValueError if it is closed."""
        if self._fd < 0:
            raise ValueError("this ciphertext is closed")
        return os.fstat(self._fd).st_size

    def parts(self) -> Parts:
        """Something to read it with, for one thread."""
        return _FileParts(self._fd)

    def close(self) -> None:
        """Close the descriptor; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _FileParts:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = memoryview(b"")

    def read(self, offset: int, length: int, until: int = 0) -> memoryview:
        if len(self._buffer) < length:
            self._buffer = memoryview(unwritten(length))
        part = self._buffer[:length]
        if until and self._in_turn(part, offset):
            return part
        if not read_exactly(self._fd, part, offset):
            raise IntegrityError("the payload file became shorter while it was read")
        return part

    def _in_turn(self, part: memoryview, offset: int) -> bool:
        """Read a part that others will follow; False where it must be read again.

        A disk is faster with many segments in one request (docs/decisions/loader-speed.md). So if
        a part is not in the page cache, the next parts are read with it, all into the same memory:
        their purpose is only to be in the page cache afterwards.
        """
        # An error here means that the system cannot tell, or it appears again in the real read.
        with contextlib.suppress(OSError):
            try:
                if os.preadv(self._fd, [part], offset, os.RWF_NOWAIT) == len(part):
                    return True
            except BlockingIOError:
                pass
            os.preadv(self._fd, [part] * _AHEAD, offset)
        return False


def read_exactly(fd: int, view: memoryview, offset: int) -> bool:
    """Fill ``view`` from a file; False if the file ends before."""
    while len(view):
        count = os.preadv(fd, [view], offset)
        if not count:
            return False
        view, offset = view[count:], offset + count
    return True


def write_exactly(fd: int, view: memoryview, offset: int) -> None:
    """Write all of ``view`` to a file."""
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
