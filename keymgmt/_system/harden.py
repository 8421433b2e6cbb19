"""Keep a process's memory to itself: no core dumps, no readers of the same user; and swap."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path
from typing import Final

from keymgmt._system.libc import libc
from keymgmt.errors import KeymgmtError

__all__ = ["empty_core_dumps", "harden", "is_dumpable", "set_undumpable"]

_PR_GET_DUMPABLE: Final = 3  # <linux/prctl.h>
_PR_SET_DUMPABLE: Final = 4


def harden() -> None:
    """Forbid core dumps, and make the process non-dumpable (prctl(2), PR_SET_DUMPABLE).

    Then other processes of the same user cannot read its memory, descriptors or maps, attach a
    debugger or make it dump core; root still can. Call it first thing: a descriptor of
    ``/proc/PID/mem`` that somebody opened before goes on reading. Children of a fork inherit it;
    a program that is executed does not, and a change of user ids undoes it.

    Raises:
        KeymgmtError: the system refused, or a debugger is attached already.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    set_undumpable()
    status = Path("/proc/self/status").read_text()
    tracer = next(line for line in status.splitlines() if line.startswith("TracerPid:")).split()[1]
    if tracer != "0":
        raise KeymgmtError(
            f"process {tracer} traces this one and can read its memory",
            hint="end the debugger, or do without harden() while debugging",
        )


def empty_core_dumps() -> None:
    """Leave all memory out of core dumps of this process and what it executes (core(5)).

    RLIMIT_CORE does not stop a system that pipes core dumps to a handler (a ``|`` in
    /proc/sys/kernel/core_pattern), so the dump itself is emptied. Where /proc is read-only, this
    does nothing.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/coredump_filter").write_text("0")


def is_dumpable() -> bool:
    """Whether other processes of this user may look into this one; False where prctl(2) fails."""
    return bool(libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 1)


def set_undumpable() -> None:
    """Part of ``harden``, for a process that a debugger may attend; KeymgmtError if refused."""
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) or libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0):
        raise KeymgmtError(
            f"the process cannot be made non-dumpable: {os.strerror(ctypes.get_errno())}"
        )
