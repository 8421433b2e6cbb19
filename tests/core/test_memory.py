"""Fresh memory is made ready where the system can, and its content never changes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from keymgmt._memory import populate


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE >> 10


def fresh(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def test_fresh_memory_is_there_afterwards() -> None:
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) < (5, 14):
        pytest.skip("MADV_POPULATE_WRITE is of Linux 5.14")
    size = 64 << 20
    memory = fresh(size)
    before = resident_kib()
    populate(memoryview(memory))
    assert resident_kib() - before > 0.9 * (size >> 10)


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 5000])
@pytest.mark.parametrize("length", [0, 1, 4096, 16384, 16385, 100_000])
def test_nothing_changes_in_it_or_around_it(start: int, length: int) -> None:
    memory = fresh(1 << 20)
    memory[:10_000] = b"x" * 10_000
    content = memory[:]
    populate(memoryview(memory)[start : start + length])
    assert memory[:] == content
