"""What a key asks for before the TPM uses it, and the digests that say so.

Strategy: a policy is named data, and its digest is computed here, without a TPM, exactly as the
TPM's own commands would (Part 3, 23). The key directory may lie about a policy; the digest that
the TPM enforces is in the key, so ``Policy.check`` compares them before anything is asked of it.

    none             the empty auth value; userWithAuth set
    PIN              PolicyAuthValue
    PCR              PolicyPCR, then PolicyAuthValue where there is a PIN
    signed           PolicyAuthorize(approver, ref), then PolicyPCR where PCRs are named as well,
                     then PolicyAuthValue where there is a PIN;
                     an approval signs PolicyPCR, then PolicyNV(counter <= v) where there is one

What comes behind PolicyAuthorize is outside of what is approved, so it stays required.
PolicyPassword gives the same digest and would send the PIN in clear: it is never used.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keymgmt.backend import JsonReader
from keymgmt_tpm2._structures import Public, sha256, sized, u16, u32, verifier_public

__all__ = [
    "BANKS",
    "WEAK_HINT",
    "Approver",
    "Counter",
    "PcrState",
    "Policy",
    "approved_digest",
    "compare",
    "parse_pcrs",
    "weakness",
]

BANKS: Final = {"sha1": (0x0004, 20), "sha256": (0x000B, 32), "sha384": (0x000C, 48)}
_START: Final = bytes(32)
_CC_AUTHORIZE: Final = 0x16A
_CC_AUTH_VALUE: Final = 0x16B
_CC_NV: Final = 0x149
_CC_PCR: Final = 0x17F
_UNSIGNED_LE: Final = 9
NV_WRITTEN: Final = 0x20000000
NV_COUNTER: Final = 0x02060012
"""TPMA_NV of our counters: ownerWrite, ownerRead, authRead, noDA, type counter."""
NV_ORDINARY: Final = 0x02060002
"""The same of type ordinary: the owner sets it to what he likes, also back."""


def parse_pcrs(text: str) -> tuple[str, tuple[int, ...]]:
    """Read ``[BANK:]0,2,7`` (bank sha256 if not named) into bank and sorted indices; ValueError."""
    bank, colon, listed = text.rpartition(":")
    bank = bank if colon else "sha256"
    if bank not in BANKS:
        raise ValueError(f"no PCR bank {bank[:20]!r}; known: {', '.join(BANKS)}")
    try:
        indices = sorted({int(part) for part in listed.split(",")})
    except ValueError:
        raise ValueError(f"not a list of PCRs: {text[:80]!r}; write 0,2,7") from None
    if not indices or indices[0] < 0 or indices[-1] > 23:
        raise ValueError("PCRs are numbered from 0 to 23")
    return bank, tuple(indices)


@dataclass(frozen=True)
class PcrState:
    """Values of some PCRs of one bank, by index."""

    bank: str
    values: Mapping[int, bytes]

    def __post_init__(self) -> None:
        if self.bank not in BANKS or not self.values:
            raise ValueError("PCR values name a known bank and at least one PCR")
        length = BANKS[self.bank][1]
        if not all(0 <= i <= 23 and len(v) == length for i, v in self.values.items()):
            raise ValueError(f"a PCR of {self.bank} has {length} bytes and an index up to 23")

    @property
    def indices(self) -> tuple[int, ...]:
        """The PCRs, in order."""
        return tuple(sorted(self.values))

    @property
    def selection(self) -> bytes:
        """The TPML_PCR_SELECTION of these PCRs."""
        bitmap = bytearray(3)
        for index in self.indices:
            bitmap[index // 8] |= 1 << index % 8
        return u32(1) + u16(BANKS[self.bank][0]) + b"\x03" + bytes(bitmap)

    def __str__(self) -> str:
        return f"{self.bank}:{','.join(map(str, self.indices))}"

    def extend(self, digest: bytes) -> bytes:
        """The policy digest after PolicyPCR."""
        values = sha256(*(self.values[index] for index in self.indices))
        return sha256(digest, u32(_CC_PCR), self.selection, values)

    def differences(self, now: PcrState) -> tuple[int, ...]:
        """The PCRs whose value ``now`` is another one."""
        return tuple(i for i in self.indices if now.values.get(i) != self.values[i])

    def to_json(self) -> dict[str, Any]:
        """``{bank, pcrs: {index: hex}}``."""
        return {"bank": self.bank, "pcrs": {str(i): self.values[i].hex() for i in self.indices}}

    @classmethod
    def read(cls, data: JsonReader) -> PcrState:
        """Reverse ``to_json``; ValueError or FormatError."""
        bank = data.text("bank", limit=16)
        listed = data.texts("pcrs", most=24, key_limit=2, limit=128)
        data.end()
        return cls(bank, {int(index): bytes.fromhex(value) for index, value in listed.items()})


@dataclass(frozen=True)
class Counter:
    """An NV index, and the highest value in it at which an approval still counts.

    A counter is of one TPM; an ordinary index has the value that a fleet's enrolment gave it.
    """

    index: int
    value: int
    ordinary: bool = False

    def __post_init__(self) -> None:
        if not 0x01000000 <= self.index <= 0x01FFFFFF or not 0 <= self.value < 1 << 64:
            raise ValueError("an NV counter has an index 0x01...... and a 64-bit value")

    @property
    def operand(self) -> bytes:
        """The value as PolicyNV compares it: 8 bytes, big-endian."""
        return self.value.to_bytes(8, "big")

    def extend(self, digest: bytes) -> bytes:
        """The policy digest after PolicyNV(counter <= value)."""
        # The name of an index that was written once, as a counter is before its first read.
        attributes = (NV_ORDINARY if self.ordinary else NV_COUNTER) | NV_WRITTEN
        public = u32(self.index) + u16(0x000B) + u32(attributes)
        name = u16(0x000B) + sha256(public, sized(b""), u16(8))
        arguments = sha256(self.operand, u16(0), u16(_UNSIGNED_LE))
        return sha256(digest, u32(_CC_NV), arguments, name)

    def to_json(self) -> dict[str, Any]:
        """``{index, value, ordinary}``."""
        index = f"{self.index:#010x}"
        return {"index": index, "value": str(self.value), "ordinary": self.ordinary}

    @classmethod
    def read(cls, data: JsonReader) -> Counter:
        """Reverse ``to_json``; ValueError or FormatError."""
        index, value = int(data.text("index", limit=10), 16), int(data.text("value", limit=20))
        counter = cls(index, value, data.flag("ordinary"))
        data.end()
        return counter


def approved_digest(pcrs: PcrState, counter: Counter | None) -> bytes:
    """What an approver signs (followed by the ref): a boot state, and a counter if there is one."""
    digest = pcrs.extend(_START)
    return counter.extend(digest) if counter else digest


@dataclass(frozen=True)
class Approver:
    """Who may approve boot states: a public key, and a ref that its approvals carry.

    An ECDSA P-256 key signs approvals, an RSA key the .pcrsig of unified kernel images.
    """

    public_key: bytes = field(repr=False)
    ref: str = ""

    def __post_init__(self) -> None:
        if len(self.ref.encode()) > 64:
            raise ValueError("the ref of an approver has at most 64 bytes")
        self.structure()

    def structure(self) -> Public:
        """The key as a TPM loads it; ValueError where it is none that a TPM takes."""
        try:
            key = load_der_public_key(self.public_key)
        except UnsupportedAlgorithm as error:
            raise ValueError(f"a public key of another kind: {error}") from error
        return verifier_public(key)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key in DER, in hex."""
        return sha256(self.public_key).hex()

    def extend(self, digest: bytes) -> bytes:
        """The policy digest after PolicyAuthorize, which replaces what was before it."""
        del digest
        return sha256(sha256(_START, u32(_CC_AUTHORIZE), self.structure().name), self.ref.encode())

    def to_json(self) -> dict[str, Any]:
        """``{public_key, ref}``."""
        return {"public_key": base64.b64encode(self.public_key).decode(), "ref": self.ref}

    @classmethod
    def read(cls, data: JsonReader) -> Approver:
        """Reverse ``to_json``; ValueError or FormatError."""
        approver = cls(data.base64("public_key", limit=1024), data.text("ref", limit=64))
        data.end()
        return approver


