"""A key service in memory, for tests that need a provider and no key service.

It works as a real key service does: AES-256-GCM under KEKs that it keeps, versions, signatures, and
failures on demand. **Its KEKs are made from their names, so they protect nothing.** Therefore a
forked or spawned process sees the same service; keys that are created while it runs exist in this
process only.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import Field

from keymgmt.backend import (
    ANCHOR_START,
    DEK_LENGTH,
    AccessDenied,
    ConfigError,
    Dek,
    Finding,
    Health,
    KeyInfo,
    KeymgmtError,
    KeyNotFound,
    KeyProvider,
    KeyRetired,
    KeyVersion,
    ProviderError,
    ProviderUnavailable,
    Settings,
    Signature,
    SupportsAnchor,
    SupportsBatchUnwrap,
    SupportsBatchWrap,
    SupportsKeyDeletion,
    SupportsKeyManagement,
    SupportsSigning,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    anchor_after,
    check_key,
    no_version,
    wipe,
)

__all__ = ["MemoryProvider", "MemoryService", "MemorySettings"]

MECHANISM: Final = "A256GCM"
_NONCE: Final = 12


@dataclass
class _Key:
    purpose: Literal["wrap", "sign"]
    versions: int = 1
    retired: set[int] = field(default_factory=set)


class MemoryService:
    """A key service of this process, found by name, with switches for failures.

    Attributes:
        up: False refuses every call.
        answering: False lets every call wait for an answer.
        denied: users that the service refuses.
        epoch: raising this number ends every login.
    """

    _all: ClassVar[dict[str, MemoryService]] = {}

    def __init__(self, name: str) -> None:
        """Make an empty service; ``find`` is how providers reach one."""
        self.name = name
        self.keys: dict[str, _Key] = {}
        self.denied: set[str] = set()
        self.epoch = 0
        self.anchor = ANCHOR_START
        self.up = True
        self.answering = True

    @classmethod
    def find(cls, name: str) -> MemoryService:
        """The service of that name, made on first use."""
        # There is no lock in this class: a child that is forked while it is held would wait for it
        # for ever.
        return cls._all.setdefault(name, cls(name))

    def wait(self, seconds: float) -> bool:
        """Wait for an answer, at most ``seconds``; whether there is one."""
        end = time.monotonic() + seconds
        while not self.answering and time.monotonic() < end:
            time.sleep(0.01)
        return self.answering

    def secret(self, key: str, version: int) -> bytes:
        """32 bytes that anybody who knows the names can make again."""
        return hashlib.sha256(f"{self.name}/{key}/{version}".encode()).digest()


class MemorySettings(Settings):
    """``[providers.NAME]`` of a provider in memory.

    Attributes:
        service: name of the service.
        user: who logs in.
        keys: wrapping keys that the service has from the start.
        timeout: time limit of a call, in seconds.
    """

    service: str = "memory"
    user: str = "somebody"
    keys: list[str] = Field(default_factory=list)
    timeout: float = 5.0


class MemoryProvider(
    KeyProvider[MemorySettings],
    SupportsKeyManagement,
    SupportsKeyDeletion,
    SupportsSigning,
    SupportsBatchUnwrap,
    SupportsBatchWrap,
    SupportsAnchor,
):
    """A provider of a MemoryService. For tests only: it protects nothing."""

    backend: ClassVar[str] = "memory"
    Settings: ClassVar[type[MemorySettings]] = MemorySettings
    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]] = {
        "aes256": "wrap",
        "ed25519": "sign",
    }

    _login: int | None = None

    def login(self, service: MemoryService) -> int:
        """Ask the service for a login; AccessDenied where it refuses the user."""
        if self.settings.user in service.denied:
            raise AccessDenied(f"the user {self.settings.user!r} is refused")
        return service.epoch

    @property
    def service(self) -> MemoryService:
        """The service, reached and logged in at on every call."""
        service = MemoryService.find(self.settings.service)
        if not service.wait(self.settings.timeout):
            raise ProviderUnavailable(f"no answer within {self.settings.timeout:g} seconds")
        if not service.up:
            raise ProviderUnavailable("the service is down")
        if self._login != service.epoch:
            self._login = self.login(service)
        for key in self.settings.keys:
            service.keys.setdefault(key, _Key("wrap"))
        return service

    def _key(self, service: MemoryService, key: str, purpose: str | None = None) -> _Key:
        entry = service.keys.get(check_key(key))
        if entry is None:
            raise KeyNotFound(f"no key named {key!r}")
        if purpose and entry.purpose != purpose:
            raise UnsupportedOperation(f"the key {key!r} does not {purpose}")
        return entry

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider."""
        service = self.service
        version = self._key(service, key, "wrap").versions
        nonce = os.urandom(_NONCE)
        cipher = AESGCM(service.secret(key, version))
        blob = nonce + cipher.encrypt(nonce, dek.view(), context)
        return WrappedKey(self.backend, key, str(version), MECHANISM, blob)

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider."""
        service = self.service
        if wrapped.backend != self.backend:
            raise WrongKey(f"{wrapped} is not of the backend {self.backend!r}")
        entry = service.keys.get(check_key(wrapped.key))
        versions = range(1, entry.versions + 1) if entry else ()
        version = next((v for v in versions if str(v) == wrapped.version), None)
        if entry is None or version is None:
            raise WrongKey(f"{wrapped} is not here")
        if version in entry.retired:
            raise KeyRetired(f"{wrapped} is retired")
        if wrapped.mechanism != MECHANISM or entry.purpose != "wrap":
            raise UnsupportedOperation(f"{wrapped} does not unwrap {wrapped.mechanism}")
        if len(wrapped.blob) != _NONCE + DEK_LENGTH + 16 or wrapped.params:
            raise UnwrapFailed(
                f"the wrapped key has the wrong length, or params, for {wrapped.mechanism}"
            )
        nonce, sealed = wrapped.blob[:_NONCE], wrapped.blob[_NONCE:]
        plain = bytearray(DEK_LENGTH)
        try:
            AESGCM(service.secret(wrapped.key, version)).decrypt_into(nonce, sealed, context, plain)
            return Dek(plain)
        except InvalidTag as error:
            raise UnwrapFailed("the wrapped key does not authenticate") from error
        finally:
            wipe(plain)

    def unwrap_batch(
        self, items: Sequence[tuple[WrappedKey, bytes]]
    ) -> Sequence[Dek | ProviderError]:
        """See SupportsBatchUnwrap."""
        answers: list[Dek | ProviderError] = []
        for wrapped, context in items:
            try:
                answers.append(self.unwrap(wrapped, context))
            except ProviderError as error:
                answers.append(error)
        return answers

    def wrap_batch(
        self, key: str, items: Sequence[tuple[Dek, bytes]]
    ) -> Sequence[WrappedKey | ProviderError]:
        """See SupportsBatchWrap."""
        return [self.wrap(key, dek, context) for dek, context in items]

    def anchor(self) -> bytes:
        """See SupportsAnchor."""
        return self.service.anchor

    def move_anchor(self, value: bytes, step: bytes) -> None:
        """See SupportsAnchor."""
        after = anchor_after(value, step)
        if self.service.anchor not in (value, after):
            raise AccessDenied("the anchor has another value")
        self.service.anchor = after

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider."""
        try:
            service = self.service
            if key is not None:
                self._key(service, key)
                if service.keys[key].purpose == "wrap":
                    with Dek.generate() as dek:
                        self.unwrap(self.wrap(key, dek, b"check"), b"check").wipe()
        except KeymgmtError as error:
            return Health((Finding.failure("service", error),))
        return Health((Finding("service", "ok", f"memory {service.name}"),))

    def _info(self, name: str, key: _Key) -> KeyInfo:
        kind = next(kind for kind, purpose in self.key_kinds.items() if purpose == key.purpose)
        states: list[KeyVersion] = []
        for number in range(1, key.versions + 1):
            old: Literal["active", "old"] = "active" if number == key.versions else "old"
            states.append(KeyVersion(str(number), "retired" if number in key.retired else old))
        return KeyInfo(name, key.purpose, kind, tuple(states))

    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """See SupportsKeyManagement; there are no options."""
        service = self.service
        if check_key(key) in service.keys:
            raise ConfigError(f"the key {key!r} exists")
        if kind not in self.key_kinds:
            raise ConfigError(f"no kind {kind!r}", hint=f"kinds: {', '.join(self.key_kinds)}")
        if options:
            raise ConfigError(f"no option {next(iter(options))!r}")
        service.keys[key] = _Key(self.key_kinds[kind])
        return self._info(key, service.keys[key])

    def list_keys(self) -> list[KeyInfo]:
        """See SupportsKeyManagement."""
        return [self._info(name, key) for name, key in sorted(self.service.keys.items())]

    def describe_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        return self._info(key, self._key(self.service, key))

    def rotate_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        entry = self._key(self.service, key)
        entry.versions += 1
        return self._info(key, entry)

    def retire_version(self, key: str, version: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        entry = self._key(self.service, key)
        number = next((n for n in range(1, entry.versions) if str(n) == version), None)
        if number is None:
            raise ConfigError(f"{key}@{version} is not a version that can be retired")
        entry.retired.add(number)
        return self._info(key, entry)

    def delete_key(self, key: str) -> None:
        """See SupportsKeyDeletion."""
        self._key(self.service, key)
        del self.service.keys[key]

    def _signing_key(self, key: str, version: str | None = None) -> Ed25519PrivateKey:
        service = self.service
        versions = [str(n + 1) for n in range(self._key(service, key, "sign").versions)]
        if version not in (None, *versions):
            raise no_version(key, str(version), versions)
        number = int(version or versions[-1])
        return Ed25519PrivateKey.from_private_bytes(service.secret(key, number))

    def public_key(self, key: str, version: str | None = None) -> bytes:
        """See SupportsSigning; Ed25519."""
        public = self._signing_key(key, version).public_key()
        return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def sign(self, key: str, message: bytes) -> Signature:
        """See SupportsSigning; Ed25519."""
        return Signature(self._signing_key(key).sign(message), self.public_key(key))
