"""How a data key is wrapped by each type of Transit key, and the ciphertexts that Transit makes.

A key type with additional data binds the context itself (``associated_data``). RSA has none, so
there the core's InnerKey does. The blob of an AEAD type is Transit's ciphertext as it stands, so
``bao write transit/decrypt/NAME ciphertext=... associated_data=...`` opens it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal

__all__ = [
    "AEAD",
    "CIPHERTEXT",
    "KINDS",
    "MECHANISMS",
    "RSA",
    "ciphertext_version",
    "has_inner",
    "mechanism_of",
]

AEAD: Final = ("aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305")
RSA: Final = ("rsa-2048", "rsa-3072", "rsa-4096")
_INNER: Final = "rsa-oaep-sha256+inner"
MECHANISMS: Final = (*AEAD, _INNER)
KINDS: Final[Mapping[str, Literal["wrap", "sign"]]] = {
    **dict.fromkeys(AEAD, "wrap"),
    **dict.fromkeys(RSA, "wrap"),
    "ed25519": "sign",
    "ecdsa-p256": "sign",
    "ecdsa-p384": "sign",
}
"""Transit key types that are of use: what each is for, if the config says nothing else."""

CIPHERTEXT: Final = re.compile(r"vault:v([1-9][0-9]{0,8}):[A-Za-z0-9+/]{4,8000}={0,2}")


def mechanism_of(kind: str) -> str | None:
    """The mechanism of a Transit key type, or None where the type does not wrap."""
    if kind in RSA:
        return _INNER
    return kind if kind in AEAD else None


def has_inner(mechanism: str) -> bool:
    """Whether the mechanism binds its context through the core's InnerKey."""
    return mechanism == _INNER


def ciphertext_version(text: str) -> str | None:
    """The key version that a Transit ciphertext names, or None where it is none."""
    match = CIPHERTEXT.fullmatch(text)
    return match[1] if match else None
