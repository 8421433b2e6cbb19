"""A passphrase for a key directory: it opens ``passphrase.json``, whose key opens the key files.

A *locked file* is encrypted with AES-256-GCM. Its name is additional data, so that a renamed file
does not open; ``sealed`` is nonce, ciphertext and tag in base64:

    {"format": "keymgmt-file-locked/1", "sealed": ...}

``passphrase.json`` is such a file. Its content is the *key-encryption key*, 32 random bytes, under
which the key files are encrypted. It is itself encrypted under Argon2id of the passphrase, with the
parameters in its further member ``kdf``:

    {"name": "argon2id", "salt": ..., "memory_kib": ..., "passes": ..., "lanes": ...}

Parameters from a file are bounded before they are used. Argon2id takes a good part of a second, so
the key-encryption key is kept for the life of the provider; the passphrase is not kept.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import threading
import time
from typing import Any, Final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    ForkSafe,
    FormatError,
    JsonReader,
    ProviderUnavailable,
    SecretSource,
    wipe,
)
from keymgmt_file._errors import damaged
from keymgmt_file._jwk import MAX_FILE, read_json

__all__ = ["KEK_FILE", "Passphrase", "decrypt_file", "encrypt_file"]

KEK_FILE: Final = "passphrase.json"
FORMAT: Final = "keymgmt-file-locked/1"
# KiB of memory, passes, lanes: the second choice of RFC 9106, section 4. OWASP's minimum is 19 MiB
# with 2 passes; the first choice of the RFC, 2 GiB, is more than a small machine has.
NEW_KDF: Final = (64 << 10, 3, 4)
MAX_KDF: Final = (1 << 20, 10, 4)
# The least characters of a password that is the only factor (NIST SP 800-63B-4, 3.1.1.2), as this
# passphrase is against somebody with a copy of the directory.
LEAST: Final = 15
# One open may try thousands of recipients. So for some seconds a wrong passphrase is neither asked
# for nor derived again; after that, a person who mistyped it is asked again.
ASK_AGAIN_SECONDS: Final = 3.0
_NONCE: Final = 12
_TAG: Final = 16


class Passphrase(ForkSafe):
    """A passphrase, and the key-encryption key that it opened, for threads and forks alike.

    Args:
        source: the source of the passphrase; None where none is configured.
        provider: the name of the provider, for messages.
        command: the command of ``keymgmt file`` that accepts ``--weak``, for messages.

    Attributes:
        weak: whether keys may be locked with fewer than ``LEAST`` characters. Opening accepts any
            passphrase.
    """

    def __init__(self, source: SecretSource | None, provider: str, command: str = "lock") -> None:
        self.source = source
        self.weak = False
        self._provider = provider
        self._command = command
        # The content of passphrase.json with the key in it, or with the time of a wrong passphrase.
        self._opened: tuple[bytes, bytearray] | None = None
        self._refused: tuple[bytes, float] | None = None
        super().__init__()

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def open(self, content: bytes) -> bytearray:
        """The key-encryption key in the ``content`` of ``passphrase.json``; the caller wipes it.

        Raises:
            AccessDenied: no passphrase is configured, or it is wrong.
            ProviderError: the file is damaged.
        """
        with self._lock:
            if self._opened is None or self._opened[0] != content:
                refused, when = self._refused or (b"", 0.0)
                if refused == content and time.monotonic() - when <= ASK_AGAIN_SECONDS:
                    raise _wrong()
                self._forget()
                reader = read_json(content, KEK_FILE)
                kdf = _kdf(reader)
                derived = _derive(kdf, self._ask())
                kek = decrypt_file(KEK_FILE, reader, derived)
                wipe(derived)
                if kek is None:
                    self._refused = content, time.monotonic()
                    raise _wrong()
                self._opened = content, kek
            # A copy, since a close in another thread wipes the original.
            return bytearray(self._opened[1])

    def make(self, kek: bytearray) -> bytes:
        """The content of a ``passphrase.json`` that holds ``kek`` under this passphrase.

        Raises:
            AccessDenied: no passphrase is configured.
            ConfigError: the passphrase is too short, or the second one that was typed differs.
        """
        kdf: dict[str, Any] = dict(zip(("memory_kib", "passes", "lanes"), NEW_KDF, strict=True))
        kdf |= {"name": "argon2id", "salt": base64.b64encode(os.urandom(16)).decode()}
        derived = _derive(_kdf(JsonReader({"kdf": kdf}, KEK_FILE)), self._ask_new())
        content = encrypt_file(KEK_FILE, kek, derived, kdf=kdf)
        wipe(derived)
        with self._lock:
            self._forget()
            self._opened = content, bytearray(kek)
        return content

    def close(self) -> None:
        """Wipe the key-encryption key."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        if self._opened is not None:
            wipe(self._opened[1])
        self._opened = self._refused = None

    def _ask(self) -> bytearray:
        if self.source is None:
            raise AccessDenied(
                f"the keys of {self._provider!r} are locked with a passphrase",
                hint=f"name its source in [providers.{self._provider}]: "
                'passphrase = { prompt = "Passphrase" }',
            )
        return self.source.read()

    def _ask_new(self) -> bytearray:
        secret = self._ask()
        try:
            self._check_new(secret)
        except BaseException:
            wipe(secret)
            raise
        return secret

    def _check_new(self, secret: bytearray) -> None:
        # Continuation bytes of UTF-8 are not counted, so this is the number of characters.
        if not self.weak and sum(byte & 0xC0 != 0x80 for byte in secret) < LEAST:
            raise ConfigError(
                f"the passphrase is shorter than {LEAST} characters",
                hint="use several words; to lock with this passphrase all the same: "
                f"keymgmt file {self._command} {self._provider} --weak",
            )
        if self.source is not None and self.source.prompt:
            # A mistyped new passphrase would lock the keys for ever, so it is typed twice.
            second = SecretSource(prompt=f"{self.source.prompt}, again").read()
            same = hmac.compare_digest(secret, second)
            wipe(second)
            if not same:
                raise ConfigError(
                    "the two passphrases differ", hint="nothing was changed; try again"
                )


