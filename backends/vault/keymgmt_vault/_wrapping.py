"""Wrapping and unwrapping with Transit, and the ciphertexts that it makes.

A key type with additional data binds the context itself (``associated_data``). RSA has none, so
there the core's InnerKey binds it; wrapping is done here with the public key, as by anybody who has
the key's recipient file. The blob of an AEAD type is Transit's ciphertext as it stands, so ``bao
write transit/decrypt/NAME ciphertext=... associated_data=...`` opens it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import (
    DEK_LENGTH,
    Dek,
    ProviderError,
    ProviderUnavailable,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    check_backend,
    check_mechanism,
    inner_unwrap,
    wrap_for,
)
from keymgmt_vault._errors import Refusal, Verb, refused
from keymgmt_vault._login import text_of
from keymgmt_vault._session import unbound
from keymgmt_vault._settings import AEAD, MECHANISMS, RSA

if TYPE_CHECKING:
    from keymgmt_vault._keys import Described, Keys
    from keymgmt_vault._session import Session

__all__ = ["Wrapping"]

# OpenBao refused a body with 245 to 250 items and additional data ("maximum number of strings").
_BATCH: Final = 200
_CIPHERTEXT: Final = re.compile(r"vault:v([1-9][0-9]{0,8}):[A-Za-z0-9+/]{4,8000}={0,2}")


class Wrapping:
    """Transit's encrypt and decrypt for one provider; every ``key`` has matched its grammar."""

    def __init__(self, session: Session, keys: Keys) -> None:
        self._session, self._keys = session, keys
        self._settings = session.settings

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; two calls, since the key is looked at before."""
        (answer,) = self.wrap_batch(key, [(dek, context)])
        if isinstance(answer, ProviderError):
            raise answer
        return answer

    def wrap_batch(
        self, key: str, items: Sequence[tuple[Dek, bytes]]
    ) -> list[WrappedKey | ProviderError]:
        """See SupportsBatchWrap; to an RSA key is wrapped here, with its public part."""
        answers: list[WrappedKey | ProviderError] = []
        step = _BATCH - 1  # and one for the proof
        for start in range(0, len(items), step):
            part = items[start : start + step]
            with self._session.connection.operation():
                described = self._keys.usable(key, "wrap")
                if described.info.kind in RSA:
                    recipient = described.recipient()
                    answers += [wrap_for(recipient, dek, context) for dek, context in part]
                else:
                    answers += self._encrypt(described, part)
        return answers

    def _encrypt(
        self, described: Described, items: Sequence[tuple[Dek, bytes]]
    ) -> list[WrappedKey | ProviderError]:
        batch = []
        for dek, context in items:
            batch.append({"plaintext": base64.b64encode(dek.view()).decode()})
            if context:
                batch[-1]["associated_data"] = base64.b64encode(context).decode()
        bound = any(context for _, context in items)
        if bound:
            # The proof that the server reads associated_data at all: it refuses what is no base64.
            # Older ones ignore the member, and then another context opens what was wrapped.
            batch.append({"plaintext": "AAAA", "associated_data": "!"})
        results = self._batch("encrypt", described.native, batch)
        if bound and not _failure_of(results.pop()):
            raise unbound()
        return [self._encrypted(described, result) for result in results]

    def _encrypted(self, described: Described, result: Any) -> WrappedKey | ProviderError:
        if words := _failure_of(result):
            return self._refused("encrypt", described.native, words)
        text, info = text_of(result, "ciphertext"), described.info
        if (version := _version_of(text)) is None:
            return ProviderUnavailable("the server's answer is no Transit ciphertext")
        return WrappedKey("vault", info.key, version, info.kind, text.encode())

    def _refused(self, verb: Verb, native: str, words: str) -> ProviderError:
        path = f"{self._settings.mount}/{verb}/{native}"
        return refused(Refusal(400, [words]).code, verb, native, self._settings, words, path)

    def _batch(self, verb: Verb, native: str, items: list[dict[str, str]]) -> list[Any]:
        # Without the code, one bad item is status 400 for all.
        body = {"batch_input": items, "partial_failure_response_code": 200}
        data = self._session.transit(verb, native, "post", f"{verb}/{native}", json=body)
        results = data.get("batch_results")
        if not isinstance(results, list) or len(results) != len(items):
            raise ProviderUnavailable("the server's answer has not one result for each item")
        return results

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider; one call."""
        native, item = self._prepare(wrapped, context)
        data = self._session.transit("decrypt", native, "post", f"decrypt/{native}", json=item)
        return _finish(wrapped, context, data)

    def unwrap_batch(
        self, items: Sequence[tuple[WrappedKey, bytes]]
    ) -> Sequence[Dek | ProviderError]:
        """See SupportsBatchUnwrap; one call for each 200 items of a key."""
        answers: dict[int, Dek | ProviderError] = {}
        groups: dict[str, list[tuple[int, dict[str, str]]]] = {}
        for index, (wrapped, context) in enumerate(items):
            try:
                native, item = self._prepare(wrapped, context)
                groups.setdefault(native, []).append((index, item))
            except ProviderError as error:
                answers[index] = error
        for native, group in groups.items():
            for start in range(0, len(group), _BATCH):
                chunk = group[start : start + _BATCH]
                try:
                    results = self._batch("decrypt", native, [item for _, item in chunk])
                except ProviderError as error:
                    answers |= dict.fromkeys((index for index, _ in chunk), error)
                    continue
                for (index, _), result in zip(chunk, results, strict=True):
                    answers[index] = self._one_of_many(native, *items[index], result)
        return [answers[index] for index in range(len(items))]

    def _one_of_many(
        self, native: str, wrapped: WrappedKey, context: bytes, result: Any
    ) -> Dek | ProviderError:
        if words := _failure_of(result):
            return self._refused("decrypt", native, words)
        try:
            return _finish(wrapped, context, result)
        except ProviderError as error:
            return error

    def _prepare(self, wrapped: WrappedKey, context: bytes) -> tuple[str, dict[str, str]]:
        """The name in Transit, and the body that has it decrypt a wrap."""
        check_backend(wrapped, "vault")
        if not self._settings.may_hold(wrapped.key):
            raise WrongKey(f"{wrapped} is not of this machine: its key has not our keys_prefix")
        allowed = self._settings.allowed(wrapped.key)
        check_mechanism(wrapped, allowed, MECHANISMS, self._session.name)
        bound = wrapped.mechanism in AEAD
        ciphertext = _ciphertext(wrapped)
        known = set[str]() if bound else {"pk"}
        version = _version_of(ciphertext)
        if version is None or not set(wrapped.params) <= known:
            # It cannot decrypt; the server says whether key and version are there at all.
            ciphertext, context = f"vault:v{wrapped.version}:{'A' * 80}", b""
            version = _version_of(ciphertext)
        if version != wrapped.version:
            raise WrongKey(f"the blob of {wrapped} is of no such version")
        item = {"ciphertext": ciphertext}
        if bound and context:
            item["associated_data"] = base64.b64encode(context).decode()
        return self._settings.native(wrapped.key), item


