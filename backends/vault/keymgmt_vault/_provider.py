"""VaultProvider: wrap and unwrap inside the Transit engine of HashiCorp Vault or OpenBao."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from keymgmt.backend import (
    Dek,
    Health,
    KeyInfo,
    KeyProvider,
    ProviderError,
    Recipient,
    Signature,
    SupportsBatchUnwrap,
    SupportsBatchWrap,
    SupportsKeyDeletion,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
    WrappedKey,
    bare,
    check_key,
)
from keymgmt_vault import _checks
from keymgmt_vault._keys import Keys
from keymgmt_vault._session import Session
from keymgmt_vault._settings import KINDS, VaultSettings
from keymgmt_vault._wrapping import Wrapping

__all__ = ["VaultProvider"]


class VaultProvider(
    KeyProvider[VaultSettings],
    SupportsKeyManagement,
    SupportsKeyDeletion,
    SupportsOfflineRecipients,
    SupportsSigning,
    SupportsBatchUnwrap,
    SupportsBatchWrap,
):
    """Keys in the Transit secrets engine; they never leave the server.

    Example::

        [providers.site]
        backend = "vault"
        address = ["https://vault-a.example:8200", "https://vault-b.example:8200"]
        ca_file = "site-ca.pem"
        auth = { method = "approle", role_id = { file = "role" }, secret_id = { env = "SECRET" } }

    What the token needs: ``update`` on ``transit/decrypt/KEY`` to unwrap; to wrap, ``update`` on
    ``transit/encrypt/KEY`` and ``read`` on ``transit/keys/KEY``. It is looked at before each wrap
    because Transit would create a key that is encrypted with and is not there. The whole policies,
    by role: docs/backends/vault.md.

    Kinds: ``aes256-gcm96``, ``chacha20-poly1305``, ``xchacha20-poly1305`` wrap, with the context as
    Transit's ``associated_data``; ``rsa-2048``, ``rsa-3072``, ``rsa-4096`` wrap (OAEP, SHA-256),
    the context bound by the core's InnerKey, also for who seals to their public part offline; or
    they sign, where the config says ``purpose = "sign"``;
    ``ed25519``, ``ecdsa-p256``, ``ecdsa-p384`` sign.

    The data key passes through HTTP and JSON in strings, which Python cannot wipe; their memory is
    reused, not kept. The token lives in this process until ``close``.
    """

    backend: ClassVar[str] = "vault"
    Settings: ClassVar[type[VaultSettings]] = VaultSettings
    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]] = KINDS

    def __init__(self, name: str, settings: VaultSettings) -> None:
        super().__init__(name, settings)
        self._session = Session(name, settings)
        self._keys = Keys(self._session)
        self._wrapping = Wrapping(self._session, self._keys)

    @bare
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; two calls, since the key is looked at before."""
        return self._wrapping.wrap(check_key(key), dek, context)

    @bare
    def wrap_batch(
        self, key: str, items: Sequence[tuple[Dek, bytes]]
    ) -> Sequence[WrappedKey | ProviderError]:
        """See SupportsBatchWrap; one call to look at the key, and one for each 199 items."""
        return self._wrapping.wrap_batch(check_key(key), items)

    @bare
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider; one call."""
        return self._wrapping.unwrap(wrapped, context)

    @bare
    def unwrap_batch(
        self, items: Sequence[tuple[WrappedKey, bytes]]
    ) -> Sequence[Dek | ProviderError]:
        """See SupportsBatchUnwrap; one call for each 200 items of a key."""
        return self._wrapping.unwrap_batch(items)

    @bare
    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """See SupportsKeyManagement; the option ``auto-rotate`` is a period such as ``2160h``.

        The key cannot be exported or backed up in plaintext, and Transit refuses to delete it
        until ``delete_key`` allows it.
        """
        return self._keys.create(check_key(key), kind, options)

    @bare
    def list_keys(self) -> list[KeyInfo]:
        """See SupportsKeyManagement; what we may not look at is named in the log."""
        return self._keys.list()

    @bare
    def describe_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        return self._keys.read(check_key(key)).info

    @bare
    def rotate_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        return self._keys.rotate(check_key(key))

    @bare
    def retire_version(self, key: str, version: str) -> KeyInfo:
        """See SupportsKeyManagement; Transit has only a floor, so the oldest one first."""
        return self._keys.retire(check_key(key), version)

    @bare
    def delete_key(self, key: str) -> None:
        """See SupportsKeyDeletion; the key's deletion is allowed first."""
        self._keys.delete(check_key(key))

    @bare
    def export_recipient(self, key: str) -> Recipient:
        """See SupportsOfflineRecipients; RSA keys have a public part."""
        return self._keys.recipient(check_key(key))

    @bare
    def public_key(self, key: str, version: str | None = None) -> bytes:
        """See SupportsSigning."""
        return self._keys.usable(check_key(key), "sign").public_key(version)

    @bare
    def sign(self, key: str, message: bytes) -> Signature:
        """See SupportsSigning; all but Ed25519 hash here and send the digest."""
        return self._keys.sign(check_key(key), message)

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider; each address, then the login and its token, then the key."""
        return Health(tuple(_checks.findings(self, self._session, self._keys, key)))

    def close(self) -> None:
        """See KeyProvider; it logs out, may be used again, and then logs in again."""
        self._session.close()
