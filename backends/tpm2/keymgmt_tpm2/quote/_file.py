"""The evidence of a TPM as bytes: JSON with all that is needed to check it, and nothing secret.

ak           TPMT_PUBLIC of the attestation key
attest       TPMS_ATTEST of a quote
signature    DER ECDSA signature of the attestation key over it
state        values of the PCRs that are quoted: {bank, pcrs}
approvals    approvals of that state which the device has, as objects
event_log    what the firmware measured; empty where it is not sent
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from keymgmt.backend import FormatError, JsonReader, dump_json, load_json
from keymgmt_tpm2._structures import Public, Reader
from keymgmt_tpm2.enroll._attest import ATTEST_QUOTE, Statement, check_ak, check_statement
from keymgmt_tpm2.enroll._certificates import AttestationError
from keymgmt_tpm2.policy._approval import Approval
from keymgmt_tpm2.policy._policy import PcrState

__all__ = ["MAX_APPROVALS", "MAX_EVIDENCE", "MAX_LOG", "Quote"]

_FORMAT: Final = "keymgmt.tpm2-quote/1"
MAX_LOG: Final = 256 << 10
MAX_EVIDENCE: Final = 400 << 10
MAX_PART: Final = 4096
MAX_APPROVALS: Final = 8


@dataclass(frozen=True)
class Quote:
    """The statement of a TPM about its PCRs, with the approvals and event log of its device.

    Attributes:
        ak: the attestation key.
        attest: TPMS_ATTEST.
        signature: DER ECDSA signature over it.
        state: the values of the PCRs.
        approvals: approvals of that state; their signers are not checked yet.
        event_log: the firmware's event log, as the device sent it, or empty.
    """

    ak: Public
    attest: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    state: PcrState
    approvals: tuple[Approval, ...] = ()
    event_log: bytes = field(default=b"", repr=False)

    def to_bytes(self) -> bytes:
        """The evidence."""
        texts = {
            "ak": self.ak.raw,
            "attest": self.attest,
            "signature": self.signature,
            "event_log": self.event_log,
        }
        return dump_json(
            {
                "format": _FORMAT,
                **{name: base64.b64encode(content).decode() for name, content in texts.items()},
                "state": self.state.to_json(),
                "approvals": [each.to_json() for each in self.approvals],
            }
        )

    @classmethod
    def verify(cls, evidence: bytes, report_data: bytes) -> Quote:
        """Read the evidence of a device, and check that its attestation key quoted this state.

        This does not prove that the key is in a TPM: the enrolled keys are known by their names.

        Args:
            evidence: as the evidence ``tpm2`` gives it.
            report_data: the 32 bytes that the quote must contain.

        Raises:
            AttestationError: the evidence is refused; the message has the reason.
            FormatError: it is not evidence of a TPM.
        """
        quote = cls.from_bytes(evidence)
        quote.check(report_data)
        return quote

    @classmethod
    def from_bytes(cls, evidence: bytes) -> Quote:
        """Read evidence, of which nothing is proved before ``check``; FormatError if malformed."""
        file = load_json(evidence, "the evidence", MAX_EVIDENCE, canonical=False)
        file.version(_FORMAT, "a newer keymgmt may have written it")
        try:
            quote = cls(
                Public.parse(file.base64("ak", limit=MAX_PART)),
                file.base64("attest", limit=MAX_PART),
                file.base64("signature", limit=MAX_PART),
                PcrState.read(JsonReader(file.members("state"), "the state")),
                tuple(_approvals(file.array("approvals", least=0, most=MAX_APPROVALS))),
                file.base64("event_log", limit=MAX_LOG),
            )
            quote.ak.key()  # a point off its curve is refused here
        except ValueError as error:
            raise FormatError(f"the evidence is malformed: {error}") from error
        file.end()
        return quote

    @property
    def firmware(self) -> str:
        """The version of the TPM's firmware, as the TPM stated it."""
        return Statement.parse(self.attest).firmware

    def check(self, report_data: bytes) -> None:
        """AttestationError unless its key quoted this state, with that report data in the quote."""
        check_ak(self.ak)
        statement = check_statement(self.attest, self.signature, self.ak, "quote")
        if statement.kind != ATTEST_QUOTE:
            raise AttestationError("the attestation key signed something other than a quote")
        if not hmac.compare_digest(statement.extra, report_data):
            raise AttestationError("the quote is of another request")
        try:
            reader = Reader(statement.attested)
            selection, digest = reader.take(len(self.state.selection)), reader.sized()
            reader.end()
        except ValueError as error:
            raise AttestationError(f"the quote is malformed: {error}") from error
        if selection != self.state.selection or digest != self.state.digest:
            raise AttestationError("the quote is of other PCR values than the evidence lists")


def _approvals(listed: list[object]) -> Iterable[Approval]:
    for each in listed:
        if not isinstance(each, dict):
            raise FormatError("an approval of the evidence is no object")
        yield Approval.read(JsonReader(each, "an approval"))
