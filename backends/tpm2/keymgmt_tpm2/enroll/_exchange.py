"""Enrolling a device: four files between it and whoever vouches for its keys.

    device    request                      EK certificate, EK, AK, key, policy      REQUEST
    verifier  challenge  checks REQUEST    a credential for EK and AK               CHALLENGE, STATE
    device    respond    opens CHALLENGE   the AK's certification of the key        RESPONSE
    verifier  accept     checks RESPONSE   an attested recipient file, signed       RECIPIENT

All are JSON. STATE holds the credential's secret: it is private and used once. The value that the
AK signs is HMAC-SHA-256 of the request under that secret, so a response fits one request only.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from keymgmt.backend import FormatError, JsonReader, Recipient, load_json
from keymgmt_tpm2._structures import Public, describe_attributes
from keymgmt_tpm2._templates import MECHANISMS, problem_with
from keymgmt_tpm2.enroll._attest import check_ak, check_certification, make_credential
from keymgmt_tpm2.enroll._certificates import (
    AttestationError,
    Maker,
    Makers,
    check_certificate,
    split_chain,
)
from keymgmt_tpm2.enroll._office import Decision
from keymgmt_tpm2.policy._policy import Policy

__all__ = [
    "Request",
    "accept",
    "answer_value",
    "challenge",
    "read_response",
    "read_state",
    "write_response",
]

_REQUEST: Final = "keymgmt.tpm2-enroll-request/1"
_CHALLENGE: Final = "keymgmt.tpm2-enroll-challenge/1"
_STATE: Final = "keymgmt.tpm2-enroll-state/1"
_RESPONSE: Final = "keymgmt.tpm2-enroll-response/1"
MAX_FILE: Final = 1 << 20
MAX_PART: Final = 65536
_LABEL: Final = b"keymgmt enroll 1\0"


@dataclass(frozen=True)
class Request:
    """The statement of a device about itself and one of its keys; nothing of it is proved.

    ``certificate`` is the EK's in DER, as its NV index or a file holds it; ``chain`` what the TPM
    holds of its issuers' certificates, one after the other, empty if it holds none.
    """

    certificate: bytes
    chain: bytes
    ek: Public
    ak: Public
    key: Public
    policy: Policy
    recipient: Recipient

    def to_bytes(self) -> bytes:
        """The request file."""
        return _dump(
            {
                "format": _REQUEST,
                "ek_certificate": _text(self.certificate),
                "ek_chain": _text(self.chain),
                "ek": _text(self.ek.raw),
                "ak": _text(self.ak.raw),
                "key": _text(self.key.raw),
                "policy": self.policy.to_json(),
                "recipient": _text(self.recipient.to_bytes()),
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Request:
        """Read a request file; FormatError where it is wrong."""
        file = _load(content, _REQUEST, "request")
        with _malformed("request"):
            request = cls(
                file.base64("ek_certificate", limit=MAX_PART),
                file.base64("ek_chain", limit=MAX_PART),
                Public.parse(file.base64("ek", limit=MAX_PART)),
                Public.parse(file.base64("ak", limit=MAX_PART)),
                Public.parse(file.base64("key", limit=MAX_PART)),
                Policy.read(JsonReader(file.members("policy"), "the policy")),
                Recipient.from_bytes(file.base64("recipient", limit=MAX_FILE)),
            )
            for public in (request.ek, request.ak, request.key):
                public.key()  # a modulus of 0, or a point off its curve, is refused here
        file.end()
        return request

    @property
    def digest(self) -> bytes:
        """SHA-256 of the request file."""
        return hashlib.sha256(self.to_bytes()).digest()

    def check(self, makers: Makers) -> Maker:
        """Check all that a request can prove: chain, EK, AK, and that key and recipient agree.

        Raises:
            AttestationError: which link is missing.
        """
        # What the TPM brings along of its chain is trusted for nothing, as intermediates are.
        with _malformed("request"):
            between = [*makers.between, *split_chain(self.chain)]
        maker = check_certificate(self.certificate, self.ek, replace(makers, between=between))
        check_ak(self.ak)
        kinds = {mechanism: kind for kind, mechanism in MECHANISMS.items()}
        kind = kinds.get(self.recipient.kind)
        if kind is None or self.recipient.backend != "tpm2":
            raise AttestationError("the recipient is not one of a TPM")
        if problem := problem_with(self.key, kind, self.policy):
            raise AttestationError(f"the key is refused: {problem}")
        if self.key.encoded() != self.recipient.public_key:
            raise AttestationError("the recipient is of another key than the one that is shown")
        return maker


def challenge(
    request: Request, makers: Makers, *, secret: bytes | None = None
) -> tuple[bytes, bytes]:
    """Challenge and state files for a request.

    Args:
        request: of the device.
        makers: who is trusted.
        secret: that of a state file of this request whose challenge was lost.

    Raises:
        AttestationError: the request fails a check that needs no answer of the TPM.
    """
    request.check(makers)
    secret = secret or os.urandom(32)
    credential, seed = make_credential(request.ek, request.ak.name, secret)
    sent = {
        "format": _CHALLENGE,
        "request": request.digest.hex(),
        "credential": _text(credential),
        "seed": _text(seed),
    }
    kept = {"format": _STATE, "request": _text(request.to_bytes()), "secret": _text(secret)}
    return _dump(sent), _dump(kept)


def read_challenge(content: bytes) -> tuple[bytes, bytes, bytes]:
    """Digest of the request, credential and seed of a challenge file; FormatError."""
    file = _load(content, _CHALLENGE, "challenge")
    read = (
        file.hex("request", length=32),
        file.base64("credential", limit=MAX_PART),
        file.base64("seed", limit=MAX_PART),
    )
    file.end()
    return read


def answer_value(secret: bytes, request_digest: bytes) -> bytes:
    """The qualifying data of the certification: 32 bytes that need the credential's secret."""
    return hmac.new(secret, _LABEL + request_digest, hashlib.sha256).digest()


