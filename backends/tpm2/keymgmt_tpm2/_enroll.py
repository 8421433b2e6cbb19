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
import hashlib
import hmac
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from cryptography import x509

from keymgmt.backend import FormatError, Recipient, public_key_id
from keymgmt_tpm2._attest import (
    AttestationError,
    check_ak,
    check_certificate,
    check_certification,
    make_credential,
)
from keymgmt_tpm2._policy import Policy
from keymgmt_tpm2._structures import Public
from keymgmt_tpm2._templates import problem_with

__all__ = ["Request", "accept", "answer_value", "challenge", "read_response", "write_response"]

_REQUEST: Final = "keymgmt.tpm2-enroll-request/1"
_CHALLENGE: Final = "keymgmt.tpm2-enroll-challenge/1"
_STATE: Final = "keymgmt.tpm2-enroll-state/1"
_RESPONSE: Final = "keymgmt.tpm2-enroll-response/1"
_KINDS: Final = {"hpke-p256": "ecc-p256", "RSA-OAEP-256": "rsa-2048"}
_LABEL: Final = b"keymgmt enroll 1\0"


@dataclass(frozen=True)
class Request:
    """What a device states of itself and of one of its keys; nothing of it is proved."""

    certificate: bytes
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
        data = _load(content, _REQUEST)
        try:
            return cls(
                _bytes(data["ek_certificate"]),
                Public.parse(_bytes(data["ek"])),
                Public.parse(_bytes(data["ak"])),
                Public.parse(_bytes(data["key"])),
                Policy.from_json(data["policy"]),
                Recipient.from_bytes(_bytes(data["recipient"])),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"the enrolment request is malformed: {error}") from error

    @property
    def digest(self) -> bytes:
        """SHA-256 of the request file."""
        return hashlib.sha256(self.to_bytes()).digest()

    def check(
        self, roots: Sequence[bytes], intermediates: Sequence[bytes] = ()
    ) -> x509.Certificate:
        """Check all that a request can prove: chain, EK, AK, and that key and recipient agree.

        Raises:
            AttestationError: which link is missing.
        """
        certificate = check_certificate(self.certificate, self.ek, roots, intermediates)
        check_ak(self.ak)
        kind = _KINDS.get(self.recipient.kind)
        if kind is None or self.recipient.backend != "tpm2":
            raise AttestationError("the recipient is not one of a TPM")
        if problem := problem_with(self.key, kind, self.policy):
            raise AttestationError(f"the key is refused: {problem}")
        try:
            public = self.key.der() if self.key.curve is None else self.key.point
            self.key.key()
        except ValueError as error:
            raise AttestationError("the key is no valid public key") from error
        if public != self.recipient.public_key:
            raise AttestationError("the recipient is of another key than the one that is shown")
        return certificate


def challenge(
    request: Request, roots: Sequence[bytes], intermediates: Sequence[bytes] = ()
) -> tuple[bytes, bytes]:
    """Challenge and state files for a request.

    Raises:
        AttestationError: the request proves not even what it could.
    """
    request.check(roots, intermediates)
    secret = os.urandom(32)
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
    data = _load(content, _CHALLENGE)
    try:
        return bytes.fromhex(data["request"]), _bytes(data["credential"]), _bytes(data["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"the enrolment challenge is malformed: {error}") from error


def answer_value(secret: bytes, request_digest: bytes) -> bytes:
    """What the AK puts into the certification: 32 bytes that need the credential's secret."""
    return hmac.new(secret, _LABEL + request_digest, hashlib.sha256).digest()


def write_response(attest: bytes, signature: bytes) -> bytes:
    """The response file: TPMS_ATTEST and a DER ECDSA signature over it."""
    return _dump({"format": _RESPONSE, "attest": _text(attest), "signature": _text(signature)})


def read_response(content: bytes) -> tuple[bytes, bytes]:
    """Certification and signature of a response file; FormatError."""
    data = _load(content, _RESPONSE)
    try:
        return _bytes(data["attest"]), _bytes(data["signature"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"the enrolment response is malformed: {error}") from error


def accept(
    state: bytes, response: bytes, roots: Sequence[bytes], intermediates: Sequence[bytes] = ()
) -> Recipient:
    """The attested recipient, if the response is right.

    Raises:
        AttestationError: which link is missing.
        FormatError: a file is malformed.
    """
    data = _load(state, _STATE)
    try:
        request, secret = Request.from_bytes(_bytes(data["request"])), _bytes(data["secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"the enrolment state is malformed: {error}") from error
    # Checked again: roots may have been distrusted since the challenge.
    certificate = request.check(roots, intermediates)
    attest, signature = read_response(response)
    expected = answer_value(secret, request.digest)
    check_certification(attest, signature, request.ak, request.key, expected)
    issuer = certificate.issuer.rfc4514_string().encode("ascii", "replace").decode()[:200]
    attributes = {
        **request.recipient.attributes,
        # From what was checked, not from what the device wrote.
        "tpm_name": request.key.name.hex(),
        "policy": str(request.policy),
        "attested": "tpm2",
        "ek": public_key_id(request.ek.der()),
        "ek_issuer": "".join(char if char.isprintable() else "?" for char in issuer),
    }
    return replace(request.recipient, attributes=attributes)


def _dump(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"


def _load(content: bytes, expected: str) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError("not an enrolment file: no JSON") from error
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(data, dict) or found != expected:
        raise FormatError(
            f"not the enrolment file that is wanted: {str(found)[:60]!r}, not {expected!r}",
            hint="the files are, in order: request, challenge, response",
        )
    return data


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("a member is no text")  # noqa: TRY004
    return base64.b64decode(text, validate=True)
