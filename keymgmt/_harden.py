"""Keep this process's memory to itself, on request: no core dumps, no readers of the same user."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path
from typing import Final

from keymgmt.errors import KeymgmtError

__all__ = ["harden"]

_PR_GET_DUMPABLE: Final = 3  # <linux/prctl.h>
_PR_SET_DUMPABLE: Final = 4

_libc = ctypes.CDLL(None, use_errno=True)


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
    if _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) or _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0):
        raise KeymgmtError(
            f"the process cannot be made non-dumpable: {os.strerror(ctypes.get_errno())}"
        )
    status = Path("/proc/self/status").read_text()
    tracer = next(line for line in status.splitlines() if line.startswith("TracerPid:")).split()[1]
    if tracer != "0":
        raise KeymgmtError(
            f"process {tracer} traces this one and can read its memory",
            hint="end the debugger, or do without harden() while debugging",
        )