def _failure_of(result: Any) -> str:
    """Why an item of a batch failed, in the server's words; empty if it did not."""
    if not isinstance(result, dict):
        return "no result"
    return str(result.get("error") or "")[:300]


def _ciphertext(wrapped: WrappedKey) -> str:
    """What Transit decrypts of a blob; anything outside its alphabet is what no ciphertext has."""
    if wrapped.mechanism in AEAD:
        return wrapped.blob.decode("ascii", "replace")
    # Made with the public key, and so without Transit's prefix; an InnerKey's first part.
    length = int.from_bytes(wrapped.blob[:2], "big")
    inner = base64.b64encode(wrapped.blob[2 : 2 + length]).decode()
    return f"vault:v{wrapped.version}:{inner}"


def _version_of(text: str) -> str | None:
    """The key version that a Transit ciphertext names, or None where it is none."""
    match = _CIPHERTEXT.fullmatch(text)
    return match[1] if match else None


def _finish(wrapped: WrappedKey, context: bytes, data: Mapping[str, Any]) -> Dek:
    try:
        plain = binascii.a2b_base64(text_of(data, "plaintext"), strict_mode=True)
    except ValueError as error:
        raise ProviderUnavailable("the server's answer has no plaintext in base64") from error
    if len(plain) != DEK_LENGTH:
        raise UnwrapFailed(f"what {wrapped} holds is no data key")
    dek = Dek(plain)
    if wrapped.mechanism not in AEAD:
        return inner_unwrap(wrapped.blob, context, lambda _: dek)
    return dek