def encrypt_file(name: str, content: bytearray, key: bytearray, **members: Any) -> bytes:
    """Encrypt the content of the file ``name``."""
    nonce = os.urandom(_NONCE)
    sealed = nonce + AESGCM(key).encrypt(nonce, content, f"{FORMAT} {name}".encode())
    text = base64.b64encode(sealed).decode()
    return json.dumps({"format": FORMAT, **members, "sealed": text}, indent=1).encode()


def decrypt_file(name: str, reader: JsonReader, key: bytearray) -> bytearray | None:
    """Decrypt the file ``name``; None if it does not open. The caller wipes the content."""
    try:
        reader.version(FORMAT, "")
        sealed = reader.base64("sealed", limit=MAX_FILE)
        reader.end()
        content = bytearray(len(sealed) - _NONCE - _TAG)
        bound = f"{FORMAT} {name}".encode()
        AESGCM(key).decrypt_into(sealed[:_NONCE], sealed[_NONCE:], bound, content)
    except (FormatError, InvalidTag, ValueError):  # ValueError: too short for nonce and tag
        return None
    return content


def _kdf(reader: JsonReader) -> Argon2id:
    """Read the member ``kdf``; ProviderError if it is malformed or out of bounds."""
    try:
        members = JsonReader(reader.members("kdf"), "kdf")
        name, salt = members.text("name", limit=16), members.base64("salt", limit=64)
        lanes = members.integer("lanes", least=1, most=MAX_KDF[2])
        memory = members.integer("memory_kib", least=8 * lanes, most=MAX_KDF[0])
        passes = members.integer("passes", least=1, most=MAX_KDF[1])
        members.end()
        if name == "argon2id" and len(salt) >= 16:
            return Argon2id(
                salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory
            )
    except UnsupportedAlgorithm as error:
        raise ProviderUnavailable(
            "the OpenSSL of this Python has no Argon2id", hint="install a newer cryptography"
        ) from error
    except FormatError as error:
        raise damaged(f"{KEK_FILE} ({error})") from error
    raise damaged(KEK_FILE)


def _derive(kdf: Argon2id, secret: bytearray) -> bytearray:
    """The 32-byte key of the passphrase ``secret``, which is wiped; the caller wipes the key."""
    key = bytearray(32)
    try:
        kdf.derive_into(secret, key)  # type: ignore[arg-type]  # any buffer will do
    except MemoryError as error:
        raise ProviderUnavailable("there is not enough memory for Argon2id") from error
    finally:
        wipe(secret)
    return key


def _wrong() -> AccessDenied:
    return AccessDenied(
        "the key directory does not open with this passphrase",
        hint=f"look at the passphrase; with a damaged {KEK_FILE} the error is the same",
    )
