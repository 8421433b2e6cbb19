"""The policy under which a TPM uses a key, and its digests.

Strategy: a policy is named data, and its digest is computed here, without a TPM, exactly as the
TPM's own commands would (Part 3, 23). The key directory may lie about a policy; the digest that
the TPM enforces is in the key, so ``Policy.check`` compares them before anything is asked of it.

    none             the empty auth value; userWithAuth set
    PIN              PolicyAuthValue
    PCR              PolicyPCR, then PolicyAuthValue where there is a PIN
    signed           PolicyAuthorize(approver, ref), then PolicyPCR where PCRs are named as well,
                     then PolicyAuthValue where there is a PIN;
                     an approval signs PolicyPCR, then PolicyNV(counter <= v) where there is one
    counter          PolicyAuthorize(approver, ref of counters); what raises it to n signs
                     PolicyNV(counter <= n - 1), then PolicyCpHash(NV_Increment of it), and what
                     starts it PolicyNvWritten(NO), then PolicyCpHash(the same, unwritten)

What comes behind PolicyAuthorize is outside of what is approved, so it stays required.
PolicyPassword gives the same digest and would send the PIN in clear: it is never used.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keymgmt.backend import ConfigError, JsonReader
from keymgmt_tpm2._structures import ALG_RSA, Public, sha256, u16, u32, verifier_public
from keymgmt_tpm2.policy._index import NV_COUNTER, NvIndex

__all__ = [
    "BANKS",
    "WEAK_HINT",
    "Approver",
    "Counter",
    "PcrState",
    "Policy",
    "approved_digest",
    "compare",
    "first_digest",
    "increment_hash",
    "parse_pcrs",
    "raise_digest",
    "weakness",
]

BANKS: Final = {"sha1": (0x0004, 20), "sha256": (0x000B, 32), "sha384": (0x000C, 48)}
_START: Final = bytes(32)
_CC_AUTHORIZE: Final = 0x16A
_CC_AUTH_VALUE: Final = 0x16B
_CC_CP_HASH: Final = 0x16E
_CC_NV: Final = 0x149
_CC_NV_INCREMENT: Final = 0x134
_CC_NV_WRITTEN: Final = 0x18F
_CC_PCR: Final = 0x17F
_UNSIGNED_LE: Final = 9
_COUNTER_REF: Final = b"\xff"
"""What begins the ref of a counter and, being no UTF-8, of no key: an approval of a boot state
raises no counter, and the other way about."""


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

    @property
    def digest(self) -> bytes:
        """SHA-256 of the values: in a policy, and in a quote by a key that signs with SHA-256."""
        return sha256(*(self.values[index] for index in self.indices))

    def extend(self, digest: bytes) -> bytes:
        """The policy digest after PolicyPCR."""
        return sha256(digest, u32(_CC_PCR), self.selection, self.digest)

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
    """A counter of the approver's, and the highest value of it at which an approval counts."""

    index: int
    value: int

    def __post_init__(self) -> None:
        if not 0x01000000 <= self.index <= 0x01FFFFFF or not 0 <= self.value < 1 << 64:
            raise ValueError("an NV counter has an index 0x01...... and a 64-bit value")

    @property
    def operand(self) -> bytes:
        """The value as PolicyNV compares it: 8 bytes, big-endian."""
        return self.value.to_bytes(8, "big")

    def nv_index(self, approver: Approver) -> NvIndex:
        """The NV index, which only that approver moves."""
        return NvIndex(self.index, NV_COUNTER, 8, approver.counter_policy)

    def extend(self, digest: bytes, approver: Approver) -> bytes:
        """The policy digest after PolicyNV(counter <= value)."""
        arguments = sha256(self.operand, u16(0), u16(_UNSIGNED_LE))
        return sha256(digest, u32(_CC_NV), arguments, self.nv_index(approver).name)

    def to_json(self) -> dict[str, Any]:
        """``{index, value}``."""
        return {"index": f"{self.index:#010x}", "value": str(self.value)}

    @classmethod
    def read(cls, data: JsonReader) -> Counter:
        """Reverse ``to_json``; ValueError or FormatError."""
        counter = cls(int(data.text("index", limit=10), 16), int(data.text("value", limit=20)))
        data.end()
        return counter


