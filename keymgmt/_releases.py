"""The highest release of each model name that was verified on this machine, against rollback."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt._files import replace_file
from keymgmt.errors import ConfigError, FormatError
from keymgmt.sealed.canonical import Reader, dump, load

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["remember_release", "remembered_release"]

FORMAT: Final = "keymgmt-releases/1"
MAX_FILE: Final = 1 << 20


def remembered_release(path: Path, name: str) -> int | None:
    """The highest release of ``name`` that was remembered, or None.

    Raises:
        ConfigError: the file is unreadable or damaged; it is never taken for an empty one.
    """
    return _read(path).get(name)


def remember_release(path: Path, name: str, release: int) -> None:
    """Remember ``release`` of ``name`` if it is the highest; ConfigError if it cannot be kept."""
    try:
        with _locked(path):
            known = _read(path)
            if release > known.get(name, -1):
                content = dump({"format": FORMAT, "releases": known | {name: release}})
                replace_file(path, content, mode=0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot remember the release in {path}: {error.strerror}",
            hint="[policy] remember_releases names a file that this user can write",
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock is beside the file, which is replaced and so cannot carry it.
    lock = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, int]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        reader = load(content, path.name, MAX_FILE)
        reader.version(FORMAT, "another version of keymgmt wrote it")
        entries = Reader(reader.members("releases"), f"releases in {path.name}")
        reader.end()
        return {name: entries.integer(name) for name in entries.names()}
    except FormatError as error:
        raise ConfigError(
            f"{path} is damaged: {error}",
            hint="restore it; without it an old release could be put back unnoticed",
        ) from error
