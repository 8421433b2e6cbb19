"""PCR values from a firmware's event log, replayed.

The log is ``/sys/kernel/security/tpm0/binary_bios_measurements``: "TCG PC Client Platform Firmware
Profile Specification", 10, crypto-agile format, little-endian; or that of TPM 1.2 ("TCG PC Client
Implementation Specification for Conventional BIOS", 11), which older firmware writes for a TPM 2.0
as well and whose events have a SHA-1 digest alone. A log proves nothing by itself; it is read here
to approve the boot state of a machine that one trusts and that was just updated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keymgmt.backend import ConfigError, read_file
from keymgmt_tpm2._structures import Reader
from keymgmt_tpm2.policy._policy import PcrState

__all__ = ["MAX_LOG", "read_event_log", "read_events", "replay"]

MAX_LOG: Final = 16 << 20
_BANKS: Final = {"sha1": 0x0004, "sha256": 0x000B, "sha384": 0x000C}
_NO_ACTION: Final = 3
_SPEC_ID: Final = b"Spec ID Event03\0"
_SPEC_ID_12: Final = (b"Spec ID Event00\0", b"Spec ID Event02\0")
_LOCALITY: Final = b"StartupLocality\0"


def read_event_log(path: Path, bank: str, indices: Iterable[int]) -> PcrState:
    """The values of some PCRs after everything in the log; ConfigError where it is no log."""
    content = bytes(read_file(path, label="event log", limit=MAX_LOG, access="any"))
    try:
        values = replay(read_events(content, bank), bank)
        return PcrState(bank, {index: values[index] for index in indices})
    except KeyError as error:
        raise ConfigError(
            f"{path} has no event for PCR {error}",
            hint="approve only PCRs that the firmware extends",
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is no event log: {error}") from error


def replay(events: Iterable[tuple[int, Event]], bank: str) -> dict[int, bytes]:
    """Values of the PCRs that events extend in one bank."""
    values: dict[int, bytes] = {}
    for index, event in events:
        if event.locality is not None:
            # PCR 0 starts with the locality of TPM2_Startup (PC Client profile, 10.4.5.3).
            values[0] = bytes(len(event.digest) - 1) + event.locality
        else:
            start = values.get(index, bytes(len(event.digest)))
            values[index] = hashlib.new(bank, start + event.digest, usedforsecurity=False).digest()
    return values


@dataclass(frozen=True)
class Event:
    """The digest that extended a PCR; or zeros, and the locality at which PCR 0 began."""

    digest: bytes
    locality: bytes | None = None


def read_events(content: bytes, bank: str) -> Iterator[tuple[int, Event]]:
    """What a log says was measured, in order, as (PCR, event); ValueError where it is malformed."""
    reader = Reader(content)
    reader.take(4)  # the PCR of the first event, which extends none
    kind = reader.number(4, "little")
    reader.take(20)  # its SHA-1, zeros
    first = reader.take(reader.number(4, "little"))
    if kind != _NO_ACTION or first[:16] in _SPEC_ID_12:
        yield from _read_12(content, bank)
        return
    sizes = _spec_id(first)
    if _BANKS[bank] not in sizes:
        raise ValueError(f"it has no digests of the bank {bank}")
    while reader.left:
        index, kind = reader.number(4, "little"), reader.number(4, "little")
        digest = b""
        for _ in range(reader.number(4, "little")):
            algorithm = reader.number(2, "little")
            if algorithm not in sizes:
                raise ValueError(f"an event has a digest of an unknown algorithm {algorithm:#06x}")
            taken = reader.take(sizes[algorithm])
            digest = taken if algorithm == _BANKS[bank] else digest
        event = reader.take(reader.number(4, "little"))
        zeros = bytes(sizes[_BANKS[bank]])
        if kind != _NO_ACTION:
            if len(digest) != len(zeros):
                raise ValueError(f"an event of PCR {index} has no digest of the bank {bank}")
            yield index, Event(digest)
        elif index == 0 and event.startswith(_LOCALITY) and len(event) > len(_LOCALITY):
            yield 0, Event(zeros, event[len(_LOCALITY) : len(_LOCALITY) + 1])


def _read_12(content: bytes, bank: str) -> Iterator[tuple[int, Event]]:
    reader = Reader(content)
    while reader.left:
        index, kind = reader.number(4, "little"), reader.number(4, "little")
        digest = reader.take(20)
        reader.take(reader.number(4, "little"))
        if index > 23 and kind != _NO_ACTION:
            raise ValueError(f"an event extends a PCR {index}, which no TPM has")
        if kind != _NO_ACTION and bank == "sha1":
            yield index, Event(digest)
    if bank != "sha1":
        raise ValueError(
            f"it is in the format of TPM 1.2, whose events have SHA-1 alone and nothing of {bank}"
        )


def _spec_id(event: bytes) -> dict[int, int]:
    reader = Reader(event)
    if reader.take(16) != _SPEC_ID:
        raise ValueError("it is not in the crypto-agile format")
    reader.take(8)  # platform class, version and errata, size of a UINTN
    count = reader.number(4, "little")
    if not 1 <= count <= 16:
        raise ValueError("its specification event names no algorithm")
    return {reader.number(2, "little"): reader.number(2, "little") for _ in range(count)}
