"""Check that a quote is of an enrolled device, in a boot state that the policy allows.

What the enrolment office wrote says which attestation keys are in genuine TPMs: the recipient files
of ``keymgmt tpm enroll accept``, each with the office's signature beside it. Nothing that a device
says of itself counts before its quote is by one of these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from keymgmt.backend import (
    ConfigError,
    ConfigPath,
    KeymgmtError,
    PublicKey,
    Recipient,
    Settings,
    check_trusted,
    find_signer,
    read_file,
)
from keymgmt_tpm2.enroll._certificates import AttestationError
from keymgmt_tpm2.enroll._office import parse_ek
from keymgmt_tpm2.policy._eventlog import MAX_LOG, Event, read_events, replay
from keymgmt_tpm2.policy._policy import Approver, PcrState, compare, parse_pcrs, weakness
from keymgmt_tpm2.policy._stated import read_approver, read_values
from keymgmt_tpm2.quote._file import Quote

__all__ = ["DevicePolicy", "Devices"]

log: Final = logging.getLogger("keymgmt.tpm2")
MAX_PEM: Final = 65536


class DevicePolicy(Settings):
    """The devices with a TPM that are accepted, and their boot states.

    Of ``pcr_values``, ``approver`` and ``event_logs``, all that are given must hold.

    Attributes:
        devices: the folder of the recipient files that the enrolment office wrote, with the
            signature of each beside it (``NAME.recipient``, ``NAME.recipient.sig``).
        attesters: public key files (PEM) of the office: who states that a device was enrolled.
        eks: only these of the devices, each by the hash of its endorsement key; all without it.
        pcr_values: files as ``keymgmt tpm pcrs --json`` prints them; the PCRs that one of the files
            names have its values.
        approver: public key file (PEM) of who signs approvals; the device has one of its state.
        ref: the ref that those approvals carry.
        counter: an approval with a counter counts while it allows this value or a higher one.
        event_logs: event logs of machines that are known: each event that a device measured into
            ``event_pcrs`` was measured on one of these as well, in whatever order and mixture.
        event_pcrs: which PCRs are compared so, as ``[BANK:]LIST``.
        any_state: ``true``: any boot state will do, so that a device proves that it is one of
            yours, and nothing of what runs on it.
    """

    devices: ConfigPath
    attesters: Annotated[list[ConfigPath], Field(min_length=1)]
    eks: list[str] | None = None
    pcr_values: list[ConfigPath] = Field(default_factory=list)
    approver: ConfigPath | None = None
    ref: str = ""
    counter: Annotated[int, Field(ge=0, lt=1 << 53)] = 0
    event_logs: list[ConfigPath] = Field(default_factory=list)
    event_pcrs: str | None = None
    any_state: bool = False

    @model_validator(mode="after")
    def _says_which_state(self) -> Self:
        if bool(self.pcr_values or self.approver or self.event_logs) == self.any_state:
            raise ValueError(
                "write which boot state a device is in: pcr_values, approver or event_logs; "
                "or else any_state = true"
            )
        if bool(self.event_logs) != bool(self.event_pcrs):
            raise ValueError("event_logs and event_pcrs belong together")
        parse_pcrs(self.event_pcrs or "0")
        return self


@dataclass(frozen=True)
class _Known:
    """The events that known machines measured into some PCRs of a bank, which the operator chooses.

    Firmware does not extend banks that it does not support, and whoever has the machine can then
    write any values there.
    """

    bank: str
    events: Mapping[int, frozenset[Event]]

    def check(self, quote: Quote) -> None:
        if quote.state.bank != self.bank or not self.events.keys() <= quote.state.values.keys():
            listed = ",".join(map(str, self.events))
            raise AttestationError(f"the PCRs {self.bank}:{listed} are not all quoted")
        try:
            events = list(read_events(quote.event_log, self.bank))
        except ValueError as error:
            raise AttestationError(f"the device sent no event log: {error}") from error
        values = replay(events, self.bank)
        for index in self.events:
            if values.get(index) != quote.state.values[index]:
                raise AttestationError(f"the event log is not of what PCR {index} holds")
        for index, event in events:
            if index in self.events and event not in self.events[index]:
                raise AttestationError(
                    f"an event of PCR {index} is in no known event log: {event.digest.hex()}"
                )


@dataclass(frozen=True)
class Devices:
    """A policy with the content of its files.

    Attributes:
        enrolled: name of an attestation key -> the facts of its device that the office signed.
        states: boot states, of which one is wanted; any where there are none.
        approver: the approver of boot states, or None if no approval is required.
        counter: the lowest value that the counter of an approval may allow.
        known: the known events, or None if event logs are not compared.
    """

    enrolled: Mapping[str, Mapping[str, str]]
    states: tuple[PcrState, ...]
    approver: Approver | None
    counter: int
    known: _Known | None

    @classmethod
    def read(cls, policy: DevicePolicy) -> Devices:
        """Read the files of a policy; ConfigError where one is missing, not trusted or wrong."""
        states = {}
        for path in policy.pcr_values:
            check_trusted(path, label="table of PCR values", private=False)
            states[path] = read_values(path)
            if weak := weakness(states[path]):
                raise ConfigError(f"{path}: {weak}", hint="name PCRs that are measured, such as 7")
        approver = read_approver(policy.approver, policy.ref) if policy.approver else None
        try:
            enrolled = _enrolled(policy)
            if approver:
                approver.check_ecdsa()
            known = _known(policy, policy.event_pcrs) if policy.event_pcrs else None
        except ValueError as error:
            raise ConfigError(f"the policy cannot be used: {error}") from error
        return cls(enrolled, tuple(states.values()), approver, policy.counter, known)

    def judge(self, quote: Quote) -> dict[str, str]:
        """Whether the policy accepts what a quote proves, once it was verified.

        Returns:
            The proved facts, as texts for a log.

        Raises:
            AttestationError: the quote is refused; the message has the reason.
        """
        name = quote.ak.name.hex()
        if name not in self.enrolled:
            raise AttestationError(f"the attestation key {name} is of no enrolled device")
        if self.states:
            reasons = [compare(state, quote.state) for state in self.states]
            if all(reasons):
                raise AttestationError(f"another boot state: {' | '.join(reasons)[:500]}")
        facts = {"ek": self.enrolled[name]["ek"], "firmware": quote.firmware}
        if self.approver is not None:
            facts["approval"] = self._approval(quote, self.approver)
        if self.known is not None:
            self.known.check(quote)
        return facts

    def _approval(self, quote: Quote, approver: Approver) -> str:
        """The id of an approval of this state; AttestationError."""
        reasons = ["the device sent none of the approver"]
        for approval in quote.approvals:
            if approval.approver != approver:
                continue
            reason = approval.difference(quote.state)
            if approval.counter and approval.counter.value < self.counter:
                reason = f"its counter allows {approval.counter.value}, less than {self.counter}"
            try:
                approval.check()
            except ConfigError as error:
                reason = str(error)
            if not reason:
                return approval.id
            reasons.append(reason)
        raise AttestationError(f"no approval of this boot state: {' | '.join(reasons)[:500]}")


def _known(policy: DevicePolicy, pcrs: str) -> _Known:
    bank, indices = parse_pcrs(pcrs)
    events: dict[int, set[Event]] = {index: set() for index in indices}
    for path in policy.event_logs:
        content = read_file(path, label="event log", limit=MAX_LOG, access="trusted")
        try:
            for index, event in read_events(bytes(content), bank):
                events.get(index, set()).add(event)
        except ValueError as error:
            raise ConfigError(f"{path} is no event log: {error}") from error
    for index, measured in events.items():
        if not measured:
            raise ConfigError(f"no event log of the policy has an event of PCR {index}")
    return _Known(bank, {index: frozenset(measured) for index, measured in events.items()})


def _enrolled(policy: DevicePolicy) -> dict[str, Mapping[str, str]]:
    wanted = None if policy.eks is None else {parse_ek(each) for each in policy.eks}
    check_trusted(policy.devices, label="folder of devices", private=False)
    enrolled = {}
    for stated in _attested(policy):
        if wanted is None or stated["ek"] in wanted:
            enrolled[stated["ak"]] = stated
    if not enrolled:
        raise ConfigError(
            f"{policy.devices} has no device that was enrolled",
            hint="put the recipient files that the office signed there, each beside its .sig",
        )
    return enrolled


def _attested(policy: DevicePolicy) -> Iterable[Mapping[str, str]]:
    """The facts that the office proved of each device; ConfigError where no attester signed one."""
    trusted = {}
    for path in policy.attesters:
        pem = read_file(path, label="public key", limit=MAX_PEM, access="trusted")
        trusted[str(path)] = PublicKey.from_pem(bytes(pem)).der
    try:
        files = sorted(path for path in policy.devices.iterdir() if path.suffix == ".recipient")
    except OSError as error:
        raise ConfigError(f"cannot list {policy.devices}: {error.strerror}") from error
    for file in files:
        signature = file.with_name(f"{file.name}.sig")
        try:
            recipient = Recipient.load(file)
            content = read_file(signature, label="signature", limit=MAX_PEM, access="any")
            find_signer(recipient, bytes(content), trusted, attested=True)
        except KeymgmtError as error:
            raise ConfigError(f"{file} is refused: {error}", hint=error.hint) from error
        if recipient.attributes.get("attested") == "tpm2" and "ak" in recipient.attributes:
            yield recipient.attributes
        else:
            log.warning("%s names no attestation key: enrol that device again", file)
