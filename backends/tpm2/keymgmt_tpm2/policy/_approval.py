"""Approvals: boot states that an approver signed, so that an update locks no device out.

A JSON file. It is made offline (``keymgmt tpm policy sign``), put on the device
(``policy install``), and checked by the TPM itself (PolicyAuthorize) each time it is used: a forged
one opens nothing wherever it lies. The signature is ECDSA P-256 with SHA-256 over the approved
policy digest and the ref, so any signer of keymgmt with such a key can make one.

A unified kernel image brings its own, in its section .pcrsig: ``systemd-measure sign`` makes it
with an RSA key, and systemd leaves it in /run/systemd/tpm2-pcr-signature.json.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)

from keymgmt.backend import (
    FormatError,
    JsonReader,
    ProviderError,
    ProviderUnavailable,
    replace_file,
)
from keymgmt_tpm2._keys import read_if_there, read_json
from keymgmt_tpm2._structures import ecdsa_pair, sha256
from keymgmt_tpm2.policy._policy import (
    BANKS,
    Approver,
    Counter,
    PcrState,
    approved_digest,
    compare,
    parse_pcrs,
)

__all__ = [
    "AnyApproval",
    "Approval",
    "BootSignature",
    "approval_files",
    "boot_signatures",
    "install",
    "installed",
]

log: Final = logging.getLogger("keymgmt.tpm2")
FORMAT: Final = "keymgmt.tpm2-approval/1"
_FILE: Final = re.compile(r"[0-9a-f]{64}\.json")


@dataclass(frozen=True)
class Approval:
    """An approved boot state: PCR values, a counter if there is one, approver, DER signature."""

    pcrs: PcrState
    counter: Counter | None
    approver: Approver
    signature: bytes = field(repr=False)

    @staticmethod
    def message(pcrs: PcrState, counter: Counter | None, approver: Approver) -> bytes:
        """The bytes that the approver signs."""
        return approved_digest(pcrs, counter, approver) + approver.ref.encode()

    @property
    def bank(self) -> str:
        """The bank of its PCRs."""
        return self.pcrs.bank

    @property
    def indices(self) -> tuple[int, ...]:
        """Its PCRs."""
        return self.pcrs.indices

    def difference(self, now: PcrState | None) -> str:
        """Which PCRs have other values ``now``, in words; empty where none has."""
        return compare(self.pcrs, now)

    @property
    def id(self) -> str:
        """Its id: SHA-256 over approver, ref and what is approved, in hex."""
        name = sha256(self.approver.structure().name, self.approver.ref.encode())
        return sha256(name, self.digest).hex()

    @property
    def digest(self) -> bytes:
        """The approved policy digest."""
        return approved_digest(self.pcrs, self.counter, self.approver)

    def check(self) -> None:
        """ConfigError unless the signature is the approver's; the TPM checks it again."""
        message = self.message(self.pcrs, self.counter, self.approver)
        self.approver.check(message, self.signature, "approval")

    def __str__(self) -> str:
        if self.counter is None:
            return str(self.pcrs)
        return f"{self.pcrs} while counter {self.counter.index:#010x} <= {self.counter.value}"

    def to_json(self) -> dict[str, Any]:
        """The content of the approval file."""
        return {
            "format": FORMAT,
            "state": self.pcrs.to_json(),
            "counter": self.counter.to_json() if self.counter else None,
            "approver": self.approver.to_json(),
            "signature": base64.b64encode(self.signature).decode(),
        }

    def to_bytes(self) -> bytes:
        """The approval file."""
        return json.dumps(self.to_json(), indent=2).encode() + b"\n"

    @classmethod
    def read(cls, data: JsonReader) -> Approval:
        """Read an approval file; ValueError or FormatError where it is wrong."""
        data.version(FORMAT, "a newer keymgmt may have written it")
        state = JsonReader(data.members("state"), "the state")
        approver = JsonReader(data.members("approver"), "the approver")
        counter = data.object_or_none("counter")
        approval = cls(
            PcrState.read(state),
            Counter.read(counter) if counter else None,
            Approver.read(approver),
            data.base64("signature", limit=128),
        )
        data.end()
        approval.approver.check_ecdsa()
        ecdsa_pair(approval.signature)
        return approval