def write_response(attest: bytes, signature: bytes) -> bytes:
    """The response file: TPMS_ATTEST and a DER ECDSA signature over it."""
    return _dump({"format": _RESPONSE, "attest": _text(attest), "signature": _text(signature)})


def read_response(content: bytes) -> tuple[bytes, bytes]:
    """Certification and signature of a response file; FormatError."""
    file = _load(content, _RESPONSE, "response")
    read = file.base64("attest", limit=MAX_PART), file.base64("signature", limit=MAX_PART)
    file.end()
    return read


def accept(state: bytes, response: bytes, makers: Makers, decision: Decision) -> Recipient:
    """The attested recipient, if the response is right and the office wants this device.

    Its attributes are the proved facts and those of the office's inventory. Unproved statements of
    the device are not in it.

    Raises:
        AttestationError: a link is missing, or the office does not accept the device.
        FormatError: a file is malformed.
        ConfigError: the decision does not say which key is enrolled.
    """
    request, secret = read_state(state)
    # Checked again: a maker may have been distrusted since the challenge.
    maker = request.check(makers)
    attest, signature = read_response(response)
    expected = answer_value(secret, request.digest)
    firmware = check_certification(attest, signature, request.ak, request.key, expected)
    device = decision.check(request.ek, request.key, request.policy)
    name, version = decision.key_of(device)
    if (request.recipient.key, request.recipient.version) != (name, version):
        raise AttestationError(
            f"the device sent its key {request.recipient.key}@{request.recipient.version}, "
            f"and {name}@{version} is enrolled"
        )
    attributes = {
        **device.known,
        "ak": request.ak.name.hex(),
        "attested": "tpm2",
        "ek": device.ek,
        "ek_issuer": maker.issuer,
        "firmware": firmware,
        "maker": maker.anchor,
        "policy": str(request.policy),
        "policy_digest": request.key.policy.hex(),
        "tpm_attributes": describe_attributes(request.key.attributes),
        "tpm_name": request.key.name.hex(),
    }
    if request.policy.approver is not None:
        attributes["approver"] = request.policy.approver.fingerprint
    shown = request.recipient
    return Recipient(shown.kind, "tpm2", name, version, shown.public_key, attributes)


def read_state(state: bytes) -> tuple[Request, bytes]:
    """Request and secret of a state file; FormatError."""
    file = _load(state, _STATE, "state")
    request = Request.from_bytes(file.base64("request", limit=MAX_FILE))
    secret = file.base64("secret", limit=64)
    file.end()
    return request, secret


def _dump(data: dict[str, Any]) -> bytes:
    # The digest of a request is that of these bytes: another spelling answers no older challenge.
    return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"


def _load(content: bytes, expected: str, step: str) -> JsonReader:
    file = load_json(content, f"the enrolment {step}", MAX_FILE, canonical=False)
    file.version(expected, "the files are, in order: request, challenge, response")
    return file


@contextlib.contextmanager
def _malformed(step: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise FormatError(f"the enrolment {step} is malformed: {error}") from error


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
