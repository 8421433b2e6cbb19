"""A hardened process leaves no core dump, and another process of its user cannot read it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from forks import NOBODY, nobody_can
from programs import run, run_python

PR_SET_DUMPABLE, PR_SET_PTRACER = 4, 0x59616D61

# argv: harden or not. As root it becomes nobody first, since root may read anybody. A change of
# user makes a process non-dumpable, which is undone, so that the control is an ordinary process.
CHILD = f"""
import ctypes, os, sys
from keymgmt import harden  # before another user may not read this Python's folder
libc = ctypes.CDLL(None)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
    libc.prctl({PR_SET_DUMPABLE}, 1, 0, 0, 0)
libc.prctl({PR_SET_PTRACER}, ctypes.c_ulong(-1), 0, 0, 0)
if sys.argv[1] == "harden":
    harden()
print("ready", flush=True)
sys.stdin.readline()
"""


def readable_by_its_user(pid: int) -> bool:
    """Whether the same user can open the process's memory."""
    return nobody_can(lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY)))


@pytest.mark.parametrize(("how", "readable"), [("harden", False), ("leave", True)])
def test_others_of_the_same_user(how, readable):
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        assert readable_by_its_user(process.pid) == readable
        process.stdin.write("\n")


def test_core_dumps_are_off_for_good():
    program = "import keymgmt, resource; keymgmt.harden(); keymgmt.harden();"
    program += "print(*resource.getrlimit(resource.RLIMIT_CORE))"
    done = run_python(program)
    assert done.stdout == "0 0\n", done.stderr


def test_a_tracer_is_told(require_tool, tmp_path):
    strace = require_tool("strace", package="strace")
    program = "import keymgmt; keymgmt.harden()"
    done = run(strace, "-o", tmp_path / "trace", sys.executable, "-c", program)
    assert done.returncode == 1
    assert "traces this one" in done.stderr
