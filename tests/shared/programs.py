"""Running other programs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

# How much memory a program took, KiB. Not ru_maxrss: a child begins with that of its parent.
PEAK_KIB = """
def peak_kib():
    with open("/proc/self/status") as status:
        return int(status.read().split("VmHWM:")[1].split()[0])
"""


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its exit code and, as text, what it wrote."""
    # A little less than pytest waits for a test.
    usual = {"capture_output": True, "text": True, "timeout": 280}
    return subprocess.run([*map(str, command)], **(usual | options))


def run_python(
    program: str, *arguments: object, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a text of Python by an interpreter of its own, as `run` does."""
    return run(sys.executable, "-c", program, *arguments, **options)


def run_keymgmt(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run our command line in a process of its own, as `run` does."""
    return run(sys.executable, "-P", "-m", "keymgmt", *arguments, **options)
