"""The folder of a sealed model, read through one directory handle.

Only regular files are opened, and no symbolic link below the folder is followed. So every file that
is read is in the folder, even if other programs write to the disk meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from keymgmt._system.closing import Closing
from keymgmt._system.files import from_system, left_behind, replace_in, to_system
from keymgmt._system.locks import lock_file
from keymgmt._system.refused import translate
from keymgmt._system.steps import finish
from keymgmt.errors import ConfigError, FormatError, IntegrityError, SealedModelError
from keymgmt.sealed.ciphertext import FileCiphertext

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from keymgmt._system.steps import Wait
    from keymgmt.sealed.ciphertext import Ciphertext
    from keymgmt.sealed.manifest import Manifest

__all__ = [
    "KEYS",
    "LOCK",
    "MANIFEST",
    "MAX_ORIGIN",
    "ORIGIN",
    "PAYLOAD",
    "SIGNATURES",
    "ModelFolder",
    "SealedFolder",
    "file_stamp",
    "payload_name",
]

MANIFEST: Final = "manifest.json"
KEYS: Final = "keys.json"
SIGNATURES: Final = "signatures.json"
PAYLOAD: Final = "payload"
LOCK: Final = ".keymgmt.lock"
ORIGIN: Final = ".keymgmt.origin"
MAX_ORIGIN: Final = 4096
_NAMED_WRONGLY: Final = (errno.ENOENT, errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
# A link or a file where a folder should be; a socket; a longer name than this file system can have.
_OTHER_KINDS: Final = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENAMETOOLONG)
_WAIT: Final = 60.0
_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
# O_NONBLOCK: opening a fifo must not wait for a writer; it changes nothing for a regular file.
_FILE: Final = _FLAGS | os.O_NONBLOCK | os.O_NOCTTY
_DIRECTORY: Final = _FLAGS | os.O_DIRECTORY


def payload_name(path: str) -> str:
    """The path of a file's ciphertext, relative to the sealed model's folder."""
    return f"{PAYLOAD}/{path}.floe"


def file_stamp(info: os.stat_result) -> str:
    """A text that changes whenever a file is written, or another takes its place."""
    return f"{info.st_ino}-{info.st_size}-{info.st_mtime_ns}-{info.st_ctime_ns}"


class ModelFolder(Closing):
    """The interface of a sealed model's folder, which need not be on this machine.

    Attributes:
        path: the path or location, for messages.
        locks: whether it can be locked. Where it cannot, two processes that replace a file are kept
            apart by the refusal of the second.
    """

    path: str | Path
    locks: ClassVar[bool] = False

    @abstractmethod
    def read(self, name: str, limit: int, *, optional: bool = False) -> bytes:
        """Read a small file at the top of the folder, at most ``limit`` bytes.

        Raises:
            FormatError: missing (unless ``optional``, which gives ``b""``), too large, no file.
            SealedModelError: the system cannot read it.
        """

    @abstractmethod
    def replacing(self, name: str, content: bytes) -> Generator[Wait, None, None]:
        """Replace a small file in steps, unless another process replaced it, and read it back.

        Raises:
            IntegrityError: it was replaced meanwhile, and is left as it is; or it reads otherwise.
        """

    def replace(self, name: str, content: bytes) -> None:
        """``replacing``, here and now; raises the same."""
        finish(self.replacing(name, content))

    def check_written(self, name: str, content: bytes) -> None:
        """IntegrityError unless a small file reads back as it was written."""
        if self.read(name, len(content) + 1) != content:
            raise IntegrityError(
                f"{self.path}/{name} does not read back as it was written",
                hint="look at the disk; the other files of the model were not touched",
            )

    @abstractmethod
    def stamp(self, name: str) -> str:
        """A text that tells the content of a small file that was read from any other it may get.

        It is an ETag, or as ``file_stamp`` gives it; empty where there is none.
        """

    @abstractmethod
    def open_payload(self, path: str) -> Ciphertext:
        """Open the ciphertext of a model's file; the caller closes it.

        Raises:
            IntegrityError: it is missing.
            FormatError: it, or a folder above it, is no regular file or folder.
        """

    # The methods below do nothing for a folder that is not on this machine.

    def expect(self, *names: str) -> None:
        """Small files that are read soon."""

    def close(self) -> None:
        """Close the handle; may be called again."""

    def lock(self, *, wait: bool = True) -> bool:  # noqa: ARG002
        """Lock this folder when nobody else changes it; without ``wait``, False if one does."""
        return True

    def check_place(self) -> None:
        """IntegrityError where another folder, or none, is at the path by now."""

    def clean(self, name: str) -> None:
        """Remove what killed replacements of a small file left; the lock is held."""

    def in_use(self, name: str) -> bool:  # noqa: ARG002
        """Whether somebody replaces a small file, or was killed while doing so."""
        return False

    def check_listing(self, manifest: Manifest) -> None:
        """FormatError where payload/ holds anything that the manifest does not list."""

    def others(self) -> list[str]:
        """Names at the top of the folder that are none of a sealed model's, sorted."""
        return []


