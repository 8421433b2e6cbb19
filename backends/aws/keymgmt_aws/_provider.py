"""AwsProvider: wrap and unwrap inside AWS Key Management Service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, TypeVar

from keymgmt.backend import (
    Dek,
    Health,
    KeyInfo,
    KeyProvider,
    Recipient,
    Signature,
    SupportsKeyDeletion,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
    WrappedKey,
    bare,
    check_key,
)
from keymgmt_aws import _checks
from keymgmt_aws._connection import Connection, Service
from keymgmt_aws._keys import KINDS, Keys
from keymgmt_aws._settings import AwsSettings
from keymgmt_aws._transport import SLOW
from keymgmt_aws._wrapping import Wrapping

__all__ = ["AwsProvider"]

R = TypeVar("R")


class AwsProvider(
    KeyProvider[AwsSettings],
    SupportsKeyManagement,
    SupportsKeyDeletion,
    SupportsOfflineRecipients,
    SupportsSigning,
):
    """Keys in AWS KMS; they never leave it.

    Example::

        [providers.cloud]
        backend = "aws"
        region = "eu-central-1"
        auth = { method = "instance" }

        [providers.cloud.keys]
        resnet50 = { arn = "arn:aws:kms:eu-central-1:111122223333:key/mrk-..." }

    A machine needs ``kms:Decrypt`` to unwrap; ``kms:DescribeKey`` and ``kms:Encrypt`` to wrap.
    ``keymgmt aws policy`` prints the whole policy for each role.

    The data key passes through HTTP and JSON in strings, which Python cannot wipe; their memory is
    freed and used again. The login is kept in this process until ``close``.
    """

    backend: ClassVar[str] = "aws"
    Settings: ClassVar[type[AwsSettings]] = AwsSettings
    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]] = KINDS
    rotates_unseen: ClassVar[bool] = True

    def __init__(self, name: str, settings: AwsSettings) -> None:
        super().__init__(name, settings)
        self._connection = Connection(settings)
        self._keys = Keys(name, settings)
        self._wrapping = Wrapping(name, settings, self._keys)

    @bare
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; takes two calls, since the key is described first."""
        return self._of(key, lambda kms: self._wrapping.wrap(kms, key, dek, context))

    @bare
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider; takes one call."""
        return self._connection.run(lambda kms: self._wrapping.unwrap(kms, wrapped, context))

    @bare
    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """See SupportsKeyManagement; ``multi-region=yes`` creates a key that can have replicas."""
        return self._of(key, lambda kms: self._keys.create(kms, key, kind, options), SLOW)

    @bare
    def list_keys(self) -> list[KeyInfo]:
        """See SupportsKeyManagement; the log names keys that may not be described."""
        return self._connection.run(self._keys.list, SLOW)

    @bare
    def describe_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement; a key has one version, its key id."""
        return self._of(key, lambda kms: self._keys.describe(kms, key))

    @bare
    def rotate_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement; AWS rotates inside of the key and shows no versions."""
        return self._of(key, lambda kms: self._keys.rotate(kms, key), SLOW)

    @bare
    def retire_version(self, key: str, version: str) -> KeyInfo:
        """See SupportsKeyManagement; always raises UnsupportedOperation, with a hint."""
        return self._of(key, lambda kms: self._keys.refuse_to_retire(kms, key, version))

    @bare
    def delete_key(self, key: str) -> str:
        """See SupportsKeyDeletion; AWS waits 30 days, and the deletion can be cancelled there."""
        return self._of(key, lambda kms: self._keys.delete(kms, key), SLOW)

    @bare
    def export_recipient(self, key: str) -> Recipient:
        """See SupportsOfflineRecipients; only RSA keys have a public part."""
        return self._of(key, lambda kms: self._keys.recipient(kms, self._keys.describe(kms, key)))

    @bare
    def public_key(self, key: str, version: str | None = None) -> bytes:
        """See SupportsSigning."""
        return self._of(key, lambda kms: self._keys.signer(kms, key, version)[1])

    @bare
    def sign(self, key: str, message: bytes) -> Signature:
        """See SupportsSigning; the message is hashed here, and only its digest is sent."""
        return self._of(key, lambda kms: self._keys.sign(kms, key, message))

    def _of(self, key: str, work: Callable[[Service], R], seconds: float = 0.0) -> R:
        check_key(key)
        return self._connection.run(work, seconds)

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider; the identity, then the key, the rights on it, and the context."""
        findings = _checks.findings(self, self.describe_key, self._connection, key)
        return Health(tuple(findings))

    def close(self) -> None:
        """See KeyProvider; the provider may be used again, and then logs in again."""
        self._connection.forget()