@dataclass(frozen=True)
class Approver:
    """An approver of boot states: a public key, and a ref that its approvals carry.

    An ECDSA P-256 key signs approvals, an RSA key the .pcrsig of unified kernel images.
    """

    public_key: bytes = field(repr=False)
    ref: str = ""

    def __post_init__(self) -> None:
        if len(self.ref.encode()) > 63:
            raise ValueError("the ref of an approver has at most 63 bytes")
        self.structure()

    def structure(self) -> Public:
        """The key as a TPM loads it; ValueError where it is none that a TPM takes."""
        try:
            key = load_der_public_key(self.public_key)
        except UnsupportedAlgorithm as error:
            raise ValueError(f"a public key of another kind: {error}") from error
        return verifier_public(key)

    def check_ecdsa(self) -> None:
        """ValueError unless the key signs approvals: an RSA key signs those of kernels alone."""
        if self.structure().kind == ALG_RSA:
            raise ValueError("approvals are signed by an ECDSA P-256 key")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key in DER, in hex."""
        return sha256(self.public_key).hex()

    def extend(self, digest: bytes) -> bytes:
        """The policy digest after PolicyAuthorize, which replaces what was before it."""
        del digest
        return self._authorize(self.ref.encode())

    def _authorize(self, ref: bytes) -> bytes:
        return sha256(sha256(_START, u32(_CC_AUTHORIZE), self.structure().name), ref)

    @property
    def counter_ref(self) -> bytes:
        """The ref of the approver's signatures for counters."""
        return _COUNTER_REF + self.ref.encode()

    @property
    def counter_policy(self) -> bytes:
        """The authPolicy of counters that only this approver moves."""
        return self._authorize(self.counter_ref)

    def check(self, message: bytes, signature: bytes, label: str) -> None:
        """ConfigError unless the approver signed; a TPM checks it again."""
        key = self.structure().key()
        assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 - check_ecdsa
        try:
            key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise ConfigError(
                f"the {label} is not signed by the key that it names", hint="have it signed again"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """``{public_key, ref}``."""
        return {"public_key": base64.b64encode(self.public_key).decode(), "ref": self.ref}

    @classmethod
    def read(cls, data: JsonReader) -> Approver:
        """Reverse ``to_json``; ValueError or FormatError."""
        approver = cls(data.base64("public_key", limit=1024), data.text("ref", limit=64))
        data.end()
        return approver


def approved_digest(pcrs: PcrState, counter: Counter | None, approver: Approver) -> bytes:
    """What an approver signs (followed by the ref): a boot state, and a counter if there is one."""
    digest = pcrs.extend(_START)
    return counter.extend(digest, approver) if counter else digest


def first_digest(counter: Counter, approver: Approver) -> bytes:
    """What an approver signs (followed by the ref) to start a counter: its first increment."""
    unwritten = sha256(_START, u32(_CC_NV_WRITTEN), b"\0")
    return _increments(unwritten, counter.nv_index(approver).new_name)


def raise_digest(counter: Counter, approver: Approver) -> bytes:
    """What an approver signs to raise a counter to ``counter.value``: increments while lower."""
    lower = Counter(counter.index, counter.value - 1)
    return _increments(lower.extend(_START, approver), counter.nv_index(approver).name)


def increment_hash(name: bytes) -> bytes:
    """The cpHash of TPM2_NV_Increment of the index with this name, and of no other one."""
    return sha256(u32(_CC_NV_INCREMENT), name, name)


def _increments(digest: bytes, name: bytes) -> bytes:
    return sha256(digest, u32(_CC_CP_HASH), increment_hash(name))


@dataclass(frozen=True)
class Policy:
    """The policy of one key; with all three empty it is the policy *none*.

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

    @property
    def weakness(self) -> str | None:
        """Why its PCRs keep nobody out, or None if they may, or if it has none."""
        return weakness(self.pcrs) if self.pcrs else None

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
        """All conditions of the policy: each PCR's value, and the whole fingerprint of an approver.

        The fingerprint is SHA-256 of the key's DER SubjectPublicKeyInfo, in hex.
        """
        lines = []
        if self.pcrs:
            bank, values = self.pcrs.bank, self.pcrs.values
            lines += [f"PCR {bank}:{i} is {values[i].hex()}" for i in self.pcrs.indices]
        if self.approver:
            ref = f", ref {self.approver.ref!r}" if self.approver.ref else ""
            lines.append(f"PCRs approved by {self.approver.fingerprint}{ref}")
        return [*lines, *(["PIN"] if self.pin else [])] or ["none"]

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
        for i in wanted.indices
        if now.values.get(i) != wanted.values[i]
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
