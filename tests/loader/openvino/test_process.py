"""What a whole process does: its peak memory, its files, its sockets, its locked pages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run, run_python

HERE = Path(__file__).parent
LOAD_ONCE = HERE / "load_once.py"


def run_script(*arguments: object, **options) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def large(tmp_path_factory, seal) -> tuple[Path, Path]:
    """A synthetic IR of 512 MiB of f32 weights, and its sealed copy."""
    return make_large("f32", tmp_path_factory.mktemp("large"), seal)


def make_large(kind: str, folder: Path, seal) -> tuple[Path, Path]:
    plain = folder / f"{kind}.xml"
    run_script(HERE / "synthetic_ir.py", plain, 512, kind)
    return plain, seal(plain, kind)


def peaks(plain: Path, sealed: Path, site, **options) -> tuple[int, int]:
    expected = json.loads(run_script(LOAD_ONCE, "plain", plain))
    found = json.loads(run_script(LOAD_ONCE, "sealed", sealed, site.path, **options))
    assert found["sum"] == expected["sum"]
    assert expected["peak_kib"] > 512 << 10  # the weights are in it, so the ratio means something
    return expected["peak_kib"], found["peak_kib"]


def test_peak_memory_is_that_of_a_plaintext_load(large, site):
    plain, sealed = peaks(*large, site)
    assert sealed <= 1.05 * plain


def without_huge_pages() -> None:
    import ctypes

    assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE, kept over exec


def test_a_system_without_huge_pages(large, site):
    plain, sealed = peaks(*large, site, preexec_fn=without_huge_pages)
    assert sealed <= 1.05 * plain


@pytest.mark.once
@pytest.mark.parametrize("kind", ["f16", "i8"])
def test_peak_memory_of_compressed_weights(kind, site, seal, tmp_path):
    """OpenVINO expands f16 while it compiles, and then does not read our copy any more."""
    plain, sealed = peaks(*make_large(kind, tmp_path, seal), site)
    assert sealed <= 1.05 * plain


def test_no_file_is_written_and_no_socket_made(require_tool, magika_sealed, site, tmp_path):
    """While the interpreter starts, loads, runs and closes; telemetry and caches included."""
    strace = require_tool("strace", package="strace")
    trace = tmp_path / "trace"
    home = tmp_path / "home"
    home.mkdir()
    done = run(
        *(strace, "-f", "-qq", "-o", trace),
        *("-e", "trace=%file,%network,ftruncate,memfd_create"),
        *(sys.executable, "-B", LOAD_ONCE, "sealed", magika_sealed, site.path),
        timeout=280,
        env={**os.environ, "HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    calls = trace.read_text().splitlines()
    assert any("magika.bin.floe" in call for call in calls)  # the trace saw the load
    allowed = re.compile(r'"/dev/(null|tty|urandom)"|"/proc/self/')
    changing = re.compile(
        r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND"
        r"| (creat|mkdir(at)?|rename\w*|link(at)?|symlink\w*|mknod\w*|truncate|ftruncate)\("
    )
    written = [call for call in calls if changing.search(call) and not allowed.search(call)]
    assert written == []
    assert [call for call in calls if "AF_INET" in call] == []
    assert [call for call in calls if "memfd_create" in call] == []
    assert list(home.iterdir()) == []


def test_the_trace_would_have_shown_a_cache(require_tool, magika_ir, tmp_path):
    strace = require_tool("strace", package="strace")
    trace = tmp_path / "trace"
    program = (
        "import sys; sys.modules['openvino_telemetry'] = None; import openvino as ov;"
        "ov.Core().compile_model(sys.argv[1], 'CPU', {'CACHE_DIR': sys.argv[2]})"
    )
    cache = tmp_path / "cache"
    subprocess.run(
        [
            *(strace, "-f", "-qq", "-o", trace, "-e", "trace=%file"),
            *(sys.executable, "-B", "-c", program, magika_ir, cache),
        ],
        check=True,
        timeout=280,
    )
    assert any("O_WRONLY" in call or "O_RDWR" in call for call in trace.read_text().splitlines())
    assert list(cache.iterdir())


LOCKED = """
import sys
from pathlib import Path
from keymgmt._crypto import memory
memory.unencrypted_swap = lambda: (sys.argv[3],) if sys.argv[3] else ()
from keymgmt_openvino import load
with load(sys.argv[1], keys=sys.argv[2]) as model:
    status = Path("/proc/self/status").read_text()
    print(model.locked, next(l.split()[1] for l in status.splitlines() if l.startswith("VmLck")))
"""


def without_the_right_to_lock(limit: int):
    """Root ignores RLIMIT_MEMLOCK unless CAP_IPC_LOCK (14) is out of the bounding set at exec."""

    def prepare() -> None:
        import ctypes
        import resource

        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)  # PR_CAPBSET_DROP

    return prepare


@pytest.mark.parametrize("swap", ["/dev/sda2", ""])
@pytest.mark.parametrize(("limit", "locked"), [(0, False), (4 << 20, True)])
def test_weights_are_locked_within_the_limit_and_the_rest_is_said_where_there_is_swap(
    limit, locked, swap, magika_sealed, site
):
    done = run_python(
        LOCKED, magika_sealed, site.path, swap, preexec_fn=without_the_right_to_lock(limit)
    )
    assert done.returncode == 0, done.stderr
    found, size = done.stdout.split()
    assert found == str(locked)
    assert (int(size) >= 3000) == locked
    said = "swapped out to /dev/sda2" in done.stderr and "ulimit -l" in done.stderr
    assert said == (bool(swap) and not locked)


def test_less_address_space_than_weights(large, site):
    """A limit that free memory does not show is met when the weights are allocated."""
    program = """
import resource, sys
from pathlib import Path
import keymgmt
from keymgmt_openvino import load
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), -1))
try:
    load(sys.argv[1], keys=sys.argv[2])
except keymgmt.errors.KeymgmtError as error:
    print(error, "|", error.hint)
"""
    said = run_script("-c", program, large[1], site.path)
    assert "no 536,870,912 bytes of memory for the weights" in said
    assert "ulimit -v" in said


@pytest.mark.once
def test_a_hundred_loads_do_not_grow(magika_sealed, site):
    program = """
import os, sys
import numpy as np
from pathlib import Path
from keymgmt_openvino import load
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def cycle():
    with load(sys.argv[1], keys=sys.argv[2]) as model:
        model(np.full((1, 2048), 65, np.int32))
for _ in range(10):
    cycle()
before, files = resident(), len(os.listdir("/proc/self/fd"))
for _ in range(100):
    cycle()
print(resident() - before, len(os.listdir("/proc/self/fd")) - files)
"""
    grown, files = map(int, run_script("-c", program, magika_sealed, site.path).split())
    assert files == 0
    assert grown < 40 << 20  # one leaked copy of each load would be 300 MB
