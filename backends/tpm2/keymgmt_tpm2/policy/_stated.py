"""What a person states of a policy: PCRs and their values, an approver, the options of a key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from keymgmt.backend import ConfigError, FormatError, JsonReader, PublicKey, load_json, read_file
from keymgmt_tpm2.policy._eventlog import read_event_log
from keymgmt_tpm2.policy._policy import Approver, PcrState, Policy, parse_pcrs

__all__ = [
    "read_approver",
    "read_json_file",
    "read_policy",
    "read_values",
    "stated_pcrs",
    "stated_values",
]

MAX_FILE: Final = 1 << 20
MAX_PEM: Final = 65536
_OPTIONS: Final = ("pcr", "approver", "ref", "pin")
_YES_NO: Final = {"yes": True, "no": False}
R = TypeVar("R")


def stated_pcrs(text: str, label: str) -> tuple[str, tuple[int, ...]]:
    """``parse_pcrs`` of an option that a person wrote; ConfigError that names the option."""
    try:
        return parse_pcrs(text)
    except ValueError as error:
        raise ConfigError(f"{label}: {error}") from error


def stated_values(pcr: str, values: Path | None, event_log: Path | None) -> PcrState:
    """The values of some PCRs.

    Args:
        pcr: which, as ``[BANK:]LIST``.
        values: a file as ``keymgmt tpm pcrs --json`` prints it.
        event_log: an event log, in place of ``values``.

    Raises:
        ConfigError: not exactly one file is named, or it has not all of these PCRs.
    """
    bank, indices = stated_pcrs(pcr, "--pcr")
    if (values is None) == (event_log is None):
        raise ConfigError("name one source of the PCR values: --values or --event-log")
    if event_log is not None:
        return read_event_log(event_log, bank, indices)
    assert values is not None  # noqa: S101 - one of the two is there
    given = read_values(values)
    if given.bank != bank or not set(indices) <= set(given.values):
        wanted = pcr.rpartition(":")[2]
        raise ConfigError(f"{values}: it does not have all of {bank}:{wanted}")
    return PcrState(bank, {index: given.values[index] for index in indices})


def read_values(path: Path) -> PcrState:
    """A file of PCR values as ``keymgmt tpm pcrs --json`` prints it; ConfigError."""
    return read_json_file(path, "table of PCR values", _printed)


def _printed(data: JsonReader) -> PcrState:
    # A table that somebody made otherwise has no format.
    if "format" in data.names():
        data.version("keymgmt-tpm-pcrs/1", "a newer keymgmt may have written it")
    return PcrState.read(data)


def read_json_file(path: Path, label: str, read: Callable[[JsonReader], R]) -> R:
    """The result of ``read`` for a JSON file that a person named; ConfigError where it is wrong."""
    content = read_file(path, label=label, limit=MAX_FILE, access="any")
    try:
        return read(load_json(content, str(path), MAX_FILE, canonical=False))
    except (FormatError, ValueError) as error:
        raise ConfigError(f"{path} is no {label}: {error}") from error


def read_approver(path: Path, ref: str = "") -> Approver:
    """An approver from a PEM file of its public key; ConfigError where a TPM takes none such."""
    pem = read_file(path, label="approver", limit=MAX_PEM, access="trusted")
    try:
        return Approver(PublicKey.from_pem(bytes(pem)).der, ref)
    except (ConfigError, ValueError) as error:
        raise ConfigError(
            f"{path} is no approver: {error}",
            hint="make one with: keymgmt tpm policy approver FILE",
        ) from error


def read_policy(
    options: Mapping[str, str], read_pcrs: Callable[[str, tuple[int, ...]], PcrState]
) -> Policy:
    """The policy that the options of a new key say.

    Args:
        options: by name, as the operator wrote them.
        read_pcrs: gives the present values of PCRs, by bank and indices.

    Raises:
        ConfigError: an option is unknown, malformed or contradicts another.
    """
    for name in options:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            raise ConfigError(
                f"the backend tpm2 knows no option {name!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"options: {', '.join(_OPTIONS)}",
            )
    pin = options.get("pin", "no")
    if pin not in _YES_NO:
        raise ConfigError("the option pin is yes or no; the PIN itself is named in the config")
    if "ref" in options and "approver" not in options:
        raise ConfigError("the option ref belongs to the option approver")
    selected = stated_pcrs(options["pcr"], "the option pcr") if "pcr" in options else None
    approver = None
    if "approver" in options:
        approver = read_approver(Path(options["approver"]), options.get("ref", ""))
    return Policy(_YES_NO[pin], read_pcrs(*selected) if selected else None, approver)