@dataclass(frozen=True)
class Policy:
    """What one key asks for; all three empty is the policy *none*.

    PCRs that are named beside an approver hold whatever is approved.
    """

    pin: bool = False
    pcrs: PcrState | None = None
    approver: Approver | None = None

    @property
    def digest(self) -> bytes:
        """The authPolicy of the key: 32 bytes, or empty where there is none."""
        digest = _START
        for step in (self.approver, self.pcrs):
            if step:
                digest = step.extend(digest)
        if self.pin:
            digest = sha256(digest, u32(_CC_AUTH_VALUE))
        return digest if digest != _START else b""

    def __str__(self) -> str:
        words = []
        if self.pcrs:
            words.append(f"PCR {self.pcrs} as they were")
        if self.approver:
            name = self.approver.structure().name.hex()[4:20]
            ref = f", ref {self.approver.ref!r}" if self.approver.ref else ""
            words.append(f"PCRs approved by {name}{ref}")
        if self.pin:
            words.append("PIN")
        return " and ".join(words) or "none"

    def lines(self) -> list[str]:
        """Everything that it asks for: each PCR's value, and the whole fingerprint of an approver.

        The fingerprint is SHA-256 of the key's DER SubjectPublicKeyInfo, in hex.
        """
        said = []
        if self.pcrs:
            bank, values = self.pcrs.bank, self.pcrs.values
            said += [f"PCR {bank}:{i} is {values[i].hex()}" for i in self.pcrs.indices]
        if self.approver:
            ref = f", ref {self.approver.ref!r}" if self.approver.ref else ""
            said.append(f"PCRs approved by {self.approver.fingerprint}{ref}")
        return [*said, *(["PIN"] if self.pin else [])] or ["none"]

    def to_json(self) -> dict[str, Any]:
        """A table with ``pin``, ``pcrs`` and ``approver``."""
        return {
            "pin": self.pin,
            "pcrs": self.pcrs.to_json() if self.pcrs else None,
            "approver": self.approver.to_json() if self.approver else None,
        }

    @classmethod
    def read(cls, data: JsonReader) -> Policy:
        """Reverse ``to_json``; ValueError or FormatError."""
        pcrs, approver = data.object_or_none("pcrs"), data.object_or_none("approver")
        policy = cls(
            data.flag("pin"),
            PcrState.read(pcrs) if pcrs else None,
            Approver.read(approver) if approver else None,
        )
        data.end()
        return policy


def compare(wanted: PcrState, now: PcrState | None) -> str:
    """Which PCRs differ, in words; empty where none does. ``now`` is None without that bank."""
    if now is None:
        return f"this TPM has no PCR bank {wanted.bank}"
    return "; ".join(
        f"PCR {i} of {wanted.bank} is {_short(now.values.get(i))}, not {_short(wanted.values[i])}"
        for i in wanted.differences(now)
    )


_RESETTABLE: Final = frozenset({16, 23})
"""Any program may reset them (PC Client Platform TPM Profile, 4.6.1)."""
WEAK_HINT: Final = "name PCRs that the firmware measures into, such as 7"


def weakness(state: PcrState) -> str | None:
    """Why binding to these values keeps nobody out, or None if it may."""
    if _RESETTABLE.issuperset(state.indices):
        return f"{state} are PCRs that any program can set, so they keep nobody out"
    # All ones is what a PCR of a late launch holds that never took place.
    if all(len(set(value)) == 1 and value[0] in (0, 0xFF) for value in state.values.values()):
        return f"nothing was measured into {state}, so every boot that measures nothing opens"
    return None


def _short(value: bytes | None) -> str:
    return f"{value.hex()[:16]}..." if value else "missing"
