"""The messages of client and service over HTTPS, and how they are bound together.

    POST /v1/nonce   (no body)                             -> keymgmt-broker-nonce/1
    POST /v1/unwrap  keymgmt-broker-request/1              -> keymgmt-broker-answer/1
    GET /healthz                                           -> keymgmt-broker-health/1
    any refusal      a status of 400 or more, and             keymgmt-broker-refusal/1

Each body is one JSON object in the one spelling of RFC 8785. The evidence signs ``report_data``, so
it is for this nonce, this ephemeral key and this wrapped key alone. The answer is sealed to the
ephemeral key and bound to the same bytes, so it opens for the machine that asked, as the answer to
this request.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from keymgmt.backend import (
    HPKE_KINDS,
    MAX_BLOB,
    FormatError,
    JsonReader,
    WrappedKey,
    dump_json,
    is_name,
    load_json,
)

__all__ = [
    "ANSWER",
    "BACKEND",
    "HEALTH",
    "HEALTH_PATH",
    "MAX_ANSWER",
    "MAX_EVIDENCE",
    "MAX_REQUEST",
    "NONCE",
    "NONCE_LENGTH",
    "NONCE_PATH",
    "REFUSAL",
    "STATUS",
    "UNWRAP_PATH",
    "Request",
    "answer_info",
    "encode_bytes",
    "read",
]

BACKEND: Final = "broker"
NONCE_PATH: Final = "/v1/nonce"
UNWRAP_PATH: Final = "/v1/unwrap"
HEALTH_PATH: Final = "/healthz"

NONCE: Final = "keymgmt-broker-nonce/1"
REQUEST: Final = "keymgmt-broker-request/1"
ANSWER: Final = "keymgmt-broker-answer/1"
HEALTH: Final = "keymgmt-broker-health/1"
REFUSAL: Final = "keymgmt-broker-refusal/1"

NONCE_LENGTH: Final = 56
MAX_EVIDENCE: Final = 400 * 1024
"""Bytes of evidence: the event log of a TPM may have 256 KiB, and a quote of SGX or TDX has 5."""
MAX_CONTEXT: Final = 1024
MAX_PUBLIC: Final = 2048
MAX_REQUEST: Final = MAX_EVIDENCE * 4 // 3 + 32 * 1024
MAX_ANSWER: Final = 16 * 1024
_PARTS: Final = 64

STATUS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("request", "nonce"), 400),
    **dict.fromkeys(("evidence", "policy"), 403),
    **dict.fromkeys(("key", "missing"), 404),
    **dict.fromkeys(("wrong-key", "retired", "unwrap"), 422),
    **dict.fromkeys(("denied", "unavailable", "not-ready", "busy"), 503),
    "rate": 429,
    "size": 413,
    "time": 408,
    "fault": 500,
}
"""Each word of a refusal, which is all that a client is told, and its HTTP status."""


@dataclass(frozen=True)
class Request:
    """A request to unwrap. Its evidence signs a hash of all the other members.

    Attributes:
        nonce: as the service gave it.
        hpke: kind of the ephemeral key, one of ``HPKE_KINDS``.
        public_key: the ephemeral key, as ``hpke_public`` serialises it.
        wrapped: the wrapped key; its backend is ``broker``.
        context: the context to which ``wrapped`` is bound.
        kind: kind of evidence, as its entry point is called.
        evidence: the result of ``Evidence.quote`` for ``report_data``.
    """

    nonce: bytes
    hpke: str
    public_key: bytes
    wrapped: WrappedKey
    context: bytes
    kind: str
    evidence: bytes = field(default=b"", repr=False)

    @cached_property
    def report_data(self) -> bytes:
        """The 32 bytes that the evidence signs: SHA-256 over every part with its length before it.

        A TPM may have no room for more (``extraData`` of TPM2_Quote). SGX and TDX have 64 bytes, of
        which the last 32 are zero.
        """
        wrapped = self.wrapped
        parts = [
            b"keymgmt broker request 1",
            self.nonce,
            *(text.encode() for text in (self.kind, self.hpke)),
            self.public_key,
            *(text.encode() for text in (wrapped.key, wrapped.version, wrapped.mechanism)),
            wrapped.blob,
            self.context,
            # Last, since their number varies.
            *(text.encode() for pair in sorted(wrapped.params.items()) for text in pair),
        ]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.digest()

    def with_evidence(self, evidence: bytes) -> Request:
        """The same request, with its evidence."""
        return replace(self, evidence=evidence)

    def to_bytes(self) -> bytes:
        """The body of the request."""
        wrapped = self.wrapped
        return dump_json(
            {
                "format": REQUEST,
                "nonce": encode_bytes(self.nonce),
                "hpke": self.hpke,
                "public_key": encode_bytes(self.public_key),
                "key": wrapped.key,
                "version": wrapped.version,
                "mechanism": wrapped.mechanism,
                "blob": encode_bytes(wrapped.blob),
                "params": dict(wrapped.params),
                "context": encode_bytes(self.context),
                "kind": self.kind,
                "evidence": encode_bytes(self.evidence),
            }
        )

    @classmethod
    def from_bytes(cls, body: bytes) -> Request:
        """Read the body of a request; FormatError for bytes that ``to_bytes`` would not make."""
        reader = read(body, REQUEST, "the request", MAX_REQUEST)
        request = cls(
            reader.base64("nonce", limit=NONCE_LENGTH),
            reader.text("hpke", limit=64),
            reader.base64("public_key", limit=MAX_PUBLIC),
            WrappedKey(
                BACKEND,
                reader.text("key", limit=64),
                reader.text("version", limit=128),
                reader.text("mechanism", limit=64),
                reader.base64("blob", limit=MAX_BLOB),
                reader.texts("params", most=8, key_limit=32, limit=256),
            ),
            reader.base64("context", limit=MAX_CONTEXT),
            reader.text("kind", limit=32),
            reader.base64("evidence", limit=MAX_EVIDENCE),
        )
        reader.end()
        if request.hpke not in HPKE_KINDS:
            raise FormatError("the request has no known kind of public key")
        if not is_name(request.kind):
            raise FormatError("the request has no valid kind of evidence")
        return request


def answer_info(report_data: bytes) -> bytes:
    """The info to which the sealed share of an answer is bound, besides the ephemeral key."""
    return b"keymgmt broker answer 1" + report_data


def encode_bytes(data: bytes) -> str:
    """Bytes as they stand in JSON: standard base64."""
    return base64.b64encode(data).decode()


def read(body: bytes, expected: str, label: str, limit: int) -> JsonReader:
    """Read a body whose ``format`` must be ``expected``; else FormatError."""
    reader = load_json(body, label, limit, _PARTS)
    reader.version(expected, "another version of keymgmt may have made it")
    return reader
