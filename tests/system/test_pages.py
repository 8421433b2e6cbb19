"""Fresh memory is made ready where the system can, and its content never changes."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest

from keymgmt._system.pages import BLOCK, FreshMemory


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE >> 10


def fresh(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@pytest.mark.parametrize("skip", [0, 16, 4096 + 16, 1 << 20])
@pytest.mark.parametrize("part", [1 << 16, (1 << 20) - 32, BLOCK, 5 << 20])
def test_fresh_memory_is_there_once_all_parts_were_asked_for(skip, part):
    if tuple(int(number) for number in os.uname().release.split(".")[:2]) < (5, 14):
        pytest.skip("MADV_POPULATE_WRITE is of Linux 5.14")
    size = 64 << 20
    memory = FreshMemory(memoryview(fresh(skip + size))[skip:])
    before = resident_kib()

    def every_other(first: int) -> None:
        for start in range(first * part, size, 2 * part):
            memory.part(start, min(part, size - start))

    threads = [threading.Thread(target=every_other, args=[first]) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Edges of less than a page, or than four, are left to the first write.
    assert 0.8 * (size >> 10) < resident_kib() - before < 1.1 * (size >> 10)


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 5000, BLOCK - 1, BLOCK])
@pytest.mark.parametrize("length", [0, 1, 4096, 16384, 16385, 100_000, 2 * BLOCK + 1])
def test_nothing_changes_in_it_or_around_it(start, length):
    memory = fresh(8 * BLOCK)
    memory[: len(memory) // 2 : 7] = b"x" * len(range(0, len(memory) // 2, 7))
    content = memory[:]
    part = FreshMemory(memoryview(memory)).part(start, length)
    assert memory[:] == content
    assert part == content[start : start + length]
    assert part.nbytes == length


def test_a_part_is_writable_memory_of_the_buffer():
    memory = fresh(2 * BLOCK)
    FreshMemory(memoryview(memory)).part(BLOCK, 4)[:] = b"left"
    assert memory[BLOCK : BLOCK + 4] == b"left"


def test_an_empty_buffer_has_an_empty_part():
    assert FreshMemory(memoryview(bytearray())).part(0, 0).nbytes == 0
