"""Running other programs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


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
