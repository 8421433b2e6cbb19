"""Wrapping under one version of a key; SPEC.md of the core, section 5, specifies the mechanisms."""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from keymgmt.backend import (
    DEK_LENGTH,
    Dek,
    Recipient,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    hpke_open,
    public_key_id,
    wipe,
    wrap_for,
)
from keymgmt_file._jwk import KeySet

__all__ = ["BACKEND", "recipient", "unwrap", "wrap"]

BACKEND: Final = "file"
_SALT: Final = 32
_BLOB: Final = _SALT + DEK_LENGTH + 16
_LABEL: Final = b"keymgmt-file wrap 1"
_RECOGNISER: Final = b"keymgmt-file recogniser 1"


def recipient(keys: KeySet) -> Recipient:
    """The public part of the newest version of a key of an HPKE kind."""
    version = keys.newest
    return Recipient(keys.kind.name, BACKEND, keys.key, version, keys.hpke_public(version))


def wrap(keys: KeySet, dek: Dek, context: bytes) -> WrappedKey:
    """Wrap under the newest version."""
    if keys.kind.is_hpke:
        return wrap_for(recipient(keys), dek, context)
    version, salt = keys.newest, os.urandom(_SALT)
    with keys.secret(version) as secret:
        recogniser = _recogniser(secret, salt)
        derived = _derive(secret, keys.key, version, salt, context)
    try:
        # A fixed nonce is safe, because the derived key encrypts only this message.
        sealed = AESGCM(derived).encrypt(bytes(12), dek.view(), context)
    finally:
        wipe(derived)
    params = {"recogniser": recogniser}
    return WrappedKey(BACKEND, keys.key, version, keys.kind.marks["alg"], salt + sealed, params)


def unwrap(keys: KeySet, wrapped: WrappedKey, context: bytes) -> Dek:
    """Unwrap with the version that ``wrapped`` names, which must be in ``keys``.

    Raises:
        UnsupportedOperation: the mechanism is not that of the key.
        WrongKey: the wrap is for another key of that name.
        UnwrapFailed: the wrap does not authenticate.
    """
    if wrapped.mechanism != keys.kind.marks["alg"]:
        raise UnsupportedOperation(
            f"the key {wrapped.key!r} is {keys.kind.name} and does not unwrap {wrapped.mechanism}"
        )
    if set(wrapped.params) != {"pk" if keys.kind.is_hpke else "recogniser"}:
        raise UnwrapFailed(f"{wrapped} is malformed")
    return (_unwrap_hpke if keys.kind.is_hpke else _unwrap_aes)(keys, wrapped, context)


def _unwrap_aes(keys: KeySet, wrapped: WrappedKey, context: bytes) -> Dek:
    if len(wrapped.blob) != _BLOB:
        raise UnwrapFailed(f"{wrapped} is malformed")
    salt, sealed = wrapped.blob[:_SALT], wrapped.blob[_SALT:]
    with keys.secret(wrapped.version) as secret:
        if wrapped.params["recogniser"] != _recogniser(secret, salt):
            raise WrongKey(
                f"{wrapped} was wrapped by another key of that name",
                hint="each directory has its own key; put the right key file here, or seal to this "
                "key too",
            )
        derived = _derive(secret, keys.key, wrapped.version, salt, context)
    plain = bytearray(DEK_LENGTH)
    try:
        AESGCM(derived).decrypt_into(bytes(12), sealed, context, plain)
        return Dek(plain)
    except InvalidTag as error:
        raise UnwrapFailed(
            f"{wrapped} does not authenticate",
            hint="it was damaged, or bound to another model",
        ) from error
    finally:
        # After a failure decrypt_into leaves unverified bytes in ``plain``.
        wipe(plain)
        wipe(derived)


def _unwrap_hpke(keys: KeySet, wrapped: WrappedKey, context: bytes) -> Dek:
    # The stated public key is compared, and not a derived one: a model may have thousands of
    # recipients, most of them other devices.
    if wrapped.params["pk"] != public_key_id(keys.stated_public(wrapped.version)):
        raise WrongKey(
            f"{wrapped} is for another key of that name",
            hint="each device has its own key; seal to the recipient file of this device too",
        )
    with keys.secret(wrapped.version) as secret:
        return hpke_open(keys.kind.name, secret, wrapped.blob, context)


def _recogniser(secret: bytearray, salt: bytes) -> str:
    """A value by which the holder of the key recognises its wraps; to others it looks random."""
    return HKDFExpand(SHA384(), 8, _RECOGNISER + salt).derive(secret).hex()


def _derive(secret: bytearray, key: str, version: str, salt: bytes, context: bytes) -> bytearray:
    info = bytearray(_LABEL)
    for part in (key.encode(), version.encode(), context):
        # Each part has its length in front, so that no two lists of parts give the same bytes.
        info += len(part).to_bytes(4, "big") + part
    derived = bytearray(32)
    HKDF(SHA384(), 32, salt, bytes(info)).derive_into(secret, derived)
    return derived
