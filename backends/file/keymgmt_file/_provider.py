"""FileProvider: wrap, unwrap, sign and look after keys that lie in private files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from typing import ClassVar, Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keymgmt.backend import (
    DEK_LENGTH,
    ConfigError,
    ConfigPath,
    Dek,
    Finding,
    Health,
    KeyInfo,
    KeymgmtError,
    KeyNotFound,
    KeyProvider,
    KeyRetired,
    Recipient,
    SecretSource,
    Settings,
    Signature,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    check_key,
    hpke_open,
    public_key_id,
    wipe,
    wrap_for,
)
from keymgmt_file._jwk import KINDS, KeySet, signing_key
from keymgmt_file._passphrase import Passphrase
from keymgmt_file._store import Store

__all__ = ["FileProvider", "FileSettings"]

_SALT: Final = 32
_BLOB: Final = _SALT + DEK_LENGTH + 16
_LABEL: Final = b"keymgmt-file wrap 1"


class FileSettings(Settings):
    """``[providers.NAME]`` with ``backend = "file"``.

    Attributes:
        path: the key directory; relative to the config file.
        passphrase: where the passphrase of locked key files is; see ``keymgmt file lock``.
    """

    path: ConfigPath
    passphrase: SecretSource | None = None


class FileProvider(
    KeyProvider[FileSettings],
    SupportsKeyManagement,
    SupportsSigning,
    SupportsOfflineRecipients,
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

    Kinds: ``aes256`` wraps; ``hpke-p256``, ``hpke-p384``, ``hpke-x25519`` and the hybrid
    ``hpke-mlkem768-x25519`` wrap, and others can seal to them with a recipient file alone;
    ``ed25519`` (RFC 8032) and ``ml-dsa-65`` (FIPS 204) sign.

    Wrapping with ``aes256`` (``HKDF-SHA256-A256GCM``): HKDF-SHA-256 (RFC 5869) of the KEK with a
    random salt of 32 bytes, and in its info the key name, version and context, gives a key that
    encrypts this one DEK with AES-256-GCM, the context as additional data. No two wraps share a
    key, so their number has no bound that anybody will meet. The blob is salt, ciphertext, tag: 80
    bytes.

    Rotation adds a version; old ones still unwrap. A retired version unwraps nothing more, but
    its material stays in the file: removing its member ``revoked`` undoes it, and deleting the
    version from the file (and from the backups) makes it final.

    A passphrase may lie around the files (``keymgmt file lock``): Argon2id and AES-256-GCM. What is
    derived from it is kept in memory until ``close``.

    Several processes and threads may use and change one directory at once. A DEK wrapped for
    another key of the same name is ``UnwrapFailed`` with ``aes256``, and ``WrongKey`` with an HPKE
    kind, whose wraps name the public key.

    Losing the directory is losing every model that only its keys open: back it up, encrypted.
    """

    backend: ClassVar[str] = "file"
    Settings: ClassVar[type[FileSettings]] = FileSettings
    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]] = {
        kind.name: kind.purpose for kind in KINDS.values()
    }

    def __init__(self, name: str, settings: FileSettings) -> None:
        super().__init__(name, settings)
        source = settings.passphrase
        self._store = Store(settings.path, Passphrase(source.read if source else None, name))

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; always the newest version."""
        keys = self._find(key, "wrap")
        if keys.kind.is_hpke:
            return wrap_for(self._recipient(keys), dek, context)
        version = keys.newest
        salt = os.urandom(_SALT)
        derived = _derive(keys, version, salt, context)
        try:
            # The nonce may be fixed: the key was derived for this one message.
            sealed = AESGCM(derived).encrypt(bytes(12), dek.view(), context)
        finally:
            wipe(derived)
        return WrappedKey(self.backend, key, version, keys.kind.marks["alg"], salt + sealed)

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider."""
        keys = self._holding(wrapped)
        if wrapped.mechanism != keys.kind.marks["alg"]:
            raise UnsupportedOperation(
                f"the key {wrapped.key!r} is {keys.kind.name} and unwraps no {wrapped.mechanism}"
            )
        if set(wrapped.params) != ({"pk"} if keys.kind.is_hpke else set()):
            raise UnwrapFailed(f"what was wrapped by {wrapped} is malformed")
        return (_unwrap_hpke if keys.kind.is_hpke else _unwrap_aes)(keys, wrapped, context)

    def export_recipient(self, key: str) -> Recipient:
        """See SupportsOfflineRecipients."""
        keys = self._find(key, "wrap")
        if not keys.kind.is_hpke:
            raise UnsupportedOperation(
                f"the key {key!r} is {keys.kind.name}, which has no public part",
                hint=f"keymgmt keys create {self.name}:NAME --kind hpke-x25519",
            )
        return self._recipient(keys)

    def _recipient(self, keys: KeySet) -> Recipient:
        version = keys.newest
        public = keys.hpke_public(version)
        return Recipient(keys.kind.name, self.backend, keys.key, version, public)

    def public_key(self, key: str) -> bytes:
        """See SupportsSigning."""
        keys = self._find(key, "sign")
        secret = keys.secret(keys.newest)
        try:
            public = signing_key(keys.kind, secret).public_key()
        finally:
            wipe(secret)
        return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def sign(self, key: str, message: bytes) -> Signature:
        """See SupportsSigning."""
        keys = self._find(key, "sign")
        secret = keys.secret(keys.newest)
        try:
            private = signing_key(keys.kind, secret)
        finally:
            wipe(secret)
        public = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return Signature(private.sign(message), public)

    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """See SupportsKeyManagement; it takes no options, and makes the directory if need be."""
        check_key(key)
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            raise ConfigError(
                f"the backend file makes no key of kind {kind!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(KINDS)}",
            )
        if options:
            raise ConfigError(f"the backend file knows no option {next(iter(options))!r}")
        keys = KeySet(key, KINDS[kind])
        keys.add_version()
        with self._store.changing(create=True):
            if key in self._store.names():
                raise ConfigError(
                    f"there is a key {key!r} already in {self._store.path}",
                    hint=f"a new version of it: keymgmt keys rotate {self.name}:{key}",
                )
            self._store.write(keys)
        return keys.info()

    def list_keys(self) -> list[KeyInfo]:
        """See SupportsKeyManagement."""
        return [self._store.read(key).info() for key in self._store.names()]

    def describe_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        return self._find(key).info()

    def rotate_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        self._find(key)
        with self._store.changing():
            keys = self._find(key)
            keys.add_version()
            self._store.write(keys)
        return keys.info()

    def retire_version(self, key: str, version: str) -> KeyInfo:
        """See SupportsKeyManagement; retiring a retired version changes nothing."""
        self._find(key)
        with self._store.changing():
            keys = self._find(key)
            if keys.find(version) is None:
                raise KeyNotFound(
                    f"the key {key!r} has no version {version!r}",
                    hint=f"versions: {', '.join(jwk['kid'] for jwk in keys.versions)}",
                )
            if version == keys.newest:
                raise ConfigError(
                    f"version {version} of the key {key!r} is its newest and in use",
                    hint=f"first: keymgmt keys rotate {self.name}:{key}",
                )
            keys.retire(version)
            self._store.write(keys)
        return keys.info()

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider; without ``key``, every key file is read."""
        findings: list[Finding] = []
        try:
            names = self._store.names()
            findings.append(self._look())
        except KeymgmtError as error:
            return Health((_failed("key directory", error),))
        for name in names if key is None else [key]:
            try:
                info = self.describe_key(name)
                if key is not None:
                    self._round_trip(info)
            except KeymgmtError as error:
                findings.append(_failed(f"key {name}", error))
            else:
                done = "" if key is None else f", {info.purpose}s"
                findings.append(
                    Finding(f"key {name}", "ok", f"{info.kind}, version {info.newest}{done}")
                )
        return Health(tuple(findings))

    def _look(self) -> Finding:
        path, name = self._store.path, "key directory"
        states = self._store.locked_keys().values()
        if not states:
            make = f"make one with: keymgmt keys create {self.name}:KEY"
            return Finding(name, "warning", f"{path}: no keys yet", make)
        detail = f"{path}: private, {len(states)} keys, {sum(states)} locked with a passphrase"
        if not all(states) and self._store.passphrase.configured:
            lock = f"lock the others with: keymgmt file lock {self.name}"
            return Finding(name, "warning", detail, lock)
        return Finding(name, "ok", detail)

    def lock(self, read: Callable[[], bytearray] | None = None) -> int:
        """Lock every key file that is not locked yet with the configured passphrase.

        Args:
            read: gives the passphrase instead, and replaces the one of files locked already.

        Returns:
            How many files changed; all that had to, or none if this raises.

        Raises:
            ConfigError: no passphrase is configured, so that nothing could open them again.
            AccessDenied: another file is locked with another passphrase.
        """
        if not self._store.passphrase.configured:
            raise ConfigError(
                f"[providers.{self.name}] has no passphrase",
                hint='say where it is, such as: passphrase = { prompt = "Passphrase" }',
            )
        return self._store.relock(Passphrase(read, self.name) if read else self._store.passphrase)

    def unlock(self) -> int:
        """Take the passphrase off every key file; returns how many changed, as for ``lock``."""
        return self._store.relock(None)

    def locked_keys(self) -> dict[str, bool]:
        """Which keys are locked with a passphrase; needs none."""
        return self._store.locked_keys()

    def close(self) -> None:
        """See KeyProvider; what was derived from the passphrase is wiped."""
        self._store.passphrase.close()

    def _round_trip(self, info: KeyInfo) -> None:
        if info.purpose == "sign":
            self.sign(info.key, b"keymgmt check")
            return
        with Dek.generate() as dek, self.unwrap(self.wrap(info.key, dek, b""), b"") as again:
            if dek != again:
                raise UnwrapFailed(f"the key {info.key!r} does not give back what it wrapped")

    def _find(self, key: str, purpose: str | None = None) -> KeySet:
        try:
            keys = self._store.read(check_key(key))
        except KeyNotFound as error:
            near = difflib.get_close_matches(key, self._store.names(), n=1)
            make = f"make it with: keymgmt keys create {self.name}:{key}"
            error.hint = f"did you mean {self.name}:{near[0]}?" if near else make
            raise
        return self._wanted(keys, purpose)

    def _wanted(self, keys: KeySet, purpose: str | None) -> KeySet:
        if purpose not in (None, keys.kind.purpose):
            raise UnsupportedOperation(
                f"the key {keys.key!r} is {keys.kind.name}, which does not {purpose}",
                hint="a key has one purpose; make another one for this",
            )
        return keys

    def _holding(self, wrapped: WrappedKey) -> KeySet:
        if wrapped.backend != self.backend:
            raise WrongKey(f"{wrapped} is of another backend")
        try:
            keys = self._wanted(self._store.read(check_key(wrapped.key)), "wrap")
        except KeyNotFound as error:
            raise WrongKey(str(error)) from error
        jwk = keys.find(wrapped.version)
        if jwk is None:
            raise WrongKey(
                f"the key {wrapped.key!r} of {self.name!r} has no version {wrapped.version}",
                hint="copy the newer key file here, or use another machine",
            )
        if "revoked" in jwk:
            raise KeyRetired(
                f"version {wrapped.version} of the key {wrapped.key!r} was retired",
                hint="rewrap the model where another group opens it",
            )
        return keys


def _unwrap_aes(keys: KeySet, wrapped: WrappedKey, context: bytes) -> Dek:
    if len(wrapped.blob) != _BLOB:
        raise UnwrapFailed(f"what was wrapped by {wrapped} is malformed")
    salt, sealed = wrapped.blob[:_SALT], wrapped.blob[_SALT:]
    plain = bytearray(DEK_LENGTH)
    derived = _derive(keys, wrapped.version, salt, context)
    try:
        AESGCM(derived).decrypt_into(bytes(12), sealed, context, plain)
        return Dek(plain)
    except InvalidTag as error:
        raise UnwrapFailed(
            f"what was wrapped by {wrapped} does not authenticate",
            hint="it was damaged, bound to another model, or wrapped by another key of that name",
        ) from error
    finally:
        # decrypt_into leaves unverified bytes behind on failure, and the key on success.
        wipe(plain)
        wipe(derived)


def _unwrap_hpke(keys: KeySet, wrapped: WrappedKey, context: bytes) -> Dek:
    # The stated public key will do: thousands may be asked about, and most are of other devices.
    if wrapped.params["pk"] != public_key_id(keys.stated_public(wrapped.version)):
        raise WrongKey(
            f"{wrapped} was sealed to another key of that name",
            hint="each device has its own; seal to the recipient file of this one too",
        )
    secret = keys.secret(wrapped.version)
    try:
        return hpke_open(keys.kind.name, secret, wrapped.blob, context)
    finally:
        wipe(secret)


def _derive(keys: KeySet, version: str, salt: bytes, context: bytes) -> bytearray:
    info = bytearray(_LABEL)
    for part in (keys.key.encode(), version.encode(), context):
        # The length of each part before it, so that no two lists of parts read the same.
        info += len(part).to_bytes(4, "big") + part
    derived = bytearray(32)
    secret = keys.secret(version)
    try:
        HKDF(SHA256(), 32, salt, bytes(info)).derive_into(secret, derived)
    finally:
        wipe(secret)
    return derived


def _failed(name: str, error: KeymgmtError) -> Finding:
    return Finding(name, "failed", str(error), error.hint)