class SealedFolder(ModelFolder):
    """An open sealed model's folder; a context manager that closes its handle."""

    locks = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the folder.

        Raises:
            ConfigError: it does not exist, or this user may not read it.
            FormatError: it is not a folder.
            SealedModelError: the system cannot read it.
        """
        self.path: Path = Path(path)
        self._infos: dict[str, os.stat_result] = {}
        self._held = contextlib.ExitStack()
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        except NotADirectoryError as error:
            raise FormatError(
                f"{self.path} is not a folder",
                hint="a sealed model is a folder with a manifest.json in it",
            ) from error
        except OSError as error:
            kind = ConfigError if error.errno in _NAMED_WRONGLY else SealedModelError
            raise kind(f"cannot open {self.path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"cannot open {self.path}: its name has a NUL") from error

    def close(self) -> None:
        """Close the handle; may be called again."""
        if self._fd >= 0:
            self._held.close()
            os.close(self._fd)
            self._fd = -1

    def read(self, name: str, limit: int, *, optional: bool = False) -> bytes:
        """See ModelFolder."""
        try:
            descriptor = self._open(name)
        except FileNotFoundError as error:
            if optional:
                return b""
            raise FormatError(
                f"{self.path} has no {name}", hint="it is no sealed model, or not all of one"
            ) from error
        parts = []
        try:
            self._infos[name] = info = os.fstat(descriptor)
            # Read in one piece of its size, so that a large file cannot demand a second copy.
            left = min(info.st_size, limit) + 1
            while left and (part := os.read(descriptor, left)):
                parts.append(part)
                left -= len(part)
        except OSError as error:
            raise SealedModelError(f"cannot read {name}: {error.strerror}") from error
        finally:
            os.close(descriptor)
        if not left:
            raise FormatError(f"{name} is larger than {limit} bytes, or grew while it was read")
        return b"".join(parts)

    def stamp(self, name: str) -> str:
        """The ``file_stamp`` of a small file that was read."""
        return file_stamp(self._infos[name]) if name in self._infos else ""

    def replacing(self, name: str, content: bytes) -> Generator[Wait, None, None]:
        """Replace a small file of this folder, and not of another folder that replaced it.

        Raises:
            IntegrityError: another folder is at the path by now, and is left as it is; or the file
                does not read back as it was written.
            OSError: writing failed; the old file is whole.
        """
        try:
            yield from replace_in(self._fd, name, content)
        except OSError as error:
            raise self._translated(error, name) from error
        self.check_place()
        self.check_written(name, content)

    def _translated(self, error: OSError, name: str) -> Exception:
        """What an error in writing a small file means; IntegrityError where the folder is gone."""
        if isinstance(error, FileNotFoundError):
            self.check_place()
        file = str(self.path / name)
        if error.errno in (errno.EISDIR, errno.ELOOP):
            return ConfigError(f"{file} is not a file: it is not ours", hint="remove it")
        return OSError(error.errno, error.strerror, file)

    def check_place(self) -> None:
        """IntegrityError where another folder, or none, is at the path by now."""
        try:
            same = os.path.samestat(self.path.stat(), os.fstat(self._fd))
        except FileNotFoundError:
            same = False
        if not same:
            raise IntegrityError(
                f"{self.path} was exchanged while it was being changed",
                hint="somebody sealed or resealed it meanwhile; run this again if it is needed",
            )

    def lock(self, *, wait: bool = True) -> bool:
        """Lock this folder when nobody else changes it; without ``wait``, False if one does.

        The lock ends when the folder is closed. While it is held, the folder contains a file
        ``.keymgmt.lock``.

        Raises:
            ConfigError: the lock was held for a minute, or this user cannot write in the folder.
            IntegrityError: another folder is at the path by now.
        """
        # Anybody who may read the folder could lock the folder itself. Those who may write in it
        # are its owner and, where it has the right, its group.
        info = os.fstat(self._fd)
        mode = 0o660 if info.st_mode & 0o020 else 0o600
        file = Path(f"/proc/self/fd/{self._fd}") / LOCK
        try:
            self._held.enter_context(
                lock_file(file, _WAIT if wait else 0, mode=mode, like=info, remove=True)
            )
        except TimeoutError as error:
            if not wait:
                return False
            raise ConfigError(
                f"somebody else has changed {self.path} for {_WAIT:g} seconds",
                hint="a rewrap, sign, reseal or seal --force is at work there; try again "
                "when it is done",
            ) from error
        except PermissionError as error:
            raise ConfigError(
                f"cannot change {self.path}, or lock its {LOCK}: {error.strerror}",
                hint="run it as a user who may write there",
            ) from error
        except OSError as error:
            raise self._translated(error, LOCK) from error
        self.check_place()
        return True

    def clean(self, name: str) -> None:
        """Remove what killed replacements of a small file left; the lock is held."""
        for abandoned in left_behind(self.path / name):
            # No other process writes this file while the lock is held.
            if abandoned.is_file() or abandoned.is_symlink():
                abandoned.unlink(missing_ok=True)

    def in_use(self, name: str) -> bool:
        """Whether somebody replaces a small file, or was killed while doing so."""
        return os.path.lexists(self.path / LOCK) or bool(left_behind(self.path / name))

    def open_payload(self, path: str) -> Ciphertext:
        """See ModelFolder."""
        try:
            return FileCiphertext(self._open(payload_name(path)))
        except FileNotFoundError as error:
            raise IntegrityError(
                f"{payload_name(path)} is missing", hint="fetch the sealed model again"
            ) from error

    def _open(self, name: str) -> int:
        """Open a regular file below the folder, one part of the name at a time."""
        *parents, last = to_system(name).split("/")
        descriptor = self._fd
        try:
            for part in parents:
                below = os.open(part, _DIRECTORY, dir_fd=descriptor)
                if descriptor != self._fd:
                    os.close(descriptor)
                descriptor = below
            file = os.open(last, _FILE, dir_fd=descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno not in _OTHER_KINDS:
                raise translate(error, self.path / name) from error
            raise FormatError(f"{name} is not a regular file: {error.strerror}") from error
        finally:
            if descriptor != self._fd:
                os.close(descriptor)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise FormatError(f"{name} is not a regular file")
        return file

    def others(self) -> list[str]:
        """Names at the top of the folder that are none of a sealed model's, sorted."""
        files = (MANIFEST, KEYS, SIGNATURES, ORIGIN)
        unfinished = (path.name for file in files for path in left_behind(self.path / file))
        names = {entry.name for entry in os.scandir(self._fd)}
        return sorted(names - {*files, PAYLOAD, LOCK, *unfinished})

    def check_listing(self, manifest: Manifest) -> None:
        """FormatError where payload/ holds anything that the manifest does not list."""
        files = {payload_name(entry.path) for entry in manifest.files}
        folders = set()
        for name in files:
            while (name := name.rpartition("/")[0]) and name not in folders:
                folders.add(name)
        try:
            for name, is_folder in self._walk(PAYLOAD, self._fd):
                if name not in (folders if is_folder else files):
                    raise FormatError(
                        f"{name[:200]} is not listed in manifest.json",
                        hint="remove what was added to payload/, or fetch the model again",
                    )
        except OSError as error:
            if error.errno in _OTHER_KINDS or error.errno == errno.ENOENT:
                raise FormatError(f"payload/ is not a folder: {error.strerror}") from error
            raise translate(error, self.path / PAYLOAD) from error

    def _walk(self, name: str, parent: int) -> Iterator[tuple[str, bool]]:
        # A folder that is not listed ends the walk at once, so depth and count are bounded.
        descriptor = os.open(to_system(name.rpartition("/")[2]), _DIRECTORY, dir_fd=parent)
        try:
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    below = f"{name}/{from_system(entry.name)}"
                    is_folder = entry.is_dir(follow_symlinks=False)
                    yield below, is_folder
                    if is_folder:
                        yield from self._walk(below, descriptor)
        finally:
            os.close(descriptor)
