"""All values that are computed from the data key, and the context that a wrap is bound to.

A derived key is HKDF-Expand-SHA-384 (RFC 5869, section 2.3) with the data key, which is uniform,
as PRK. The info, and every hashed input, is a list of byte strings, each behind its length in 4
bytes, big-endian, so that no two lists give the same bytes; the first is the format's name.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from keymgmt._crypto.dek import wipe
from keymgmt.sealed.manifest import FORMAT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

    from keymgmt._crypto.dek import Dek

__all__ = ["commitment", "device_key", "file_key", "keys_mac", "payload_aad", "wrap_context"]

_KEY: Final = 32  # of FLOE
_HASH: Final = 48  # of SHA-384
_FORMAT: Final = len(FORMAT).to_bytes(4, "big") + FORMAT.encode()


def _encode(*parts: bytes) -> bytes:
    encoded = _FORMAT
    for part in parts:
        encoded += len(part).to_bytes(4, "big") + part
    return encoded


def _derive(dek: Dek, length: int, *parts: bytes) -> bytearray:
    key = bytearray(length)
    HKDFExpand(SHA384(), length, _encode(*parts)).derive_into(dek.view(), key)
    return key


def commitment(dek: Dek, model_id: bytes) -> bytes:
    """48 public bytes that bind the manifest, and so its signatures, to the data key."""
    return bytes(_derive(dek, _HASH, b"commitment", model_id))


def file_key(dek: Dek, model_id: bytes, path: str) -> bytearray:
    """The FLOE key of one file, 32 bytes; the caller wipes it."""
    return _derive(dek, _KEY, b"file", model_id, path.encode())


def payload_aad(model_id: bytes, path: str) -> bytes:
    """The FLOE associated data of one file."""
    return _encode(b"payload", model_id, path.encode())


def device_key(dek: Dek, manifest_hash: bytes, secret: Buffer, info: bytes) -> bytearray:
    """A key of 32 bytes that needs both the data key and a secret of this device; to be wiped.

    HKDF-SHA-384 (RFC 5869) with the secret as salt. It is no part of the format, since no other
    device reads anything that is encrypted under it.
    """
    derived, key = _derive(dek, _HASH, b"device", manifest_hash), bytearray(_KEY)
    try:
        HKDF(SHA384(), _KEY, bytes(secret), info).derive_into(derived, key)
    finally:
        wipe(derived)
    return key


def keys_mac(dek: Dek, model_id: bytes, policy: Iterable[Buffer]) -> bytes:
    """HMAC-SHA-384 over the canonical keys.json, in parts, without its member ``mac``."""
    key = _derive(dek, _HASH, b"keys mac", model_id)
    try:
        mac = hmac.new(key, digestmod="sha384")
        for part in policy:
            mac.update(part)
        return mac.digest()
    finally:
        wipe(key)


@functools.lru_cache(1024)  # it is asked for again at each step
def wrap_context(manifest_hash: bytes, nonce: bytes, count: int, index: int) -> bytes:
    """The context of share ``index`` in a group of ``count`` shares, 48 bytes."""
    position = count.to_bytes(2, "big") + index.to_bytes(2, "big")
    return hashlib.sha384(_encode(b"wrap", manifest_hash, nonce, position)).digest()
