"""The directory of key files: refused unless it is private, changed under a lock, file by file.

Rules: ``NAME.jwks`` holds one key with all its versions. Reading takes no lock, since every change
replaces a whole file. A change takes ``.lock`` and reads again under it, so that several processes
and threads add versions one after the other. Nothing is cached, so a change by another process is
seen at once, and a fork shares nothing.

Each key file says itself whether it is locked, and readers accept both. ``passphrase.json`` is
written before the first file is locked, and removed after the last file is unlocked. So if a
process is killed in between, all keys still open, and the next run does the rest.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    JsonReader,
    KeyNotFound,
    ProviderError,
    check_key,
    check_trusted,
    is_key,
    lock_file,
    make_folder,
    read_file,
    replace_file,
    sync_directory,
    target_of,
    wipe,
)
from keymgmt_file import _versions
from keymgmt_file._errors import damaged, translated
from keymgmt_file._jwk import MAX_FILE, KeySet, random_key, read_json
from keymgmt_file._passphrase import KEK_FILE, Passphrase, decrypt_file, encrypt_file
from keymgmt_file._settings import FileSettings

__all__ = ["KeyFiles"]

SUFFIX: Final = ".jwks"
LOCK: Final = ".lock"
LOCK_SECONDS: Final = 30.0
VERSIONS: Final = "versions.json"


class KeyFiles:
    """One directory of key files; it holds no open files between calls."""

    def __init__(self, provider: str, settings: FileSettings) -> None:
        self.provider = provider
        self.path = settings.path
        self.passphrase = Passphrase(settings.passphrase, provider)

    def names(self) -> list[str]:
        """The keys, sorted.

        Raises:
            ProviderUnavailable: there is no such directory.
            AccessDenied: it may not be read, or others have access to it.
        """
        self._check()
        with translated(f"the key directory {self.path}"):
            names = [each.stem for each in self.path.iterdir() if each.suffix == SUFFIX]
        return sorted(filter(is_key, names))

    def read(self, key: str) -> KeySet:
        """All versions of one key.

        Raises:
            ConfigError: ``key`` is not a key name.
            KeyNotFound: there is no such file.
            ProviderUnavailable: there is no such directory, or the disk fails.
            AccessDenied: it may not be read, others have access to it, or it is locked with another
                passphrase.
            ProviderError: it is damaged.
        """
        check_key(key)
        self._check()
        while True:
            held = self._optional(KEK_FILE)
            try:
                return KeySet.parse(key, self._unlocked(key, held))
            except ProviderError:
                # Another process may have locked, unlocked or changed the passphrase between the
                # reading of the two files.
                if self._optional(KEK_FILE) == held:
                    raise

    def find(self, key: str, purpose: str | None = None) -> KeySet:
        """``read`` with a hint for a misspelt name; UnsupportedOperation for another purpose."""
        try:
            keys = self.read(key)
        except KeyNotFound as error:
            near = difflib.get_close_matches(key, self.names(), n=1)
            make = f"make it with: keymgmt keys create {self.provider}:{key}"
            error.hint = f"did you mean {self.provider}:{near[0]}?" if near else make
            raise
        return keys.require(purpose)

    def current(self, key: str, purpose: str | None = None) -> KeySet:
        """``find`` for new wraps, signatures and versions.

        Raises:
            ProviderError: the key file was replaced by an older or another one.
        """
        # ``versions.json`` is read before the key file, and written after it. So it never names a
        # version that a file which is being changed does not have yet.
        known = self._known().get(key, {})
        keys = self.find(key, purpose)
        if problem := _versions.problem(known, _versions.identities(keys)):
            raise ProviderError(
                f"the key file of {key!r} was replaced by an older or another one: {problem}",
                hint="put the newest file back, or make a new version from this file with: "
                f"keymgmt file accept {self.provider}:{key}",
            )
        return keys

    def had(self, key: str, version: str) -> bool:
        """Whether this version of a key was in the directory before."""
        return version in self._known().get(key, {})

    def locked_keys(self) -> dict[str, bool]:
        """Which keys are locked with a passphrase; nothing is decrypted."""
        return {key: _is_locked(self._raw(key)) for key in self.names()}

    @contextlib.contextmanager
    def changing(self, *, create: bool = False) -> Iterator[None]:
        """Hold the directory's lock; ``create`` makes the directory first.

        Raises:
            ProviderUnavailable: another process held the lock for 30 seconds.
        """
        with contextlib.ExitStack() as stack:
            with translated(f"the key directory {self.path}"):
                if create:
                    make_folder(self.path, 0o700)
            self._check()
            with translated(f"the key directory {self.path}"):
                stack.enter_context(lock_file(self.path / LOCK, LOCK_SECONDS))
                for left in self.path.iterdir():
                    # Only a holder of the lock writes, so a temporary file that is here now was
                    # left by a process that was killed. Nobody needs the key material in it.
                    if (target_of(left.name) or "").endswith((SUFFIX, KEK_FILE, VERSIONS)):
                        left.unlink()
            yield

    def add_version(self, keys: KeySet) -> None:
        """Add a version whose number was never used, and write it; only inside ``changing``."""
        keys.add_version(max(map(int, self._known().get(keys.key, {})), default=0))
        self.write(keys)

    def write(self, keys: KeySet) -> None:
        """Replace the file of one key; only inside ``changing``.

        It is written locked if the directory is locked, or if a passphrase is configured.
        """
        known = self._known()
        with self._kek(make=self.passphrase.source is not None) as kek:
            self._save(keys, kek)
        now = known | {keys.key: known.get(keys.key, {}) | _versions.identities(keys)}
        if now != known:
            self._replace(VERSIONS, _versions.dump(now))

    def remove(self, key: str) -> None:
        """Delete the file of one key; only inside ``changing``. Its numbers are not used again."""
        with translated(f"{self.path / (key + SUFFIX)}"):
            (self.path / (key + SUFFIX)).unlink()
            sync_directory(self.path)

    def lock(self) -> int:
        """Lock the key files that are not locked yet; returns how many that were.

        Raises:
            ConfigError: no passphrase is configured.
            AccessDenied: the directory is locked with another passphrase.
        """
        if self.passphrase.source is None:
            raise ConfigError(
                f"[providers.{self.provider}] has no passphrase",
                hint='name its source, such as: passphrase = { prompt = "Passphrase" }',
            )
        with self.changing(), self._kek(make=True) as kek:
            plain = [key for key, locked in self.locked_keys().items() if not locked]
            for key in plain:
                self._save(self.read(key), kek)
            return len(plain)

    def unlock(self) -> int:
        """Take the passphrase off all key files; returns how many were locked.

        Raises:
            AccessDenied: the passphrase is wrong.
            ProviderError: a key file is damaged; the passphrase stays.
        """
        with self.changing(), self._kek(make=False):
            locked = [key for key, locked in self.locked_keys().items() if locked]
            for key in locked:
                self._save(self.read(key), None)
            with translated(f"the key directory {self.path}"):
                (self.path / KEK_FILE).unlink(missing_ok=True)
                sync_directory(self.path)
            return len(locked)

    def change_passphrase(self, new: Passphrase) -> None:
        """Lock the directory with another passphrase, which rewrites only ``passphrase.json``.

        Raises:
            ConfigError: the directory is not locked.
            AccessDenied: the present passphrase is wrong.
        """
        with self.changing(), self._kek(make=False) as kek:
            if kek is None:
                raise ConfigError(
                    f"the key directory {self.path} is not locked",
                    hint=f"keymgmt file lock {self.provider}",
                )
            self._replace(KEK_FILE, new.make(kek))

    @contextlib.contextmanager
    def _kek(self, *, make: bool) -> Iterator[bytearray | None]:
        """The key-encryption key, made if ``make`` is true; None if the directory has none."""
        held = self._optional(KEK_FILE)
        if held is not None:
            kek = self.passphrase.open(held)
        elif make:
            if any(self.locked_keys().values()):
                raise _not_held(self.path)
            kek = random_key()
            self._replace(KEK_FILE, self.passphrase.make(kek))
        else:
            kek = bytearray()
        try:
            yield kek or None
        finally:
            wipe(kek)

    def _known(self) -> _versions.Known:
        content = self._optional(VERSIONS)
        return {} if content is None else _versions.parse(content)

    def _optional(self, name: str) -> bytes | None:
        if not os.path.lexists(self.path / name):
            return None
        try:
            return bytes(self._content(name))
        except KeyNotFound:  # removed meanwhile
            return None

    def _unlocked(self, key: str, held: bytes | None) -> JsonReader:
        reader = self._raw(key)
        if not _is_locked(reader):
            return reader
        if held is None:
            raise _not_held(self.path)
        kek = self.passphrase.open(held)
        content = decrypt_file(key + SUFFIX, reader, kek)
        wipe(kek)
        if content is None:
            raise damaged(f"the key file of {key!r}, renamed, or locked with another {KEK_FILE}")
        try:
            return read_json(content, f"the key file of {key!r}")
        finally:
            wipe(content)

    def _raw(self, key: str) -> JsonReader:
        content = self._content(key + SUFFIX)
        try:
            return read_json(content, f"the key file of {key!r}")
        finally:
            wipe(content)

    def _content(self, name: str) -> bytearray:
        path = self.path / name
        with translated(f"{path}", "read"):
            return read_file(
                path, label="key file", limit=MAX_FILE, access="private", error=AccessDenied
            )

    def _save(self, keys: KeySet, kek: bytearray | None) -> None:
        plain = keys.dump()
        try:
            name = keys.key + SUFFIX
            self._replace(name, encrypt_file(name, plain, kek) if kek else plain)
        finally:
            wipe(plain)

    def _replace(self, name: str, content: bytes | bytearray) -> None:
        if len(content) > MAX_FILE:
            raise ProviderError(
                f"{self.path / name} would be larger than {MAX_FILE} bytes",
                hint="the key has too many versions: make a new one and rewrap to it",
            )
        with translated(f"{self.path / name}"):
            replace_file(self.path / name, content, mode=0o600)

    def _check(self) -> None:
        with translated(f"the key directory {self.path}"):
            check_trusted(self.path, label="key directory", private=True, error=AccessDenied)


def _is_locked(reader: JsonReader) -> bool:
    return "sealed" in reader.names()


def _not_held(path: Path) -> ProviderError:
    return ProviderError(
        f"there are locked key files in {path}, and the {KEK_FILE} that opens them is missing",
        hint="put it back from a backup; without it they do not open",
    )
