"""The directory of key files: private or refused, changed under one lock, never half written.

Rules: ``NAME.jwks`` holds one key with all its versions. Reading takes no lock, since every change
replaces a whole file. Changing takes ``.lock`` (flock(2)) and reads again under it, so that
several processes and threads add versions one after the other. Nothing is cached, so what another
process changed is seen at once, and a fork shares nothing.

Locking and unlocking changes all files or none. The new ones are staged under names that carry a
batch number; writing that number to ``.commit`` makes them the truth for every reader at once;
then they move into place. Whoever takes the lock next completes what was committed and removes
what was not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
from keymgmt_file._jwk import MAX_FILE, KeySet, load_json
from keymgmt_file._passphrase import Kdf, Passphrase, is_locked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Store"]

SUFFIX: Final = ".jwks"
LOCK: Final = ".lock"
COMMIT: Final = ".commit"
LOCK_SECONDS: Final = 30.0
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_BATCH: Final = re.compile("[0-9a-f]{16}")


class Store:
    """One directory of key files; it holds no open files between calls."""

    def __init__(self, path: Path, passphrase: Passphrase) -> None:
        self.path = path
        self.passphrase = passphrase

    def names(self) -> list[str]:
        """The keys, sorted; none where the directory does not exist."""
        try:
            with self._directory() as directory:
                return _names(directory)
        except ProviderUnavailable as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return []
            raise

    def read(self, key: str) -> KeySet:
        """All versions of one key, whose name was checked.

        Raises:
            KeyNotFound: there is no such file.
            ConfigError: the directory or the file is open to others.
            AccessDenied: it may not be read, or is locked with another passphrase.
            ProviderError: it is damaged.
        """
        with self._directory() as directory:
            data, _ = self._load(directory, key)
        return KeySet.parse(key, data)

    def locked_keys(self) -> dict[str, bool]:
        """Which keys are locked with a passphrase; nothing is decrypted."""
        with self._directory() as directory:
            return {key: is_locked(self._raw(directory, key)) for key in _names(directory)}

    def write(self, keys: KeySet) -> None:
        """Replace the file of one key; only inside ``changing``.

        With a passphrase configured, or another file locked, it is written locked.
        """
        with self._directory() as directory:
            kdf = self._kdf_in_use(directory)
        plain = keys.dump()
        try:
            content: bytes | bytearray = plain
            if kdf is not None or self.passphrase.configured:
                content = self.passphrase.seal(keys.key, plain, kdf or Kdf())
            if len(content) > MAX_FILE:
                raise ProviderError(
                    f"the key {keys.key!r} has too many versions for one file",
                    hint="make a new key and rewrap to it",
                )
            with _translated(self.path):
                replace_file(self.path / (keys.key + SUFFIX), content, mode=0o600)
        finally:
            wipe(plain)

    def relock(self, new: Passphrase | None) -> int:
        """Put every key file under ``new``, or under none: all of them or none.

        Args:
            new: the store's own passphrase locks what is not locked yet; another one replaces it.

        Returns:
            How many files changed.
        """
        with self.changing(), self._directory() as directory:
            kdf = self._kdf_in_use(directory) if new is self.passphrase else None
            staged: dict[str, bytes | bytearray] = {}
            plain: list[bytearray] = []
            try:
                for key in _names(directory):
                    data, locked = self._load(directory, key)
                    plain.append(KeySet.parse(key, data).dump())
                    del data
                    if new is None:
                        if locked:
                            staged[key] = plain[-1]
                    elif not (locked and new is self.passphrase):
                        kdf = kdf or Kdf()
                        sealed = new.seal(key, plain[-1], kdf)
                        wipe(new.open(key, load_json(key, sealed)))
                        staged[key] = sealed
                if staged:
                    self._commit(directory, staged)
            finally:
                for content in plain:
                    wipe(content)
            return len(staged)

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
                with _translated(self.path):
                    _finish(directory)
                yield
            finally:
                # Unlocked by name and not just closed: a process forked meanwhile has a copy of
                # this descriptor, and would go on holding the lock.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)

    def _commit(self, directory: int, contents: Mapping[str, bytes | bytearray]) -> None:
        batch = secrets.token_hex(8)
        with _translated(self.path):
            for key, content in contents.items():
                replace_file(self.path / _staged(key, batch), content, mode=0o600)
            # From here on every reader finds the new files; before it, the old ones.
            replace_file(self.path / COMMIT, batch.encode(), mode=0o600)
            _finish(directory)

    def _kdf_in_use(self, directory: int) -> Kdf | None:
        # Opened, and so known to be of this passphrase, before anything else is locked with it.
        for key in _names(directory):
            data = self._raw(directory, key)
            if is_locked(data):
                wipe(self.passphrase.open(key, data))
                return Kdf.parse(data["kdf"])
        return None

    def _load(self, directory: int, key: str) -> tuple[dict[str, Any], bool]:
        data = self._raw(directory, key)
        if not is_locked(data):
            return data, False
        content = self.passphrase.open(key, data)
        try:
            return load_json(key, content), True
        finally:
            wipe(content)

    def _raw(self, directory: int, key: str) -> dict[str, Any]:
        content = self._read_file(directory, key)
        try:
            return load_json(key, content)
        finally:
            wipe(content)

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
        batch = _batch(directory)
        for name in ([_staged(key, batch)] if batch else []) + [key + SUFFIX]:
            path = self.path / name
            try:
                descriptor = os.open(name, _READ, dir_fd=directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _explain(error, path) from error
            with _translated(path), io.FileIO(descriptor) as file:
                return _read_private(file, path)
        raise KeyNotFound(f"there is no key {key!r} in {self.path}")

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


def _names(directory: int) -> list[str]:
    names = os.listdir(directory)
    return sorted(
        name.removesuffix(SUFFIX)
        for name in names
        if name.endswith(SUFFIX) and is_key(name.removesuffix(SUFFIX))
    )


def _staged(key: str, batch: str) -> str:
    return f".{key}{SUFFIX}.{batch}.next"


def _batch(directory: int) -> str | None:
    try:
        descriptor = os.open(COMMIT, _READ, dir_fd=directory)
    except FileNotFoundError:
        return None
    with io.FileIO(descriptor) as file:
        text = (file.read(64) or b"").decode(errors="replace")
    if not _BATCH.fullmatch(text):
        raise ProviderError(f"{COMMIT} in the key directory is damaged: {text[:16]!r}")
    return text


def _finish(directory: int) -> None:
    """Complete a committed batch and remove what killed processes left; under the lock."""
    batch = _batch(directory)
    names = os.listdir(directory)
    if batch:
        end = f"{SUFFIX}.{batch}.next"
        for name in names:
            if name.endswith(end):
                final = name.removesuffix(f".{batch}.next")[1:]
                os.replace(name, final, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
        os.unlink(COMMIT, dir_fd=directory)
        os.fsync(directory)
    # Whoever writes holds the lock, so a temporary file found under it was left by a process that
    # was killed. It holds key material, and nobody will ever need it.
    for name in names:
        if name.startswith(".") and name.endswith((".tmp", ".next")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)


def _read_private(file: io.FileIO, path: Path) -> bytearray:
    info = os.fstat(file.fileno())
    if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_FILE:
        raise ProviderError(f"{path} is no key file of at most {MAX_FILE} bytes")
    # Not a ProviderError, which would pass on to the next recipient in silence: the operator must
    # hear that a key lies open.
    _refuse_open(info, path, "key file", "600")
    content = bytearray(info.st_size)
    if file.readinto(content) != info.st_size:
        raise ProviderError(f"{path} changed while it was read")
    return content


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
