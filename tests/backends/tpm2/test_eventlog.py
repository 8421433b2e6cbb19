"""Event logs: replayed like tpm2-tools does, and refused where they are none."""

from __future__ import annotations

import hashlib
import struct

import pytest
from eventlog import ACTION, NO_ACTION, SEPARATOR, event, log
from hypothesis import given
from hypothesis import strategies as st
from keymgmt_tpm2.policy._eventlog import read_event_log, read_events, replay
from programs import run

from keymgmt.backend import ConfigError

EVENTS = (
    event(0, ACTION, b"Calling EFI Application from Boot Option"),
    event(7, SEPARATOR, bytes(4)),
    event(4, ACTION, b"Returning from EFI Application"),
    event(0, SEPARATOR, bytes(4)),
)


def replayed(content: bytes, bank: str) -> dict[int, bytes]:
    return replay(read_events(content, bank), bank)


def test_replayed_like_tpm2_tools(tmp_path, require_tool):
    tool = require_tool("tpm2_eventlog", package="tpm2-tools")
    path = tmp_path / "log"
    path.write_bytes(log(*EVENTS))
    shown = run(tool, path, check=True)
    for bank in ("sha1", "sha256"):
        values = replayed(path.read_bytes(), bank)
        assert sorted(values) == [0, 4, 7]
        for value in values.values():
            assert value.hex() in shown.stdout
    state = read_event_log(path, "sha256", [0, 7])
    assert state.values == {i: replayed(path.read_bytes(), "sha256")[i] for i in (0, 7)}


def event_12(index: int, kind: int, data: bytes) -> bytes:
    head = struct.pack("<II", index, kind) + hashlib.sha1(data).digest()
    return head + struct.pack("<I", len(data)) + data


@pytest.mark.parametrize("spec", [b"Spec ID Event00\0", b"Spec ID Event02\0", None])
def test_a_log_of_the_1_2_format(tmp_path, spec):
    """Its SHA-1 events are read; for another bank it is refused by that name."""
    events = [(0, 8, b"a version"), (7, ACTION, b"a setting"), (0, SEPARATOR, bytes(4))]
    head = [event_12(0, NO_ACTION, spec + bytes(12))] if spec else []
    path = tmp_path / "log"
    path.write_bytes(b"".join([*head, *(event_12(*each) for each in events)]))
    state = read_event_log(path, "sha1", [0, 7])
    value = bytes(20)
    for _, _, data in (events[0], events[2]):
        value = hashlib.sha1(value + hashlib.sha1(data).digest()).digest()
    assert state.values[0] == value
    with pytest.raises(ConfigError, match=r"format of TPM 1\.2.* SHA-1 alone"):
        read_event_log(path, "sha256", [0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is no event log"):
        read_event_log(path, "sha1", [0])


def test_the_locality_of_startup_begins_pcr_0():
    startup = event(0, NO_ACTION, b"StartupLocality\0\x03")
    digest = hashlib.sha256(bytes(4)).digest()
    values = replayed(log(startup, event(0, SEPARATOR, bytes(4))), "sha256")
    assert values[0] == hashlib.sha256(bytes(31) + b"\x03" + digest).digest()


def test_other_events_without_action_extend_nothing():
    assert replayed(log(event(6, NO_ACTION, b"whatever")), "sha256") == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        log()[:-1],
        log(*EVENTS)[:-1],
        b"\0" * 100,
        log().replace(b"Event03", b"Event02"),
        log(EVENTS[0][:20]),
        log(struct.pack("<IIIH", 0, 4, 1, 0x99)),
        log(struct.pack("<IIII", 0, 4, 0, 0)),
        log(struct.pack("<IIII", 0, 4, 0, 0xFFFFFFFF)),
    ],
)
def test_what_is_no_log(tmp_path, content):
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is no event log|has no event"):
        read_event_log(path, "sha256", [7])


def test_a_bank_and_a_pcr_that_are_not_there(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(log(*EVENTS))
    with pytest.raises(ConfigError, match="no event for PCR 2"):
        read_event_log(path, "sha256", [0, 2])
    with pytest.raises(ConfigError, match="no digests of the bank sha384"):
        read_event_log(path, "sha384", [0])
    with pytest.raises(ConfigError, match="No such file"):
        read_event_log(tmp_path / "none", "sha256", [0])


@given(st.binary(max_size=300))
def test_any_bytes_are_a_log_or_a_value_error(tail):
    for content in (tail, log() + tail):
        try:
            replayed(content, "sha256")
        except ValueError:
            continue
