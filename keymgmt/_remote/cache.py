"""Parts of remote files kept on this machine: ciphertext, verified again whenever it is used.

Each part is one file. Its name is the hash of the location, of the pin (ETag or digest) and of the
part's position, so a part of a file that was replaced is not used. Each file ends with a checksum:
a part that a crash cut, or that another process is still writing, counts as missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from keymgmt._remote.storage import Part
from keymgmt._system.fork import ForkSafe
from keymgmt._system.pages import unwritten
from keymgmt._system.trusted_file import check_trusted
from keymgmt.errors import ConfigError
from keymgmt.sealed.ciphertext import read_exactly

if TYPE_CHECKING:
    from pathlib import Path

    from keymgmt._remote.storage import Storage

__all__ = ["CachedStorage"]

log = logging.getLogger("keymgmt")
_CHECK: Final = 32
_SURE: Final = ('"', "sha256:")  # beginnings of the pins that tell every content from others


class CachedStorage(ForkSafe):
    """A storage whose parts are kept in a folder; the least recently used are removed first."""

    def __init__(self, storage: Storage, where: str, folder: Path, limit: int) -> None:
        """Keep parts of ``storage`` in ``folder``, ``limit`` bytes at most.

        Args:
            storage: where parts come from.
            where: the location of ``storage``, which tells its parts from those of others.
            folder: created (0700) if it is missing; its parent exists.
            limit: bytes. Each process that shares the folder may exceed it by a sixteenth.

        Raises:
            ConfigError: the folder cannot be created, or is not private to this user.
        """
        self._storage, self._where, self._folder, self._limit = storage, where, folder, limit
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the folder {folder}, the cache of [remote]: {error.strerror}"
            ) from error
        check_trusted(folder, label="cache", private=True)
        self._room = 0  # bytes that may be written before the folder is listed again
        super().__init__()

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def part(self, name: str, start: int, end: int, pin: str = "") -> Part | None:
        """A part of a file, as ``Storage.part``; it is kept if ``pin`` identifies the content."""
        if not pin.startswith(_SURE):
            return self._storage.part(name, start, end, pin)
        words = (self._where, name, pin, str(start), str(end))
        file = self._folder / blake3("\0".join(words).encode()).hexdigest()
        kept = _read(file)
        if kept is not None:
            content, total = kept
            return Part(content, total, pin)
        part = self._storage.part(name, start, end, pin)
        if part is not None and part.pin == pin:
            self._keep(file, part)
        return part

    def replace(self, name: str, content: bytes, pin: str) -> str:
        """As ``Storage.replace``."""
        return self._storage.replace(name, content, pin)

    def _keep(self, file: Path, part: Part) -> None:
        total = part.total.to_bytes(8, "big")
        check = blake3(part.content).update(total).digest()
        size = len(part.content) + len(total) + _CHECK
        try:
            with self._lock:
                if self._room < size:
                    self._room = _make_room(self._folder, self._limit, size)
                self._room -= size
            if size <= self._limit:
                with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:  # noqa: PTH123
                    out.writelines((part.content, total, check))
        except OSError as error:
            log.warning("the cache of [remote], %s, keeps nothing: %s", file.parent, error.strerror)


def _read(file: Path) -> tuple[memoryview, int] | None:
    """A part and the length of its remote file; None where it is missing or not whole."""
    with contextlib.suppress(OSError), file.open("rb") as kept:
        size = os.fstat(kept.fileno()).st_size - 8 - _CHECK
        if size < 0:
            return None
        all_of_it = memoryview(unwritten(size + 8 + _CHECK))
        whole = read_exactly(kept.fileno(), all_of_it, 0)
        if whole and blake3(all_of_it[: size + 8]).digest() == all_of_it[size + 8 :]:
            os.utime(kept.fileno())
            return all_of_it[:size], int.from_bytes(all_of_it[size : size + 8], "big")
    return None


def _make_room(folder: Path, limit: int, size: int) -> int:
    """Remove the least recently used parts; the bytes that may be written until the next call."""
    parts = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                info = entry.stat(follow_symlinks=False)
                parts.append((info.st_mtime_ns, info.st_size, entry.path))
    step = max(size, limit // 16)
    used = sum(length for _, length, _ in parts)
    for _, length, path in sorted(parts):
        if used + step <= limit:
            break
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108
        used -= length
    return step
