"""InnerKey: context binding for mechanisms that have no additional data of their own.

The backend wraps a fresh random key; AES-256-GCM under that key carries the data key, and the
context is its additional data.

    blob = length of wrapped (2, big-endian) || wrapped || nonce (12) || ciphertext (32) || tag (16)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keymgmt._crypto.dek import DEK_LENGTH, Dek, wipe
from keymgmt.errors import UnwrapFailed

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["inner_unwrap", "inner_wrap"]

_NONCE: Final = 12
_TAIL: Final = _NONCE + DEK_LENGTH + 16


def inner_wrap(dek: Dek, context: bytes, wrap: Callable[[Dek], bytes]) -> bytes:
    """Wrap ``dek`` bound to ``context``, with a ``wrap`` that takes no context.

    ``wrap`` encrypts 32 bytes and returns at most 65535.
    """
    with Dek.generate() as inner:
        wrapped = wrap(inner)
        nonce = os.urandom(_NONCE)
        sealed = AESGCM(inner.view()).encrypt(nonce, dek.view(), context)
    return len(wrapped).to_bytes(2, "big") + wrapped + nonce + sealed


def inner_unwrap(blob: bytes, context: bytes, unwrap: Callable[[bytes], Dek]) -> Dek:
    """Undo ``inner_wrap``; UnwrapFailed where the blob or the context is wrong."""
    length = int.from_bytes(blob[:2], "big")
    if len(blob) < 2 or len(blob) != 2 + length + _TAIL:
        raise UnwrapFailed(
            f"the wrapped key has {len(blob)} bytes, which is the wrong length for its mechanism"
        )
    nonce, sealed = blob[2 + length : 2 + length + _NONCE], blob[2 + length + _NONCE :]
    plain = bytearray(DEK_LENGTH)
    try:
        with unwrap(blob[2 : 2 + length]) as inner:
            AESGCM(inner.view()).decrypt_into(nonce, sealed, context, plain)
        return Dek(plain)
    except InvalidTag as error:
        raise UnwrapFailed("the wrapped key does not authenticate") from error
    finally:
        # decrypt_into leaves unverified bytes behind on failure, and the key on success.
        wipe(plain)
