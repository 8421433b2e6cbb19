"""A pattern in the weights is looked for where it must not be; each search has a control.

The weights are rows of one pattern of 16 random floats. Whoever searches is another process, so
that the pattern is not in memory because of the search.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

PATTERN = np.random.default_rng(5).standard_normal(16).astype(np.float32)

# Stops at each step until a line comes in; PR_SET_PTRACER lets any process of the user look.
CHILD = """
import ctypes, sys
from keymgmt._crypto import memory
from keymgmt_openvino import _memory, load
import numpy as np
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
if sys.argv[3] == "no wipe":
    _memory.wipe = lambda buffer: None
if sys.argv[3] == "in dumps":
    class Libc:
        def __getattr__(self, name):
            return (lambda *a: 0) if name == "madvise" else getattr(libc, name)
    libc, memory.libc = memory.libc, Libc()
def step(name):
    print(name, flush=True)
    sys.stdin.readline()
model = load(sys.argv[1], keys=sys.argv[2])
step("loaded")
model(np.ones((1, 64), np.float32))
step("run")
model.close()
step("closed")
"""


@pytest.fixture(scope="module")
def canary(tmp_path_factory, seal) -> Path:
    # 256 KiB: freed memory of that size stays in the process, so only a wipe removes it.
    from openvino import opset13 as op

    x = op.parameter([-1, 64], np.float32, name="x")
    weights = op.constant(np.tile(PATTERN, (1024, 4)))
    plain = tmp_path_factory.mktemp("canary") / "canary.xml"
    model = ov.Model([op.result(op.matmul(x, weights, False, True))], [x], "canary")
    ov.save_model(model, plain, compress_to_fp16=False)
    assert PATTERN.tobytes() in plain.with_suffix(".bin").read_bytes()
    return seal(plain, "canary")


@contextmanager
def child(
    canary: Path, site, protection: str = "on", **options: Any
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, canary, site.path, protection],
        **options,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], step: str) -> None:
    while (line := process.stdout.readline().strip()) != step:
        assert line, "the child ended"
        process.stdin.write("\n")
        process.stdin.flush()


def in_memory(pid: int) -> bool:
    """Whether the pattern is anywhere in a process's readable memory."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in maps:
            where, mode, *_ = line.split()
            if "r" not in mode or "[v" in line:
                continue
            start, end = (int(part, 16) for part in where.split("-"))
            for position in range(start, end, 1 << 26):
                try:
                    memory.seek(position)
                    # A little over the edge, so that no occurrence is cut in two.
                    found = memory.read(min(end - position, (1 << 26) + 64))
                except (OSError, OverflowError, ValueError):
                    break
                if PATTERN.tobytes() in found:
                    return True
    return False


def test_nothing_of_the_weights_is_left_after_close(canary, site):
    with child(canary, site) as process:
        until(process, "run")
        assert in_memory(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        until(process, "closed")
        assert not in_memory(process.pid)


def test_without_the_wipe_the_search_finds_them(canary, site):
    with child(canary, site, "no wipe") as process:
        until(process, "closed")
        assert in_memory(process.pid)


@pytest.mark.parametrize(("protection", "found"), [("on", False), ("in dumps", True)])
def test_a_core_dump_of_a_loaded_model_leaves_the_weights_out(
    protection, found, canary, site, require_tool, tmp_path
):
    gcore = require_tool("gcore", package="gdb")
    with child(canary, site, protection) as process:
        until(process, "loaded")
        assert in_memory(process.pid)
        subprocess.run(
            [gcore, "-o", tmp_path / "core", str(process.pid)],
            check=True,
            capture_output=True,
            timeout=120,
        )
    (core,) = tmp_path.iterdir()
    content = core.read_bytes()
    assert len(content) > 1 << 20
    assert (PATTERN.tobytes() in content) == found


@pytest.mark.parametrize(("protection", "found"), [("on", False), ("in dumps", True)])
def test_nor_are_they_in_the_core_file_of_an_abort(protection, found, canary, site, tmp_path):
    """The kernel itself writes this one, where its settings let it."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    _, limit = resource.getrlimit(resource.RLIMIT_CORE)
    if "/" in pattern or "|" in pattern or limit != resource.RLIM_INFINITY:
        pytest.skip(f"core_pattern {pattern}, limit {limit}: no core file in the working directory")

    def dump_core() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))

    with child(canary, site, protection, cwd=tmp_path, preexec_fn=dump_core) as process:
        until(process, "loaded")
        process.send_signal(signal.SIGABRT)
        assert process.wait(120) == -signal.SIGABRT
    (core,) = tmp_path.iterdir()
    content = core.read_bytes()
    assert len(content) > 1 << 20
    assert (PATTERN.tobytes() in content) == found
