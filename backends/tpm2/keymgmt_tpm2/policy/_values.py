"""PCR values that a person states: from a table of them, or from an event log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from keymgmt.backend import ConfigError, FormatError, JsonReader, load_json, read_file
from keymgmt_tpm2.policy._eventlog import read_event_log
from keymgmt_tpm2.policy._policy import PcrState, parse_pcrs

__all__ = ["read_json_file", "read_values", "stated_values"]

MAX_FILE: Final = 1 << 20
R = TypeVar("R")


def stated_values(pcr: str, values: Path | None, event_log: Path | None) -> PcrState:
    """The values of some PCRs.

    Args:
        pcr: which, as ``[BANK:]LIST``.
        values: a file as ``keymgmt tpm pcrs --json`` prints it.
        event_log: an event log, in place of ``values``.

    Raises:
        ConfigError: not exactly one file is named, or it has not all of these PCRs.
    """
    try:
        bank, indices = parse_pcrs(pcr)
    except ValueError as error:
        raise ConfigError(f"--pcr: {error}") from error
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


def read_json_file(path: Path, what: str, read: Callable[[JsonReader], R]) -> R:
    """The result of ``read`` for a JSON file that a person named; ConfigError where it is wrong."""
    content = read_file(path, label=what, limit=MAX_FILE, access="any")
    try:
        return read(load_json(content, str(path), MAX_FILE, canonical=False))
    except (FormatError, ValueError) as error:
        raise ConfigError(f"{path} is no {what}: {error}") from error
