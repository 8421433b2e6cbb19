"""The files of a plain folder as they were when it was listed, and the doubtful ones of them."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from keymgmt._system.files import from_system
from keymgmt._system.trusted_file import read_file
from keymgmt.errors import ConfigError
from keymgmt.sealed.folder import KEYS, MANIFEST, PAYLOAD
from keymgmt.sealed.manifest import MAX_FILES

__all__ = ["IGNORE", "PlainFile", "doubtful", "list_files"]

IGNORE: Final = ".keymgmtignore"
# Names of files that are rarely meant to be shipped: secrets, and leftovers of tools.
_SECRETS: Final = (
    *(".env", ".env.*", ".ssh", ".gnupg", ".aws", ".netrc", ".npmrc", ".pypirc"),
    *(".git-credentials", "id_rsa*", "id_ecdsa*", "id_ed25519*", "*.key", "*.p12", "*.pfx"),
    *("*.jwks", "*.kdbx", "keymgmt.toml", "passphrase.json"),
)
_LEFTOVERS: Final = (
    *(".git", ".hg", ".svn", ".venv", "__pycache__", ".ipynb_checkpoints", ".DS_Store"),
    *("*.sealed", "*.tmp", "*.swp", "*~", "core.[0-9]*", ".keymgmt.lock"),
)
_MAX_IGNORE: Final = 1 << 20


@dataclass(frozen=True)
class PlainFile:
    """A file to seal, as it was when it was listed."""

    path: Path
    size: int
    identity: tuple[int, int]

    @classmethod
    def of(cls, path: Path, info: os.stat_result) -> PlainFile:
        """The file at ``path`` with the status ``info``."""
        return cls(path, info.st_size, (info.st_dev, info.st_ino))

    @contextlib.contextmanager
    def open(self) -> Iterator[int]:
        """A descriptor of the same file that was listed.

        Raises:
            ConfigError: it cannot be read, or is another file by now: whoever may write in the
                folder could have put a link there, so that another file would be sealed.
        """
        try:
            # O_NONBLOCK: a fifo that replaced it does not block.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from error
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode) or (info.st_dev, info.st_ino) != self.identity:
                raise ConfigError(
                    f"{self.path} was exchanged while the model was being sealed",
                    hint="seal it when nobody writes there any more",
                )
            yield descriptor
        finally:
            os.close(descriptor)


class Listing(NamedTuple):
    """The content of a folder; paths are relative to it.

    Attributes:
        files: the files to seal.
        left_out: paths that the ignore file leaves out.
        empty: folders without a file.
    """

    files: dict[str, PlainFile]
    left_out: list[str]
    empty: list[str]


def list_files(folder: Path) -> Listing:
    """List a folder; ConfigError where it cannot be read or has entries of another kind."""
    ignored = _ignored(folder)
    files, left_out, empty = listing = Listing({}, [], [])
    # By descriptors: a folder that is replaced by a link meanwhile is not entered.
    listed, visited = {folder}, set()
    for parent, folders, names, descriptor in os.fwalk(folder, onerror=_refuse):
        visited.add(Path(parent))
        below = Path(parent).relative_to(folder)
        if below == Path() and {MANIFEST, KEYS} <= set(names) and PAYLOAD in folders:
            raise ConfigError(
                f"{folder} is sealed already",
                hint="rewrap changes who opens it, reseal its key; or name the plain files",
            )
        if not folders and not names and below != Path():
            empty.append(from_system(below.as_posix()))
        for group in (folders, names):
            for name in list(group):
                if _is_ignored(from_system((below / name).as_posix()), ignored):
                    group.remove(name)
                    left_out.append(from_system((below / name).as_posix()))
        listed.update(Path(parent) / name for name in folders)
        for name in [*folders, *names]:
            path = Path(parent) / name
            try:
                info = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}") from error
            mode = info.st_mode
            if stat.S_ISLNK(mode):
                raise ConfigError(
                    f"{path} is a symbolic link, which a sealed model does not have",
                    hint="copy the folder with its links followed: cp -rL",
                )
            if not _is_text(from_system(name)):
                raise ConfigError(f"the file name {name!r} is not UTF-8", hint="rename it")
            if stat.S_ISREG(mode):
                files[from_system(path.relative_to(folder).as_posix())] = PlainFile.of(path, info)
            elif not stat.S_ISDIR(mode):
                raise ConfigError(f"{path} is neither a regular file nor a folder")
    if exchanged := listed - visited:
        raise ConfigError(
            f"{min(exchanged)} was exchanged while the folder was being listed",
            hint="seal it when nobody writes there any more",
        )
    if not files:
        raise ConfigError(f"the folder {folder} has no files to seal")
    if len(files) > MAX_FILES:
        raise ConfigError(
            f"the folder {folder} has {len(files)} files, and a sealed model has at most "
            f"{MAX_FILES}",
            hint="pack what belongs together into one file, or seal several models",
        )
    return listing


def _is_text(name: str) -> bool:
    # Python shows bytes that are no UTF-8 as lone surrogates (PEP 383).
    return not any("\udc80" <= char <= "\udcff" for char in name)


def _refuse(error: OSError) -> None:
    raise ConfigError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def doubtful(paths: Collection[str]) -> tuple[str, ...]:
    """The outermost parts of some paths that look like secrets or leftovers."""
    outermost: dict[str, None] = {}
    for path in sorted(paths):
        parts = path.split("/")
        for depth, name in enumerate(parts, 1):
            if any(fnmatch.fnmatchcase(name, each) for each in (*_SECRETS, *_LEFTOVERS)):
                outermost["/".join(parts[:depth])] = None
                break
    return tuple(outermost)


def _ignored(folder: Path) -> list[str]:
    """The patterns of the folder's ignore file."""
    file = folder / IGNORE
    if not os.path.lexists(file):
        return []
    text = read_file(file, label="ignore file", limit=_MAX_IGNORE, access="any")
    try:
        lines = [line.strip() for line in text.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"the ignore file {file} is not UTF-8") from error
    return [IGNORE, *(line.rstrip("/") for line in lines if line and not line.startswith("#"))]


def _is_ignored(path: str, patterns: list[str]) -> bool:
    name = path.rpartition("/")[2]
    return any(
        fnmatch.fnmatchcase(path if "/" in each else name, each.removeprefix("/"))
        for each in patterns
    )
