"""Memory for plaintext ends wiped, and never under somebody who still reads it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest

from keymgmt._crypto import memory as module
from keymgmt._crypto.memory import PrivateMemory
from keymgmt.errors import KeymgmtError


@pytest.fixture
def wiped(monkeypatch) -> list[bytes]:
    """What each memory held after its wipe."""
    seen: list[bytes] = []

    def wipe(buffer: PrivateMemory) -> None:
        real(buffer)
        seen.append(bytes(memoryview(buffer)))

    real = module.wipe
    monkeypatch.setattr(module, "wipe", wipe)
    return seen


@pytest.mark.parametrize("size", [1, 4095, 4097, 1 << 20])
def test_it_is_wiped_when_the_last_view_is_gone(size, wiped):
    memory = PrivateMemory(size)
    memory[:] = b"x" * size
    view = memoryview(memory)[size // 2 :]
    pointer = (ctypes.c_char * 1).from_buffer(memory)
    del memory
    gc.collect()
    assert not wiped
    assert bytes(view) == b"x" * (size - size // 2)
    del view
    assert not wiped
    del pointer
    assert wiped == [bytes(size)]


def flags(address: int) -> str:
    found = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            here = start <= address < end
        elif first == "VmFlags:" and here:
            found = line
    return found


def test_it_is_locked_and_out_of_core_dumps():
    memory = PrivateMemory(5000)
    view = (ctypes.c_char * 1).from_buffer(memory)
    said = flags(ctypes.addressof(view))
    assert " dd" in said
    assert (" lo" in said) == memory.locked


def test_what_the_system_refuses_is_an_error_of_ours():
    with pytest.raises(KeymgmtError, match="refuses 4,611,686,018,427,387,904 bytes"):
        PrivateMemory(1 << 62)
