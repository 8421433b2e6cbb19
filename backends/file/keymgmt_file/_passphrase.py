"""A passphrase around each key file: Argon2id gives a key, AES-256-GCM seals the JWK Set.

    {"format": "keymgmt-file-locked/1",
     "kdf": {"name": "argon2id", "salt": ..., "memory_kib": ..., "passes": ..., "lanes": ...},
     "nonce": ..., "ciphertext": ...}

Binary members are base64url. The format, the key's name and ``kdf`` are additional data, so that a
file put under another name, or given weaker parameters, does not open. Parameters read from a file
are bounded before they are used. The derived key is kept for the life of the provider, because
deriving it takes a good part of a second; the passphrase is not.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from keymgmt.backend import AccessDenied, ProviderError, ProviderUnavailable, wipe
from keymgmt_file._jwk import decode, encode

__all__ = ["FORMAT", "Kdf", "Passphrase", "is_locked"]

FORMAT: Final = "keymgmt-file-locked/1"
MAX_MEMORY_KIB: Final = 1 << 20
MAX_PASSES: Final = 10
MAX_LANES: Final = 4
# One open may try thousands of recipients: a wrong passphrase is neither asked for nor derived from
# for each of them, and yet a person who mistyped it is asked again.
ASK_AGAIN_SECONDS: Final = 3.0
_MEMBERS: Final = {"format", "kdf", "nonce", "ciphertext"}


@dataclass(frozen=True)
class Kdf:
    """Argon2id parameters; the defaults are the second choice of RFC 9106, section 4.

    OWASP's minimum is 19 MiB with 2 passes; the first choice of the RFC, 2 GiB, is more than a
    small machine has.
    """

    salt: bytes = field(default_factory=lambda: os.urandom(16))
    memory_kib: int = 64 << 10
    passes: int = 3
    lanes: int = 4

    @classmethod
    def parse(cls, data: Any) -> Kdf:
        """Read the member ``kdf``; ValueError where it is not of its grammar or out of bounds."""
        if set(data) != {"name", "salt", "memory_kib", "passes", "lanes"}:
            raise ValueError("members")
        kdf = cls(decode(data["salt"]), data["memory_kib"], data["passes"], data["lanes"])
        numbers = (kdf.memory_kib, kdf.passes, kdf.lanes)
        if data["name"] != "argon2id" or any(type(number) is not int for number in numbers):
            raise ValueError("type")
        if not (
            16 <= len(kdf.salt) <= 64
            and 1 <= kdf.lanes <= MAX_LANES
            and 8 * kdf.lanes <= kdf.memory_kib <= MAX_MEMORY_KIB
            and 1 <= kdf.passes <= MAX_PASSES
        ):
            raise ValueError("bounds")
        return kdf

    def dump(self) -> dict[str, Any]:
        """The member ``kdf``."""
        return {
            "name": "argon2id",
            "salt": encode(self.salt),
            "memory_kib": self.memory_kib,
            "passes": self.passes,
            "lanes": self.lanes,
        }

    def derive(self, secret: bytearray) -> bytearray:
        """The 32-byte key; the caller wipes it."""
        key = bytearray(32)
        try:
            Argon2id(
                salt=self.salt,
                length=32,
                iterations=self.passes,
                lanes=self.lanes,
                memory_cost=self.memory_kib,
            ).derive_into(secret, key)  # type: ignore[arg-type]  # any buffer will do
        except (MemoryError, UnsupportedAlgorithm) as error:
            raise ProviderUnavailable(
                f"Argon2id with {self.memory_kib >> 10} MiB cannot run here"
            ) from error
        return key


def is_locked(data: Mapping[str, Any]) -> bool:
    """Whether the JSON of a key file is locked with a passphrase."""
    return "ciphertext" in data


class Passphrase:
    """A passphrase and the keys derived from it, for threads and forks alike.

    Args:
        read: fetches the passphrase when it is needed; None where none is configured.
        provider: the operator's name for the provider, for messages.
    """

    def __init__(self, read: Callable[[], bytearray] | None, provider: str) -> None:
        self._read = read
        self._provider = provider
        self._keys: dict[Kdf, bytearray] = {}
        self._proven: set[Kdf] = set()
        self._failed: dict[Kdf, float] = {}
        # One lock for each process: a fork may copy this one while another thread holds it.
        self._locks: dict[int, threading.Lock] = {}

    @property
    def configured(self) -> bool:
        """Whether there is a passphrase at all."""
        return self._read is not None

    def open(self, key: str, data: Mapping[str, Any]) -> bytearray:
        """Decrypt the JSON of a locked key file; the caller wipes it.

        Raises:
            AccessDenied: no passphrase is configured, or it is wrong.
            ProviderError: the file is damaged.
        """
        kdf, nonce, sealed = _parse(key, data)
        content = bytearray(len(sealed) - 16)
        derived = self._derive(kdf)
        try:
            AESGCM(derived).decrypt_into(nonce, sealed, _bound(key, kdf), content)
        except InvalidTag:
            wipe(content)
            if kdf not in self._proven:
                self._failed.setdefault(kdf, time.monotonic())
            raise AccessDenied(
                f"the key file of {key!r} does not open with this passphrase",
                hint="try the right one; a file that was damaged or renamed looks the same",
            ) from None
        finally:
            wipe(derived)
        self._proven.add(kdf)
        return content

    def seal(self, key: str, content: bytes | bytearray, kdf: Kdf) -> bytes:
        """Encrypt a JWK Set into the JSON of a locked key file."""
        nonce = os.urandom(12)
        derived = self._derive(kdf)
        try:
            sealed = AESGCM(derived).encrypt(nonce, content, _bound(key, kdf))
        finally:
            wipe(derived)
        data = {
            "format": FORMAT,
            "kdf": kdf.dump(),
            "nonce": encode(nonce),
            "ciphertext": encode(sealed),
        }
        return json.dumps(data, indent=1).encode() + b"\n"

    def close(self) -> None:
        """Wipe the derived keys."""
        with self._lock():
            for kdf in list(self._keys):
                self._drop(kdf)
            self._proven.clear()

    def _lock(self) -> threading.Lock:
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def _derive(self, kdf: Kdf) -> bytearray:
        # A copy, so that a close in another thread cannot turn a key in use into zeros.
        with self._lock():
            failed = self._failed.get(kdf)
            if kdf in self._proven or failed is None:
                self._failed.pop(kdf, None)
            elif time.monotonic() - failed > ASK_AGAIN_SECONDS:
                self._drop(kdf)
            if kdf not in self._keys:
                self._keys[kdf] = self._ask(kdf)
            return bytearray(self._keys[kdf])

    def _ask(self, kdf: Kdf) -> bytearray:
        if self._read is None:
            raise AccessDenied(
                f"the keys of {self._provider!r} are locked with a passphrase",
                hint=f"say where it is, in [providers.{self._provider}]: "
                'passphrase = { prompt = "Passphrase" }',
            )
        secret = self._read()
        try:
            return kdf.derive(secret)
        finally:
            wipe(secret)

    def _drop(self, kdf: Kdf) -> None:
        wipe(self._keys.pop(kdf, bytearray()))
        self._failed.pop(kdf, None)


def _parse(key: str, data: Mapping[str, Any]) -> tuple[Kdf, bytes, bytes]:
    try:
        kdf = Kdf.parse(data["kdf"])
        nonce, sealed = decode(data["nonce"]), decode(data["ciphertext"])
        whole = set(data) == _MEMBERS and len(nonce) == 12 and len(sealed) >= 16
    except (ValueError, LookupError, TypeError, AttributeError):
        whole = False
    if not whole or data["format"] != FORMAT:
        raise ProviderError(
            f"the locked key file of {key!r} is damaged, of another format, or asks for more than "
            f"{MAX_MEMORY_KIB >> 10} MiB, {MAX_PASSES} passes or {MAX_LANES} lanes",
            hint="put it back from a backup",
        )
    return kdf, nonce, sealed


def _bound(key: str, kdf: Kdf) -> bytes:
    return json.dumps([FORMAT, key, kdf.dump()], sort_keys=True).encode()
