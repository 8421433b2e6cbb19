"""Everything that is computed from the data key, and what a wrap is bound to.

A derived key is HKDF-Expand-SHA-256 (RFC 5869, section 2.3) with the data key, which is uniform,
as PRK. The info, and every hashed input, is a list of byte strings, each behind its length in 4
bytes, big-endian, so that no two lists give the same bytes; the first is the format's name.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from keymgmt._dek import wipe
from keymgmt.sealed.manifest import FORMAT

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from keymgmt._dek import Dek

__all__ = ["commitment", "device_key", "file_key", "keys_mac", "payload_aad", "wrap_context"]

_LENGTH: Final = 32


def _encode(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in (FORMAT.encode(), *parts))


def _derive(dek: Dek, *parts: bytes) -> bytearray:
    key = bytearray(_LENGTH)
    HKDFExpand(SHA256(), _LENGTH, _encode(*parts)).derive_into(dek.view(), key)
    return key


def commitment(dek: Dek, model_id: bytes) -> bytes:
    """32 public bytes that bind the manifest, and so its signatures, to the data key."""
    return bytes(_derive(dek, b"commitment", model_id))


def file_key(dek: Dek, model_id: bytes, path: str) -> bytearray:
    """The FLOE key of one file, 32 bytes; the caller wipes it."""
    return _derive(dek, b"file", model_id, path.encode())


def payload_aad(model_id: bytes, path: str) -> bytes:
    """The FLOE associated data of one file."""
    return _encode(b"payload", model_id, path.encode())


def device_key(dek: Dek, manifest_hash: bytes, secret: Buffer, info: bytes) -> bytearray:
    """32 bytes that take the data key of this manifest and a secret of the device; to be wiped.

    HKDF-SHA-256 (RFC 5869) with the secret as salt; no part of the format: nothing that another
    device reads is under it.
    """
    ours, key = _derive(dek, b"device", manifest_hash), bytearray(_LENGTH)
    try:
        HKDF(SHA256(), _LENGTH, bytes(secret), info).derive_into(ours, key)
    finally:
        wipe(ours)
    return key


def keys_mac(dek: Dek, model_id: bytes, policy: bytes) -> bytes:
    """HMAC-SHA-256 over the canonical keys.json without its member ``mac``."""
    key = _derive(dek, b"keys mac", model_id)
    try:
        return hmac.digest(key, policy, "sha256")
    finally:
        wipe(key)


def wrap_context(manifest_hash: bytes, nonce: bytes, count: int, index: int) -> bytes:
    """What share ``index`` of a group of ``count`` is bound to when it is wrapped, 32 bytes."""
    place = count.to_bytes(2, "big") + index.to_bytes(2, "big")
    return hashlib.sha256(_encode(b"wrap", manifest_hash, nonce, place)).digest()
