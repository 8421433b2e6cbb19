"""A canary in the model is searched in a swap file that is made for it, while pages are forced out.

It changes the machine for a moment, so it runs at night.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from programs import run

pytestmark = pytest.mark.nightly
SIZE = 4 << 20
CANARY = os.urandom(4096)

# Forces out of memory what can be (MADV_PAGEOUT, Linux 5.4), and says how much stayed.
OUT = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None)
def force_out(memory, size):
    start = ctypes.addressof(memory)
    page = mmap.PAGESIZE
    pages = (ctypes.c_ubyte * (size // page))()
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), 21)
    libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages)
    print(sum(each & 1 for each in pages) * page)
"""
BY_PATH = f"""{OUT}
with open(f"{{sys.argv[1]}}/canary.bin", "rb") as file:
    memory = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
assert sum(memory[::4096]) >= 0
force_out(ctypes.c_char.from_buffer(memory), len(memory))
"""
FROM_MEMORY = f"""{OUT}
import keymgmt
from keymgmt.loading import file_memory
with keymgmt.open(sys.argv[1]) as sealed:
    memory = file_memory(sealed, "canary.bin")
assert memory.locked
force_out(ctypes.c_char.from_buffer(memory), len(memory))
"""


@pytest.fixture
def swap(tmp_path, require_tool) -> Iterator[Callable[[], bool]]:
    """Swap to a file; the call switches it off and says whether the canary is in it."""
    file = tmp_path / "swap"
    file.write_bytes(bytes(4 * SIZE))
    file.chmod(0o600)
    subprocess.run([require_tool("mkswap"), file], check=True, capture_output=True)
    on = run(require_tool("swapon"), file)
    if on.returncode:
        pytest.skip(f"no swap may be made here: {on.stderr.strip()}")

    def off() -> None:
        subprocess.run(["swapoff", file], check=True)

    def found() -> bool:
        stack.close()
        # What was written beside the page cache is read anew.
        with file.open("rb") as content:
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return CANARY in content.read()

    with contextlib.ExitStack() as stack:
        stack.callback(off)
        yield found


@pytest.fixture
def canary(new_site) -> Any:
    made = new_site(lambda folder: (folder / "canary.bin").write_bytes(CANARY * (SIZE // 4096)))
    shutil.rmtree(made.plain)  # it is in memory too, and could be swapped out
    return made


def test_what_a_program_was_given_is_not_swapped_out(needs_root, canary, swap):
    done = canary.run("--", sys.executable, "-c", BY_PATH, "{sealed}")
    assert done.returncode == 0, done.stderr
    assert not swap()
    assert "swapped out" not in done.stderr


def test_memfds_are_and_it_is_said(needs_root, canary, swap):
    """The control: this search finds what is there."""
    done = canary.run("--via", "memfd", "--", sys.executable, "-c", BY_PATH, "{sealed}")
    assert done.returncode == 0, done.stderr
    assert "swapped out" in done.stderr
    assert swap()


def test_what_a_loader_holds_is_not_swapped_out(canary, swap):
    line = [sys.executable, "-c", FROM_MEMORY, canary.sealed]
    done = run(*line, env=canary.env())
    assert (done.returncode, done.stdout.strip()) == (0, str(SIZE)), done.stderr
    assert not swap()
