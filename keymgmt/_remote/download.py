"""The download of one file of a registry, which goes on after the bytes of an earlier try."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

from keymgmt.sealed.ciphertext import write_exactly

if TYPE_CHECKING:
    from keymgmt._remote.artifact import Blob

__all__ = ["Download"]


class Download:
    """A file that is being downloaded; a context manager that closes it.

    Attributes:
        size: length of the whole file, in bytes.
        done: bytes that are there; at the start those of an earlier try.
    """

    def __init__(self, file: Path, blob: Blob, advance: Callable[[int], object]) -> None:
        """Open or make ``file``, of which no other process writes; OSError where that fails.

        ``advance`` is called with the bytes of each part, fewer than 0 where they are taken back,
        and before each part is written: what it raises ends the download.
        """
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        self._blob, self._advance = blob, advance
        self.size, self.done = blob.size, 0
        self._hash = hashlib.sha256()
        try:
            if os.fstat(self._fd).st_size > blob.size:
                os.ftruncate(self._fd, 0)
            while part := os.pread(self._fd, 1 << 20, self.done):
                self._take(part)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _take(self, part: bytes) -> None:
        self._hash.update(part)
        self.done += len(part)
        self._advance(len(part))

    @property
    def whole(self) -> bool:
        """Whether the whole file has arrived and has its digest."""
        return f"sha256:{self._hash.hexdigest()}" == self._blob.digest

    def write(self, part: bytes) -> None:
        """Add the next part."""
        self._advance(0)
        write_exactly(self._fd, memoryview(part), self.done)
        self._take(part)

    def restart(self) -> None:
        """Forget all parts: the file comes again from its beginning."""
        self._advance(-self.done)
        os.ftruncate(self._fd, 0)
        self.done, self._hash = 0, hashlib.sha256()
