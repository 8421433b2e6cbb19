"""Wrapping and unwrapping with AWS KMS.

A symmetric key binds keymgmt's context itself: its SHA-256 stands in the encryption context, with
the pairs of the settings. RSA has no encryption context, so the core's InnerKey binds it; wrapping
is done here with the public key, as by anybody who has the key's recipient file.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

from keymgmt.backend import (
    RSA_OAEP_256,
    Dek,
    ProviderError,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    check_backend,
    check_mechanism,
    inner_unwrap,
    not_held,
    wrap_for,
)
from keymgmt_aws._connection import Service, member
from keymgmt_aws._keys import Keys, usable
from keymgmt_aws._settings import CONTEXT, MECHANISMS, SYMMETRIC, AwsSettings, key_id

__all__ = ["Wrapping"]

_MAX_CIPHERTEXT: Final = 6144
_PARAMS: Final = {SYMMETRIC: set[str](), RSA_OAEP_256: {"pk"}}
_OAEP: Final = {"EncryptionAlgorithm": "RSAES_OAEP_SHA_256"}


class Wrapping:
    """Encrypt and Decrypt for one provider."""

    def __init__(self, name: str, settings: AwsSettings, keys: Keys) -> None:
        self._name, self._settings, self._keys = name, settings, keys

    def wrap(self, kms: Service, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; takes two calls, since the key is described first."""
        info = usable(self._keys.describe(kms, key), "wrap")
        if info.kind != "symmetric":
            return wrap_for(self._keys.recipient(kms, info), dek, context)
        arn, plain, bound = info.detail["arn"], bytes(dek.view()), self._bound(context)
        answer = kms("encrypt", arn, "encrypt", KeyId=arn, Plaintext=plain, **bound)
        blob = member(answer, "CiphertextBlob", bytes)
        return WrappedKey("aws", key, info.newest, SYMMETRIC, blob)

    def unwrap(self, kms: Service, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider; one call, or none if by the settings the wrap is of another key."""
        key, mechanism = wrapped.key, wrapped.mechanism
        check_backend(wrapped, "aws")
        native = self._settings.native(key)
        if key_id(native) not in (None, wrapped.version):
            raise not_held(wrapped, self._name)
        check_mechanism(wrapped, self._settings.allowed(key), MECHANISMS, self._name)
        try:
            if mechanism == SYMMETRIC:
                return self._decrypt(kms, wrapped, wrapped.blob, self._bound(context))
            return inner_unwrap(
                wrapped.blob, context, lambda blob: self._decrypt(kms, wrapped, blob, _OAEP)
            )
        except (UnwrapFailed, UnsupportedOperation) as error:
            # If the alias belongs to another key by now, that is the reason. A device that may only
            # decrypt cannot describe the key; there the first error is raised.
            if key_id(native) is None and self._newest(kms, key) not in (None, wrapped.version):
                raise not_held(wrapped, self._name) from error
            raise

    def _bound(self, context: bytes) -> dict[str, dict[str, str]]:
        """The encryption context of a symmetric key."""
        pairs = {**self._settings.context, CONTEXT: hashlib.sha256(context).hexdigest()}
        return {"EncryptionContext": pairs}

    def _decrypt(
        self, kms: Service, wrapped: WrappedKey, blob: bytes, parameters: dict[str, Any]
    ) -> Dek:
        if len(blob) > _MAX_CIPHERTEXT or not set(wrapped.params) <= _PARAMS[wrapped.mechanism]:
            raise UnwrapFailed(f"{wrapped} is too long, or has parameters of another mechanism")
        native = self._settings.native(wrapped.key)
        answer = kms("decrypt", native, "decrypt", KeyId=native, CiphertextBlob=blob, **parameters)
        if key_id(member(answer, "KeyId", str)) != wrapped.version:
            raise not_held(wrapped, self._name)
        try:
            return Dek(member(answer, "Plaintext", bytes))
        except ValueError as error:
            raise UnwrapFailed(f"the content of {wrapped} is not a data key") from error

    def _newest(self, kms: Service, key: str) -> str | None:
        try:
            return self._keys.describe(kms, key).newest
        except ProviderError:
            return None
