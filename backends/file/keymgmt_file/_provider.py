"""FileProvider: wrap, unwrap, sign and look after keys that lie in private files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keymgmt.backend import (
    Dek,
    Health,
    KeyInfo,
    KeyNotFound,
    KeyProvider,
    ProviderError,
    Recipient,
    Signature,
    SupportsBatchUnwrap,
    SupportsBatchWrap,
    SupportsKeyDeletion,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
    WrappedKey,
    WrongKey,
    check_backend,
    check_key,
    check_kind,
    check_options,
    check_retirable,
    key_exists,
    no_public_part,
    no_version,
    not_held,
    version_retired,
)
from keymgmt_file import _checks, _wrapping
from keymgmt_file._jwk import KINDS, KeySet, SigningKey, signing_key
from keymgmt_file._keys import KeyFiles
from keymgmt_file._settings import FileSettings

__all__ = ["FileProvider"]


class FileProvider(
    KeyProvider[FileSettings],
    SupportsKeyManagement,
    SupportsKeyDeletion,
    SupportsSigning,
    SupportsOfflineRecipients,
    SupportsBatchUnwrap,
    SupportsBatchWrap,
):
    """Keys in private files of this machine; no server, no hardware.

    Example::

        [providers.local]
        backend = "file"
        path = "keys"

    Each key is one JWK Set (RFC 7517), ``PATH/NAME.jwks``, with all its versions. The directory
    is 0700 and the files are 0600; where others can read either, it is refused. Whoever can read
    the files has the keys, so this backend protects sealed models that are elsewhere: on a disk
    that was sold, in a bucket, on a mirror. A machine in strange hands wants ``tpm2``.

    Kinds: ``aes256`` wraps; ``hpke-p256``, ``hpke-p384``, ``hpke-x25519``, ``hpke-mlkem1024`` and
    the hybrid ``hpke-mlkem768-x25519`` wrap, and others seal to them with a recipient file alone;
    ``ed25519`` (RFC 8032), ``ml-dsa-65`` and ``ml-dsa-87`` (FIPS 204) sign.

    No two wraps by ``aes256`` share a key: HKDF-SHA-384 (RFC 5869) of the KEK, a random salt, the
    key name, version and context gives one for each, so their number has no bound that matters.

    Rotation adds a version; old ones still unwrap. A retired version unwraps nothing more, but
    its material stays in the file: removing its member ``revoked`` undoes it, and deleting the
    version from the file (and from the backups) makes it final. A deleted key is back with the
    backup of its file; its numbers are not used again.

    A passphrase may lie around the directory (``keymgmt file lock``): Argon2id and AES-256-GCM. The
    key that it opens is kept in memory until ``close``.

    Several processes and threads may use and change one directory at once. A DEK wrapped for
    another key of the same name is ``WrongKey``: wraps of an HPKE kind name the public key, and
    those of ``aes256`` have a recogniser that only the holder of the KEK can check.

    Losing the directory is losing every model that only its keys open: back it up, encrypted.
    """

    backend: ClassVar[str] = _wrapping.BACKEND
    local: ClassVar[bool] = True
    Settings: ClassVar[type[FileSettings]] = FileSettings
    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]] = {
        kind.name: kind.purpose for kind in KINDS.values()
    }

    def __init__(self, name: str, settings: FileSettings) -> None:
        super().__init__(name, settings)
        self.key_files = KeyFiles(name, settings)

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; always the newest version."""
        return _wrapping.wrap(self.key_files.current(key, "wrap"), dek, context)

    def wrap_batch(self, key: str, items: Sequence[tuple[Dek, bytes]]) -> Sequence[WrappedKey]:
        """See SupportsBatchWrap; the key file is read once."""
        keys = self.key_files.current(key, "wrap")
        return [_wrapping.wrap(keys, dek, context) for dek, context in items]

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider."""
        return self._unwrap(wrapped, context, self._look_up, self.key_files.had)

    def unwrap_batch(
        self, items: Sequence[tuple[WrappedKey, bytes]]
    ) -> Sequence[Dek | ProviderError]:
        """See SupportsBatchUnwrap; each key file is read once."""
        look_up, had = functools.cache(self._look_up), functools.cache(self.key_files.had)
        answers: list[Dek | ProviderError] = []
        for wrapped, context in items:
            try:
                answers.append(self._unwrap(wrapped, context, look_up, had))
            except ProviderError as error:
                answers.append(error)
        return answers

    def _look_up(self, key: str) -> KeySet | ProviderError:
        """A key that wraps, or why it cannot be had; so that a batch finds out once."""
        try:
            return self.key_files.read(key).require("wrap")
        except ProviderError as error:
            return error

    def _unwrap(
        self,
        wrapped: WrappedKey,
        context: bytes,
        look_up: Callable[[str], KeySet | ProviderError],
        had: Callable[[str, str], bool],
    ) -> Dek:
        check_backend(wrapped, self.backend)
        keys = look_up(wrapped.key)
        if isinstance(keys, KeyNotFound):
            if had(wrapped.key, wrapped.version):
                raise KeyNotFound(
                    f"the key file of {wrapped.key!r} is gone, and version {wrapped.version} of "
                    "that key was here before",
                    hint="put it back from a backup; or rewrap what it opened, with --drop",
                ) from keys
            raise WrongKey(str(keys)) from keys
        if isinstance(keys, ProviderError):
            raise keys
        if wrapped.version not in keys.numbers:
            raise not_held(wrapped, self.name)
        if keys.is_retired(wrapped.version):
            raise version_retired(wrapped.key, wrapped.version)
        return _wrapping.unwrap(keys, wrapped, context)

    def export_recipient(self, key: str) -> Recipient:
        """See SupportsOfflineRecipients."""
        keys = self.key_files.current(key, "wrap")
        if not keys.kind.is_hpke:
            raise no_public_part(key, keys.kind.name, self.name, "hpke-x25519")
        return _wrapping.recipient(keys)

    def public_key(self, key: str, version: str | None = None) -> bytes:
        """See SupportsSigning."""
        return _der(self._signing(key, version))

    def sign(self, key: str, message: bytes) -> Signature:
        """See SupportsSigning."""
        private = self._signing(key)
        return Signature(private.sign(message), _der(private))

    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """See SupportsKeyManagement; it takes no options, and makes the directory if need be."""
        check_key(key)
        check_kind(kind, KINDS, "file")
        check_options(options, {}, "file")
        keys = KeySet(key, KINDS[kind])
        with self.key_files.changing(create=True):
            if key in self.key_files.names():
                raise key_exists(key, self.key_files.path, self.name)
            self.key_files.add_version(keys)
        return keys.info()

    def list_keys(self) -> list[KeyInfo]:
        """See SupportsKeyManagement."""
        return [self.key_files.read(key).info() for key in self.key_files.names()]

    def describe_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        return self.key_files.find(key).info()

    def rotate_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        with self.key_files.changing():
            keys = self.key_files.current(key)
            self.key_files.add_version(keys)
        return keys.info()

    def retire_version(self, key: str, version: str) -> KeyInfo:
        """See SupportsKeyManagement; retiring a retired version changes nothing."""
        with self.key_files.changing():
            keys = self.key_files.current(key)
            check_retirable(key, version, keys.numbers, self.name)
            keys.retire(version)
            self.key_files.write(keys)
        return keys.info()

    def delete_key(self, key: str) -> None:
        """See SupportsKeyDeletion; backups of the directory still have it."""
        with self.key_files.changing():
            self.key_files.find(key)
            self.key_files.remove(key)

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider; without ``key``, every key file is read."""
        return _checks.check(self, self.key_files, key)

    def close(self) -> None:
        """See KeyProvider; the key that the passphrase opened is wiped."""
        self.key_files.passphrase.close()

    def _signing(self, key: str, version: str | None = None) -> SigningKey:
        keys = self.key_files.current(key, "sign")
        if version not in (None, *keys.numbers):
            raise no_version(key, str(version), keys.numbers)
        with keys.secret(version or keys.newest) as secret:
            return signing_key(keys.kind, secret)


def _der(private: SigningKey) -> bytes:
    return private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
