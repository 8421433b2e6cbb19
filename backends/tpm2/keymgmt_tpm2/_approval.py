"""An approval: a boot state that an approver signed, so that an update locks no device out.

A JSON file. It is made offline (``keymgmt tpm policy sign``), put on the device
(``policy install``), and checked by the TPM itself (PolicyAuthorize) each time it is used: a forged
one opens nothing wherever it lies. The signature is ECDSA P-256 with SHA-256 over the approved
policy digest and the ref, so any signer of keymgmt with such a key can make one.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from keymgmt.backend import ConfigError, replace_file
from keymgmt_tpm2._keys import approval_files, read_json
from keymgmt_tpm2._policy import Approver, Counter, PcrState, approved_digest
from keymgmt_tpm2._structures import sha256

__all__ = ["Approval", "install", "installed"]

FORMAT: Final = "keymgmt.tpm2-approval/1"


@dataclass(frozen=True)
class Approval:
    """An approved boot state: PCR values, a counter if there is one, approver, DER signature."""

    pcrs: PcrState
    counter: Counter | None
    approver: Approver
    signature: bytes = field(repr=False)

    @staticmethod
    def message(pcrs: PcrState, counter: Counter | None, approver: Approver) -> bytes:
        """What the approver signs."""
        return approved_digest(pcrs, counter) + approver.ref.encode()

    @property
    def digest(self) -> bytes:
        """The approved policy digest."""
        return approved_digest(self.pcrs, self.counter)

    def check(self) -> None:
        """ConfigError unless the signature is the approver's; the TPM checks it again."""
        key = self.approver.structure().key()
        message = self.message(self.pcrs, self.counter, self.approver)
        assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 - as structure() made it
        try:
            key.verify(self.signature, message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise ConfigError(
                "the approval is not signed by the key that it names",
                hint="sign it again with: keymgmt tpm policy sign",
            ) from error

    def rs(self) -> tuple[bytes, bytes]:
        """The signature as a TPM takes it: r and s, 32 bytes each; ValueError."""
        r, s = decode_dss_signature(self.signature)
        return r.to_bytes(32, "big"), s.to_bytes(32, "big")

    def __str__(self) -> str:
        if self.counter is None:
            return str(self.pcrs)
        return f"{self.pcrs} while counter {self.counter.index:#010x} <= {self.counter.value}"

    def to_bytes(self) -> bytes:
        """The approval file."""
        data = {
            "format": FORMAT,
            "state": self.pcrs.to_json(),
            "counter": self.counter.to_json() if self.counter else None,
            "approver": self.approver.to_json(),
            "signature": base64.b64encode(self.signature).decode(),
        }
        return json.dumps(data, indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str) -> Approval:
        """Read an approval; ConfigError naming ``source`` where it is wrong."""
        try:
            if data.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")  # noqa: TRY301
            counter = data["counter"]
            approval = cls(
                PcrState.from_json(data["state"]),
                Counter.from_json(counter) if counter is not None else None,
                Approver.from_json(data["approver"]),
                base64.b64decode(data["signature"], validate=True),
            )
            approval.rs()
        except (ValueError, KeyError, TypeError, OverflowError, binascii.Error) as error:
            raise ConfigError(f"{source} is no approval: {error}") from error
        return approval


def installed(directory: Path) -> list[Approval]:
    """Every approval of a key directory that can be read; a damaged one is passed over."""
    found = []
    for path in approval_files(directory):
        try:
            data = read_json(path)
            if data is not None:
                found.append(Approval.from_json(data, str(path)))
        except ConfigError:
            continue
    return found


def install(directory: Path, approval: Approval) -> Path:
    """Put an approval where the provider finds it; the same one twice is one file."""
    folder = directory / "approvals"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = sha256(approval.approver.structure().name, approval.approver.ref.encode())
    path = folder / f"{sha256(name, approval.digest).hex()}.json"
    replace_file(path, approval.to_bytes(), mode=0o600)
    return path
