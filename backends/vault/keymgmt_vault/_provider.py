"""VaultProvider: wrap and unwrap inside the Transit engine of HashiCorp Vault or OpenBao."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, NamedTuple

from hvac import exceptions

from keymgmt.backend import (
    DEK_LENGTH,
    Dek,
    Health,
    KeyInfo,
    KeyProvider,
    ProviderError,
    ProviderUnavailable,
    Signature,
    SupportsBatchUnwrap,
    SupportsKeyManagement,
    SupportsSigning,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    check_key,
    inner_unwrap,
    inner_wrap,
    is_key,
)
from keymgmt_vault import _doctor, _keys, _policies
from keymgmt_vault._client import Client, text_of
from keymgmt_vault._errors import translate
from keymgmt_vault._mechanisms import (
    KINDS,
    MECHANISMS,
    ciphertext_version,
    has_inner,
    mechanism_of,
)
from keymgmt_vault._settings import VaultSettings

__all__ = ["VaultProvider"]

# OpenBao refused a body with 245 to 250 items and additional data ("maximum number of strings").
BATCH: Final = 200


class _Item(NamedTuple):
    """One blob as Transit takes it; ``context`` is bound by it, or by the inner key."""

    native: str
    ciphertext: str
    associated: str | None

    def body(self) -> dict[str, str]:
        body = {"ciphertext": self.ciphertext}
        if self.associated:
            body["associated_data"] = self.associated
        return body


class VaultProvider(
    KeyProvider[VaultSettings], SupportsKeyManagement, SupportsSigning, SupportsBatchUnwrap
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
    the context bound by the core's InnerKey, or sign where the config says ``purpose = "sign"``;
    ``ed25519``, ``ecdsa-p256``, ``ecdsa-p384`` sign.

    The data key passes through HTTP and JSON in strings, which Python cannot wipe; their memory is
    reused, not kept. The token lives in this process until ``close``.
    """

    backend: ClassVar[str] = "vault"
    Settings: ClassVar[type[VaultSettings]] = VaultSettings
    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]] = KINDS

    def __init__(self, name: str, settings: VaultSettings) -> None:
        super().__init__(name, settings)
        self._client = Client(settings)
        self._keys = _keys.Keys(self._client, name)

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; two calls, since the key is looked at before."""
        with self._client.adapter.operation():
            described = self._keys.read(check_key(key)).alive()
            mechanism = mechanism_of(described.kind) if described.purpose == "wrap" else None
            if mechanism is None:
                raise UnsupportedOperation(
                    f"the key {key!r} is {described.kind} and does not wrap",
                    hint=f"a key that wraps is of kind {', '.join(described.wrapping)}",
                )
            if has_inner(mechanism):
                made: list[str] = []

                def wrap_inner(inner: Dek) -> bytes:
                    made.append(self._encrypt(described.native, inner, b""))
                    return made[0].encode()

                blob = inner_wrap(dek, context, wrap_inner)
            else:
                made = [self._encrypt(described.native, dek, context)]
                blob = made[0].encode()
        version = ciphertext_version(made[0])
        if version is None:
            raise ProviderUnavailable("the server's answer is no Transit ciphertext")
        return WrappedKey(self.backend, key, version, mechanism, blob)

    def _encrypt(self, native: str, dek: Dek, context: bytes) -> str:
        plaintext = base64.b64encode(dek.view()).decode()
        associated = base64.b64encode(context).decode() or None
        data = self._client.call(
            "encrypt",
            native,
            lambda: self._client.transit.encrypt_data(
                native,
                plaintext,
                associated_data=associated,
                mount_point=self.settings.mount,
            ),
        )
        return text_of(data, "ciphertext")

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider; one call."""
        item = self._prepare(wrapped, context)
        data = self._client.call(
            "decrypt",
            item.native,
            lambda: self._client.transit.decrypt_data(
                item.native,
                item.ciphertext,
                associated_data=item.associated,
                mount_point=self.settings.mount,
            ),
        )
        return _finish(wrapped, context, data)

    def unwrap_batch(
        self, items: Sequence[tuple[WrappedKey, bytes]]
    ) -> Sequence[Dek | ProviderError]:
        """See SupportsBatchUnwrap; one call for each 200 items of a key."""
        answers: dict[int, Dek | ProviderError] = {}
        groups: dict[str, list[tuple[int, _Item]]] = {}
        for index, (wrapped, context) in enumerate(items):
            try:
                item = self._prepare(wrapped, context)
                groups.setdefault(item.native, []).append((index, item))
            except ProviderError as error:
                answers[index] = error
        for native, group in groups.items():
            for start in range(0, len(group), BATCH):
                chunk = group[start : start + BATCH]
                try:
                    results = self._decrypt_many(native, [item for _, item in chunk])
                except ProviderError as error:
                    answers |= dict.fromkeys((index for index, _ in chunk), error)
                    continue
                for (index, _), result in zip(chunk, results, strict=True):
                    answers[index] = self._one_of_many(native, *items[index], result)
        return [answers[index] for index in range(len(items))]

    def _decrypt_many(self, native: str, batch: list[_Item]) -> list[Any]:
        body = {
            "batch_input": [item.body() for item in batch],
            # Without it one bad item is status 400 for all.
            "partial_failure_response_code": 200,
        }
        path = f"/v1/{self.settings.mount}/decrypt/{native}"
        data = self._client.call(
            "decrypt", native, lambda: self._client.adapter.post(path, json=body)
        )
        results = data.get("batch_results")
        if not isinstance(results, list) or len(results) != len(batch):
            raise ProviderUnavailable("the server's answer has not one result for each item")
        return results

    def _one_of_many(
        self, native: str, wrapped: WrappedKey, context: bytes, result: Any
    ) -> Dek | ProviderError:
        try:
            if isinstance(result, dict) and not result.get("error"):
                return _finish(wrapped, context, result)
            text = str(result.get("error")) if isinstance(result, dict) else "no result"
            refusal = exceptions.InvalidRequest(errors=[text])
            return translate(refusal, "decrypt", native, self.settings)
        except ProviderError as error:
            return error

    def _prepare(self, wrapped: WrappedKey, context: bytes) -> _Item:
        if wrapped.backend != self.backend:
            raise WrongKey(f"{wrapped} was not wrapped by a Vault")
        if not is_key(wrapped.key):
            # Never into a URL, whatever way it came past WrappedKey.
            raise WrongKey("what was wrapped names no key")
        if wrapped.mechanism not in MECHANISMS:
            raise UnsupportedOperation(f"{wrapped} was wrapped by an unknown mechanism")
        if not self.settings.allows(wrapped.key, wrapped.mechanism):
            raise UnsupportedOperation(
                f"the config does not allow {wrapped.mechanism} for the key {wrapped.key!r}",
                hint=f"add it to mechanisms of [providers.{self.name}.keys.{wrapped.key}]",
            )
        blob, associated = wrapped.blob, base64.b64encode(context).decode() or None
        if has_inner(wrapped.mechanism):
            blob, associated = blob[2 : 2 + int.from_bytes(blob[:2], "big")], None
        # Anything outside the alphabet becomes a character that no ciphertext has.
        ciphertext = blob.decode("ascii", "replace")
        version = ciphertext_version(ciphertext)
        if version is None or wrapped.params:
            # It cannot decrypt; the server says whether key and version are there at all.
            ciphertext, associated = f"vault:v{wrapped.version}:{'A' * 80}", None
            version = ciphertext_version(ciphertext)
        if version != wrapped.version:
            raise WrongKey(f"the blob of {wrapped} is of no such version")
        return _Item(self.settings.native(wrapped.key), ciphertext, associated)

    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """See SupportsKeyManagement; the option ``auto-rotate`` is a period such as ``2160h``.

        The key cannot be exported or backed up in plaintext, and Transit refuses to delete it.
        """
        return self._keys.create(check_key(key), kind, options)

    def list_keys(self) -> list[KeyInfo]:
        """See SupportsKeyManagement; keys whose names or types we cannot use are left out."""
        return self._keys.list()

    def describe_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        return self._keys.read(check_key(key)).info()

    def rotate_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        return self._keys.rotate(check_key(key))

    def retire_version(self, key: str, version: str) -> KeyInfo:
        """See SupportsKeyManagement; Transit has only a floor, so the oldest one first."""
        return self._keys.retire(check_key(key), version)

    def public_key(self, key: str) -> bytes:
        """See SupportsSigning."""
        return self._keys.signing(check_key(key)).public_key()

    def sign(self, key: str, message: bytes) -> Signature:
        """See SupportsSigning; all but Ed25519 hash here and send the digest."""
        return self._keys.sign(check_key(key), message)

    def policy(self, role: str, key: str) -> str:
        """The policy in HCL that ``role`` (of ``_policies.ROLES``) needs for ``key``; no I/O."""
        return _policies.policy(role, self.settings.mount, self.settings.native(check_key(key)))

    def administer(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST to a path of the server's own API and return its answer; for ``keymgmt vault``."""
        with self._client.adapter.operation():
            self._client.login.ensure()
            return self._client.adapter.post(path, json=body, once=True)

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider; each address, then the login and its token, then the key."""
        return _doctor.check(self, self._client, key)

    def close(self) -> None:
        """See KeyProvider; it may be used again, and then logs in again."""
        self._client.close()


def _finish(wrapped: WrappedKey, context: bytes, data: Mapping[str, Any]) -> Dek:
    try:
        plain = binascii.a2b_base64(text_of(data, "plaintext"), strict_mode=True)
    except ValueError as error:
        raise ProviderUnavailable("the server's answer has no plaintext in base64") from error
    if len(plain) != DEK_LENGTH:
        raise UnwrapFailed(f"what {wrapped} holds is no data key")
    dek = Dek(plain)
    if has_inner(wrapped.mechanism):
        return inner_unwrap(wrapped.blob, context, lambda _: dek)
    return dek
