"""Evidence ``tpm2``: a quote of this device's PCRs, by the key that enrolment proved."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final, Self

from pydantic import field_validator, model_validator

from keymgmt.backend import ConfigPath, Evidence, ProviderUnavailable, read_file
from keymgmt_tpm2._connection.service import Service
from keymgmt_tpm2._keys import KeyDirectory
from keymgmt_tpm2._settings import Tpm2Settings
from keymgmt_tpm2.enroll._device import attestation_key
from keymgmt_tpm2.policy._approval import installed
from keymgmt_tpm2.policy._policy import parse_pcrs
from keymgmt_tpm2.quote._file import MAX_APPROVALS, MAX_LOG, Quote

if TYPE_CHECKING:
    from keymgmt_tpm2._connection.tpm import Tpm

__all__ = ["TpmEvidence", "TpmEvidenceSettings"]

_TRIES: Final = 4


class TpmEvidenceSettings(Tpm2Settings):
    """Settings of the evidence ``tpm2``: those of a provider's table, and what is quoted.

    Attributes:
        pcrs: which PCRs are quoted, as ``[BANK:]LIST``; those that the service's policy asks for.
        event_log: the firmware's event log, such as
            ``/sys/kernel/security/tpm0/binary_bios_measurements``; it is sent along where it is
            named, for a policy that asks for it. At most 256 KiB.
    """

    pcrs: str = "sha256:0,2,4,7"
    event_log: ConfigPath | None = None

    @field_validator("pcrs")
    @classmethod
    def _listed(cls, value: str) -> str:
        parse_pcrs(value)
        return value

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.srk_name is None:
            raise ValueError("srk_name is required, as `keymgmt tpm setup PROVIDER` shows it")
        return self


class TpmEvidence(Evidence[TpmEvidenceSettings]):
    """A quote of this device's TPM, of the boot state that it is in.

    The key directory is that of the device's provider: approvals are installed there, and by it
    processes take turns at a TPM without a resource manager.
    """

    kind: ClassVar[str] = "tpm2"
    Settings: ClassVar[type[TpmEvidenceSettings]] = TpmEvidenceSettings

    def __init__(self, settings: TpmEvidenceSettings) -> None:
        super().__init__(settings)
        self._service = Service("evidence", settings, KeyDirectory(settings.keys, "evidence"))

    def quote(self, report_data: bytes) -> bytes:
        """A quote with these 32 bytes as its qualifying data, and all that is needed to check it.

        Raises:
            ProviderUnavailable: the TPM is not reached, busy, or gives no answer in time; or the
                event log cannot be read.
            KeyNotFound: the TPM keeps no such PCRs, or has no storage root key.
            AccessDenied: the endorsement hierarchy has a password, and it was not or wrongly given.
        """
        settings = self.settings
        log = b""
        if settings.event_log is not None:
            log = bytes(
                read_file(
                    settings.event_log,
                    label="event log",
                    limit=MAX_LOG,
                    access="any",
                    error=ProviderUnavailable,
                )
            )
        approvals = installed(settings.keys)
        quote = self._service.run(
            "quoting",
            lambda tpm: self._quote(tpm, report_data),
            passwords={"endorsement": settings.endorsement_auth},
        )
        fitting = [each for each in approvals if not each.difference(quote.state)]
        sent = tuple(fitting[:MAX_APPROVALS])
        return replace(quote, approvals=sent, event_log=log).to_bytes()

    def _quote(self, tpm: Tpm, report_data: bytes) -> Quote:
        bank, indices = parse_pcrs(self.settings.pcrs)
        key = attestation_key(tpm)
        for _ in range(_TRIES):
            state, session = tpm.pcrs(bank, indices), tpm.session()
            attest, signature = tpm.quote(key, report_data, state, session)
            tpm.flush(session)
            # A PCR was extended in between, so the values are not those of the quote.
            if attest.endswith(state.digest):
                return Quote(tpm.public_of(key), attest, signature, state)
        raise ProviderUnavailable("the PCRs change all the time", hint="try again")
