"""signatures.json: the publishers' detached DSSE signatures, and until when each of them counts.

The signed bytes are DSSE's pre-authentication encoding (github.com/secure-systems-lab/dsse,
protocol.md) of a payload type and a payload. The payload is manifest.json itself, or a small
statement of its hash and a time. The algorithm follows from the trusted public key and never from
the file.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any, Final

from keymgmt._crypto.signatures import pre_authentication
from keymgmt._system.strict_json import JsonReader, dump_json, load_json
from keymgmt.errors import FormatError
from keymgmt.sealed.times import check_time

__all__ = ["MAX_SIGNATURES", "Signatures", "SignedBy", "expiry_bytes", "signed_bytes"]

PAYLOAD_TYPE: Final = "application/vnd.keymgmt.manifest+json"
EXPIRY_TYPE: Final = "application/vnd.keymgmt.expiry+json"
MAX_SIGNATURES: Final = 1 << 18
MAX_SIGNERS: Final = 16
MAX_SIGNATURE: Final = 8192


def signed_bytes(manifest: bytes) -> bytes:
    """The bytes that a publisher signs: DSSE's encoding of the payload type and manifest.json."""
    return pre_authentication(PAYLOAD_TYPE, manifest)


def expiry_bytes(manifest_hash: bytes, expires: str) -> bytes:
    """The bytes that a publisher signs to state until when the signature of a manifest counts."""
    statement = {"expires": expires, "manifest": manifest_hash.hex()}
    return pre_authentication(EXPIRY_TYPE, dump_json(statement))


@dataclass(frozen=True)
class SignedBy:
    """One signature.

    Attributes:
        key_id: SHA-384 of the signer's DER public key, hex.
        signature: over the manifest, or over the statement that it expires.
        expires: the time of such a statement; None for a signature over the manifest.
    """

    key_id: str
    signature: bytes = field(repr=False)
    expires: str | None = None

    def to_json(self) -> dict[str, str]:
        """As an element of signatures.json."""
        entry = {"keyid": self.key_id, "sig": base64.b64encode(self.signature).decode()}
        return entry if self.expires is None else entry | {"expires": self.expires}


@dataclass(frozen=True)
class Signatures:
    """The content of signatures.json; no signature in it has been checked yet.

    Attributes:
        signatures: at most 16 over the manifest, each of another key.
        expiries: at most 16 over a time, each of another key.
    """

    signatures: tuple[SignedBy, ...] = ()
    expiries: tuple[SignedBy, ...] = ()

    def with_signature(self, key_id: str, signature: bytes) -> Signatures:
        """A copy with this signature, in place of an earlier one of the same key."""
        return Signatures(_with(self.signatures, SignedBy(key_id, signature)), self.expiries)

    def with_expiry(self, key_id: str, signature: bytes, expires: str) -> Signatures:
        """A copy with this statement, in place of an earlier one of the same key."""
        return Signatures(
            self.signatures, _with(self.expiries, SignedBy(key_id, signature, expires))
        )

    def expiry(self, key_id: str) -> SignedBy | None:
        """The unchecked statement under the id of a key, or None."""
        return next((stated for stated in self.expiries if stated.key_id == key_id), None)

    def to_bytes(self) -> bytes:
        """The canonical bytes of signatures.json."""
        return dump_json(
            {
                "expiries": [stated.to_json() for stated in self.expiries],
                "payloadType": PAYLOAD_TYPE,
                "signatures": [signed.to_json() for signed in self.signatures],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Signatures:
        """Read signatures.json within its bounds; FormatError where it violates SPEC.md."""
        reader = load_json(data, "signatures.json", MAX_SIGNATURES)
        kind = reader.text("payloadType", limit=128)
        if kind != PAYLOAD_TYPE:
            raise FormatError(f"signatures.json signs something else: {kind!r}")
        signatures = reader.array("signatures", least=0, most=MAX_SIGNERS)
        expiries = reader.array("expiries", least=0, most=MAX_SIGNERS)
        reader.end()
        return cls(_read(signatures, expiring=False), _read(expiries, expiring=True))


def _with(kept: tuple[SignedBy, ...], new: SignedBy) -> tuple[SignedBy, ...]:
    others = [signed for signed in kept if signed.key_id != new.key_id]
    if len(others) >= MAX_SIGNERS:
        raise FormatError(f"a sealed model has at most {MAX_SIGNERS} signatures")
    return (*others, new)


def _read(items: list[Any], *, expiring: bool) -> tuple[SignedBy, ...]:
    signatures = []
    for item in items:
        entry = JsonReader(item, "a signature in signatures.json")
        key_id = entry.hex("keyid", length=48).hex()
        expires = entry.text("expires", limit=20) if expiring else None
        check_time(expires, "expires in signatures.json")
        signatures.append(SignedBy(key_id, entry.base64("sig", limit=MAX_SIGNATURE), expires))
        entry.end()
    if len({signed.key_id for signed in signatures}) != len(signatures):
        raise FormatError("signatures.json has two signatures of one key")
    return tuple(signatures)
