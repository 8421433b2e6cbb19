"""The ciphertext of one file, wherever it lies: what the payload engine reads it through.

A file on a disk is here.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final, Protocol

from keymgmt._system.pages import unwritten
from keymgmt.errors import IntegrityError

__all__ = ["Ciphertext", "FileCiphertext", "Parts", "read_exactly"]

_AHEAD: Final = 8  # segments that are asked of the disk at once


class Parts(Protocol):
    """What one thread reads a ciphertext with."""

    def read(self, offset: int, length: int, until: int = 0) -> memoryview:
        """Some bytes in private memory, which are good until the next call.

        Args:
            offset: where they begin.
            length: how many.
            until: up to where this thread will read on; 0 where nobody knows.

        Raises:
            IntegrityError: it ends before that, or is another one by now.
            OSError, KeymgmtError: it cannot be read.
        """


class Ciphertext(Protocol):
    """A ciphertext that many threads read at once.

    Attributes:
        threads: how many should; None for one for each processor.
    """

    threads: int | None

    def length(self) -> int:
        """Bytes of all of it, as it is now."""

    def parts(self) -> Parts:
        """Something to read it with, for one thread."""

    def close(self) -> None:
        """Let go of it; may be called again."""


class FileCiphertext:
    """A ciphertext in a file that is open for reading."""

    threads: int | None = None

    def __init__(self, fd: int, *, owns_fd: bool = True) -> None:
        """``owns_fd``: the descriptor is closed with this."""
        self._fd, self._owns_fd = fd, owns_fd

    def length(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._fd).st_size

    def parts(self) -> Parts:
        """Something to read it with, for one thread."""
        return _FileParts(self._fd)

    def close(self) -> None:
        """Close the descriptor if it is ours."""
        if self._owns_fd:
            self._owns_fd = False
            os.close(self._fd)


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
        """Read a part after which others will be wanted; False where it must be read again.

        A disk gives more at once than in requests of one segment (docs/decisions/loader-speed.md).
        So where one is not in the page cache, those after it are read with it, over one another:
        what counts is that they are in the page cache then.
        """
        # An error here is that of a system that cannot tell, or comes again where it counts.
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
