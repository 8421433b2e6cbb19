"""Wrapping and unwrapping with AWS KMS.

A symmetric key binds the context itself: its SHA-256 stands in the encryption context, with the
pairs of the settings. RSA has none, so there the core's InnerKey binds it, and wrapping is done
here with the public key, as anybody does who has the key's recipient file.
"""

from __future__ import annotations

import hashlib
from typing import Final

from keymgmt.backend import (
    RSA_OAEP_256,
    Dek,
    ProviderError,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    inner_unwrap,
    is_key,
    not_held,
    wrap_for,
)
from keymgmt_aws._connection import Connection, Service, member
from keymgmt_aws._keys import Keys, usable
from keymgmt_aws._settings import CONTEXT, MECHANISMS, SYMMETRIC, key_id

__all__ = ["Wrapping"]

_MAX_CIPHERTEXT: Final = 6144
_PARAMS: Final = {SYMMETRIC: (), RSA_OAEP_256: ("pk",)}


class Wrapping:
    """Encrypt and Decrypt for one provider."""

    def __init__(self, name: str, connection: Connection, keys: Keys) -> None:
        self._name, self._connection, self._keys = name, connection, keys
        self._settings = connection.settings

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; two calls, since the key is looked at before."""

        def work(kms: Service) -> WrappedKey:
            info = usable(self._keys.describe(kms, key), "wrap")
            if info.kind != "symmetric":
                return wrap_for(self._keys.recipient(kms, info), dek, context)
            arn, bound = info.detail["arn"], self._bound(context)
            plain = bytes(dek.view())
            answer = kms("encrypt", arn, "encrypt", KeyId=arn, Plaintext=plain, **bound)
            blob = member(answer, "CiphertextBlob", bytes)
            return WrappedKey("aws", key, info.newest, SYMMETRIC, blob)

        return self._connection.run(work)

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider; one call."""
        if not is_key(wrapped.key):
            raise WrongKey("what was wrapped names no key")
        if wrapped.backend != "aws":
            raise WrongKey(f"{wrapped} was not wrapped by AWS KMS")
        native = self._settings.native(wrapped.key)
        if key_id(native) not in (None, wrapped.version):
            raise not_held(wrapped, self._name)
        mechanism = wrapped.mechanism
        if mechanism not in self._settings.allowed(wrapped.key):
            raise UnsupportedOperation(
                f"the config does not allow {mechanism} for the key {wrapped.key!r}",
                hint=f"add it to mechanisms of [providers.{self._name}.keys.{wrapped.key}]"
                if mechanism in MECHANISMS
                else f"known: {', '.join(MECHANISMS)}",
            )

        def work(kms: Service) -> Dek:
            try:
                return self._open(kms, wrapped, context)
            except (UnwrapFailed, UnsupportedOperation):
                self._check_version(kms, wrapped)
                raise

        return self._connection.run(work)

    def _open(self, kms: Service, wrapped: WrappedKey, context: bytes) -> Dek:
        if not set(wrapped.params) <= set(_PARAMS[wrapped.mechanism]):
            raise UnwrapFailed(f"{wrapped} has parameters that its mechanism has not")
        if wrapped.mechanism == SYMMETRIC:
            return self._decrypt(kms, wrapped, wrapped.blob, **self._bound(context))
        oaep = {"EncryptionAlgorithm": "RSAES_OAEP_SHA_256"}
        return inner_unwrap(
            wrapped.blob, context, lambda blob: self._decrypt(kms, wrapped, blob, **oaep)
        )

    def _bound(self, context: bytes) -> dict[str, dict[str, str]]:
        """The encryption context of a symmetric key."""
        pairs = {**self._settings.context, CONTEXT: hashlib.sha256(context).hexdigest()}
        return {"EncryptionContext": pairs}

    def _decrypt(
        self, kms: Service, wrapped: WrappedKey, blob: bytes, **how: str | dict[str, str]
    ) -> Dek:
        if not 1 <= len(blob) <= _MAX_CIPHERTEXT:
            raise UnwrapFailed(f"the blob of {wrapped} has not the length of its kind")
        native = self._settings.native(wrapped.key)
        answer = kms("decrypt", native, "decrypt", KeyId=native, CiphertextBlob=blob, **how)
        if key_id(member(answer, "KeyId", str)) != wrapped.version:
            raise not_held(wrapped, self._name)
        try:
            return Dek(member(answer, "Plaintext", bytes))
        except ValueError as error:
            raise UnwrapFailed(f"what {wrapped} holds is no data key") from error

    def _check_version(self, kms: Service, wrapped: WrappedKey) -> None:
        """WrongKey where an alias is now that of another key than what was wrapped for.

        Devices may be allowed nothing but Decrypt: then the first answer stands.
        """
        if key_id(self._settings.native(wrapped.key)) is not None:
            return
        try:
            info = self._keys.describe(kms, wrapped.key)
        except ProviderError:
            return
        if info.newest != wrapped.version:
            raise not_held(wrapped, self._name)