@dataclass(frozen=True)
class BootSignature:
    """One signed PCR policy of a unified kernel image: which PCRs, and the digest of their values.

    The signature is RSASSA-PKCS1-v1_5 with SHA-256 over the digest (systemd-measure(1)).
    """

    bank: str
    indices: tuple[int, ...]
    digest: bytes
    approver: Approver
    signature: bytes = field(repr=False)
    counter: Counter | None = None

    def difference(self, now: PcrState | None) -> str:
        """In words, whether the PCRs have other values ``now``; empty where not."""
        if now is None:
            return f"this TPM has no PCR bank {self.bank}"
        state = PcrState(self.bank, {index: now.values[index] for index in self.indices})
        return (
            ""
            if approved_digest(state, None, self.approver) == self.digest
            else f"{self} is of another kernel"
        )

    def __str__(self) -> str:
        return f"{self.bank}:{','.join(map(str, self.indices))} of the kernel's .pcrsig"


AnyApproval: TypeAlias = Approval | BootSignature


def boot_signatures(path: Path, approver: Approver) -> list[BootSignature]:
    """The policies of an approver in a ``.pcrsig``; empty where the booted kernel has none.

    An entry whose digest or signature has another size is passed over and said.

    Raises:
        ProviderUnavailable: it is there, and is unreadable or no such file.
    """
    if approver.ref:
        return []  # systemd signs with none
    content = read_if_there(path, "file of signed PCRs", "any")
    # systemd's fingerprint is of the key's own structure, without the algorithm before it.
    key = load_der_public_key(approver.public_key)
    if content is None or not isinstance(key, rsa.RSAPublicKey):
        return []
    fingerprint = sha256(key.public_bytes(Encoding.DER, PublicFormat.PKCS1)).hex()
    try:
        signatures = [
            BootSignature(
                bank,
                parse_pcrs(",".join(map(str, entry["pcrs"])))[1],
                bytes.fromhex(entry["pol"]),
                approver,
                base64.b64decode(entry["sig"], validate=True),
            )
            for bank, entries in json.loads(content).items()
            if bank in BANKS
            for entry in entries
            if entry["pkfp"] == fingerprint
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ProviderUnavailable(
            f"{path} has no signed PCR policies: {error!r}",
            hint="systemd-measure sign makes one; see pcr_signatures in the provider's table",
        ) from error
    # What has another size fits into no structure of a TPM, and must not hide what does.
    fitting = [
        each
        for each in signatures
        if (len(each.digest), len(each.signature)) == (32, key.key_size // 8)
    ]
    if len(fitting) < len(signatures):
        log.warning(
            "%s: %d entries of another size are passed over", path, len(signatures) - len(fitting)
        )
    return fitting


def approval_files(directory: Path) -> list[Path]:
    """The files of installed approvals; empty where their directory is missing."""
    folder = directory / "approvals"
    try:
        return sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ProviderUnavailable(f"cannot list {folder}: {error.strerror}") from error


def installed(directory: Path) -> list[Approval]:
    """Every approval of a key directory that can be read; a damaged one is passed over and said."""
    approvals = []
    for path in approval_files(directory):
        try:
            if (data := read_json(path, "approval")) is not None:
                approvals.append(Approval.read(data))
        except (ProviderError, FormatError, ValueError) as error:
            log.warning("the approval %s is passed over: %s", path, error)
    return approvals


def install(directory: Path, approval: Approval) -> Path:
    """Put an approval into the key directory; the same approval again is the same file."""
    folder = directory / "approvals"
    for made in (directory, folder):  # one by one: `parents` takes no mode
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{approval.id}.json"
    replace_file(path, approval.to_bytes(), mode=0o600)
    return path
