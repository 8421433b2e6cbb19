"""signatures.json: who made it. Detached DSSE signatures over the bytes of manifest.json.

The signed bytes are DSSE's pre-authentication encoding (github.com/secure-systems-lab/dsse,
protocol.md) of payload type and manifest; the payload itself stays in manifest.json. The algorithm
follows from the trusted public key and from nothing in the file.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Final

from keymgmt._verify import pre_authentication
from keymgmt.errors import FormatError
from keymgmt.sealed.canonical import Reader, dump, load

__all__ = ["MAX_SIGNATURES", "Signatures", "SignedBy", "signed_bytes"]

PAYLOAD_TYPE: Final = "application/vnd.keymgmt.manifest+json"
MAX_SIGNATURES: Final = 1 << 18
MAX_SIGNERS: Final = 16
MAX_SIGNATURE: Final = 8192


def signed_bytes(manifest: bytes) -> bytes:
    """What a publisher signs: DSSE's encoding of the payload type and manifest.json."""
    return pre_authentication(PAYLOAD_TYPE, manifest)


@dataclass(frozen=True)
class SignedBy:
    """One signature: the SHA-256 of the signer's DER public key in hex, and the signature."""

    key_id: str
    signature: bytes = field(repr=False)


@dataclass(frozen=True)
class Signatures:
    """The content of signatures.json: at most 16 signatures, none of them checked yet."""

    signatures: tuple[SignedBy, ...] = ()

    def with_signature(self, key_id: str, signature: bytes) -> Signatures:
        """A copy with this signature, in place of an earlier one of the same key."""
        kept = [signed for signed in self.signatures if signed.key_id != key_id]
        if len(kept) >= MAX_SIGNERS:
            raise FormatError(f"a sealed model has at most {MAX_SIGNERS} signatures")
        return Signatures((*kept, SignedBy(key_id, signature)))

    def to_bytes(self) -> bytes:
        """The canonical bytes of signatures.json."""
        return dump(
            {
                "payloadType": PAYLOAD_TYPE,
                "signatures": [
                    {"keyid": signed.key_id, "sig": base64.b64encode(signed.signature).decode()}
                    for signed in self.signatures
                ],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Signatures:
        """Read signatures.json within its bounds; FormatError where it is not as SPEC says."""
        reader = load(data, "signatures.json", MAX_SIGNATURES)
        kind = reader.text("payloadType", limit=128)
        if kind != PAYLOAD_TYPE:
            raise FormatError(f"signatures.json signs something else: {kind!r}")
        items = reader.array("signatures", least=0, most=MAX_SIGNERS)
        reader.end()
        found = []
        for item in items:
            entry = Reader(item, "a signature in signatures.json")
            key_id = entry.hex("keyid", length=32).hex()
            found.append(SignedBy(key_id, entry.base64("sig", limit=MAX_SIGNATURE)))
            entry.end()
        if len({signed.key_id for signed in found}) != len(found):
            raise FormatError("signatures.json has two signatures of one key")
        return cls(tuple(found))
