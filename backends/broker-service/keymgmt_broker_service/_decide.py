"""Decide on a request: check the evidence by the policies of the key, unwrap, seal, and log.

The provider behind the broker is never asked for a machine that has not proved itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from keymgmt_broker.protocol import ANSWER, Request, answer_info, encode_bytes

import keymgmt
from keymgmt.backend import (
    AccessDenied,
    Dek,
    FormatError,
    KeymgmtError,
    KeyNotFound,
    KeyRetired,
    LockedOut,
    ProviderError,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
    audit,
    dump_json,
    hpke_seal,
)
from keymgmt_broker_service._nonces import Nonces
from keymgmt_broker_service._settings import KeyEntry, ServiceSettings
from keymgmt_broker_service._verify import (
    Claims,
    Collateral,
    NotReady,
    Refused,
    examine,
    load_collateral,
    prepare,
)

__all__ = ["Broker", "Refusal"]

log = logging.getLogger("keymgmt.broker")
_WORDS: Final[Mapping[type[ProviderError], str]] = {
    WrongKey: "wrong-key",
    KeyRetired: "retired",
    KeyNotFound: "missing",
    UnwrapFailed: "unwrap",
    UnsupportedOperation: "unwrap",
    AccessDenied: "denied",
    LockedOut: "denied",
}


class Refusal(Exception):
    """A request is refused.

    Attributes:
        word: the reason that the client gets, one of ``protocol.STATUS``.
    """

    def __init__(self, word: str, reason: str = "") -> None:
        """``reason`` is for the log of the service alone."""
        super().__init__(reason or word)
        self.word = word


@dataclass(frozen=True)
class Broker:
    """The state of one worker: config, policies, collateral. Safe to use from several threads."""

    settings: ServiceSettings
    config: keymgmt.Config
    policies: Mapping[str, Any]
    collateral: Collateral | None
    nonces: Nonces

    @classmethod
    def load(cls, settings: ServiceSettings, nonce_key: bytes) -> Self:
        """Read all files that ``settings`` names; ConfigError where one of them is wrong."""
        config = keymgmt.load_config(settings.config)
        for entry in settings.keys.values():
            entry.find(config)
        collateral = None
        if settings.collateral is not None:
            collateral = load_collateral(settings.collateral, settings.unsafe_root)
        policies = {name: prepare(policy) for name, policy in settings.policies.items()}
        return cls(settings, config, policies, collateral, Nonces(nonce_key))

    def answer(self, body: bytes, client: str) -> bytes:
        """The body of the answer to a request.

        Args:
            body: the body of the request.
            client: the client's address, for the log.

        Raises:
            Refusal: the request is refused, and the decision is in the log.
        """
        try:
            request = Request.from_bytes(body)
        except FormatError as error:
            log.warning("a request of %s cannot be read: %s", client, error)
            raise Refusal("request") from error
        said: dict[str, object] = {
            "key": request.wrapped.key,
            "version": request.wrapped.version,
            "kind": request.kind,
            "client": client,
            "request": request.report_data.hex()[:16],
        }
        try:
            sealed = self._decide(request, said)
        except Refusal as refusal:
            said |= {"refused": refusal.word, "reason": str(refusal)}
            audit("broker-unwrap", error=refusal, **said)
            raise
        audit("broker-unwrap", error=None, **said)
        return dump_json({"format": ANSWER, "sealed": encode_bytes(sealed)})

    def _decide(self, request: Request, said: dict[str, object]) -> bytes:
        if not self.nonces.is_fresh(request.nonce):
            raise Refusal("nonce", "the nonce is old, of another clock, or not of this broker")
        if self.nonces.is_repeat(request.nonce):
            said["repeat"] = "yes"
        entry = self.settings.keys.get(request.wrapped.key)
        of_kind = [
            name for name, each in self.settings.policies.items() if each.evidence == request.kind
        ]
        names = [name for name in entry.allow if name in of_kind] if entry else []
        # Also where no policy gives the key: who has proved nothing does not learn which keys there
        # are, nor which kinds of evidence a key takes.
        policy, claims = self._verify(request, names or of_kind)
        if entry is None:
            raise Refusal("key", "no such key under [keys]")
        if not names:
            raise Refusal("policy", f"no policy of the key for evidence {request.kind}")
        said |= {"policy": policy, **claims.facts}
        dek = self._unwrap(request, entry)
        try:
            info = answer_info(request.report_data)
            return hpke_seal(request.hpke, request.public_key, dek, info)
        except FormatError as error:
            raise Refusal("request", str(error)) from error
        finally:
            dek.wipe()

    def _verify(self, request: Request, names: Sequence[str]) -> tuple[str, Claims]:
        """The first of these policies that the evidence satisfies, and what the evidence says."""
        if not names:
            raise Refusal("policy", f"no policy for evidence {request.kind}")
        try:
            # Once for all policies: it costs more than everything else.
            judge = examine(
                request.evidence,
                request.report_data,
                request.kind,
                self.collateral,
                int(time.time()),
            )
        except NotReady as error:
            raise Refusal("not-ready", str(error)) from error
        except Refused as error:
            raise Refusal("evidence", str(error)) from error
        reasons = []
        for name in names:
            try:
                return name, judge(self.policies[name])
            except Refused as error:
                reasons.append(f"{name}: {error}")
        raise Refusal("evidence", "; ".join(reasons))

    def _unwrap(self, request: Request, entry: KeyEntry) -> Dek:
        try:
            provider, key = entry.find(self.config)
            wrapped = replace(request.wrapped, backend=provider.backend, key=key)
            return provider.unwrap(wrapped, request.context)
        except KeymgmtError as error:
            word = next((w for kind, w in _WORDS.items() if isinstance(error, kind)), "unavailable")
            raise Refusal(word, f"{entry.key}: {error}") from error

    def close(self) -> None:
        """Close the providers."""
        self.config.close()
