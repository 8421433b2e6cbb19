"""The directory of key files: private or refused, changed under one lock, never half written.

Rules: ``NAME.jwks`` holds one key with all its versions. Reading takes no lock, since every change
replaces a whole file. Changing takes ``.lock`` (flock(2)) and reads again under it, so that
several processes and threads add versions one after the other. Nothing is cached, so what another
process changed is seen at once, and a fork shares nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    KeyNotFound,
    ProviderError,
    ProviderUnavailable,
    is_key,
    private_file_problem,
    replace_file,
    wipe,
)
from keymgmt_file._jwk import MAX_FILE, KeySet

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Store"]

SUFFIX: Final = ".jwks"
LOCK: Final = ".lock"
LOCK_SECONDS: Final = 30.0
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Store:
    """One directory of key files; it holds no open files between calls."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """The keys, sorted; none where the directory does not exist."""
        try:
            with self._directory() as directory, _translated(self.path):
                entries = os.listdir(directory)  # noqa: PTH208 - a descriptor
        except ProviderUnavailable as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return []
            raise
        return sorted(
            name.removesuffix(SUFFIX)
            for name in entries
            if name.endswith(SUFFIX) and is_key(name.removesuffix(SUFFIX))
        )

    def read(self, key: str) -> KeySet:
        """All versions of one key, whose name was checked.

        Raises:
            KeyNotFound: there is no such file.
            ConfigError: the directory or the file is open to others.
            ProviderError: unreadable or damaged.
        """
        with self._directory() as directory:
            content = self._read_file(directory, key)
        try:
            return KeySet.parse(key, content)
        finally:
            wipe(content)

    def write(self, keys: KeySet) -> None:
        """Replace the file of one key; only inside ``changing``."""
        content = keys.dump()
        if len(content) > MAX_FILE:
            raise ProviderError(
                f"the key {keys.key!r} has too many versions for one file",
                hint="make a new key and rewrap to it",
            )
        with _translated(self.path):
            replace_file(self.path / (keys.key + SUFFIX), content, mode=0o600)

    @contextlib.contextmanager
    def changing(self, *, create: bool = False) -> Iterator[None]:
        """Hold the store's lock; ``create`` makes the directory first.

        Raises:
            ProviderUnavailable: somebody else held the lock for 30 seconds.
        """
        if create:
            with _translated(self.path), contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700, parents=True)
        with self._directory() as directory:
            descriptor = self._lock(directory)
            try:
                self._sweep(directory)
                yield
            finally:
                # Unlocked by name and not just closed: a process forked meanwhile has a copy of
                # this descriptor, and would go on holding the lock.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)

    @contextlib.contextmanager
    def _directory(self) -> Iterator[int]:
        with _translated(self.path):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _refuse_open(os.fstat(descriptor), self.path, "key directory", "700")
            yield descriptor
        finally:
            os.close(descriptor)

    def _read_file(self, directory: int, key: str) -> bytearray:
        path = self.path / (key + SUFFIX)
        try:
            descriptor = os.open(path.name, _READ, dir_fd=directory)
        except FileNotFoundError:
            raise KeyNotFound(f"there is no key {key!r} in {self.path}") from None
        except OSError as error:
            raise _explain(error, path) from error
        with _translated(path), io.FileIO(descriptor) as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_FILE:
                raise ProviderError(f"{path} is no key file of at most {MAX_FILE} bytes")
            # Not a ProviderError, which would pass on to the next recipient in silence: the
            # operator must hear that a key lies open.
            _refuse_open(info, path, "key file", "600")
            content = bytearray(info.st_size)
            if file.readinto(content) != info.st_size:
                raise ProviderError(f"{path} changed while it was read")
            return content

    def _lock(self, directory: int) -> int:
        until = time.monotonic() + LOCK_SECONDS
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            with _translated(self.path / LOCK):
                descriptor = os.open(LOCK, flags, 0o600, dir_fd=directory)
            try:
                with _translated(self.path / LOCK):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Somebody may have removed the file that is locked here: then it locks nobody out.
                here = os.stat(LOCK, dir_fd=directory, follow_symlinks=False)
                if os.path.samestat(here, os.fstat(descriptor)):
                    return descriptor
            except ProviderUnavailable as error:
                if not isinstance(error.__cause__, BlockingIOError):
                    os.close(descriptor)
                    raise
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if time.monotonic() > until:
                raise ProviderUnavailable(
                    f"somebody else has been changing the keys in {self.path} "
                    f"for {LOCK_SECONDS:g} seconds",
                    hint=f"look who holds {self.path / LOCK}: fuser {self.path / LOCK}",
                )
            time.sleep(0.01)

    def _sweep(self, directory: int) -> None:
        # Whoever writes holds the lock, so a temporary file found under it was left by a process
        # that was killed. It holds key material and nobody will ever need it.
        with _translated(self.path):
            for name in os.listdir(directory):
                if name.startswith(".") and name.endswith(".tmp"):
                    os.unlink(name, dir_fd=directory)


def _refuse_open(info: os.stat_result, path: Path, what: str, mode: str) -> None:
    if problem := private_file_problem(info):
        owned = info.st_uid in (os.geteuid(), 0)
        raise ConfigError(
            f"the {what} {path} is refused: {problem}",
            hint=f"chmod {mode} {path}, and rotate its keys if others may have read them"
            if owned
            else f"run as its owner, or chown it: chown {os.geteuid()} {path}",
        )


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _explain(error, path) from error


def _explain(error: OSError, path: Path) -> ProviderError:
    message = f"{path}: {error.strerror or type(error).__name__}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(message, hint="run as the owner of the key directory")
    if error.errno == errno.ENOENT:
        return ProviderUnavailable(
            f"the key directory {path} does not exist",
            hint="mount it, correct `path`, or make it with: keymgmt keys create PROVIDER:KEY",
        )
    return ProviderUnavailable(message)
