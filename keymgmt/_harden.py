"""Keep a process's memory to itself: no core dumps, no readers of the same user; and swap."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path
from typing import Final

from keymgmt.errors import KeymgmtError

__all__ = ["harden", "unencrypted_swap"]

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


def unencrypted_swap() -> tuple[str, ...]:
    """Swap devices and files to which this process's memory could go in plaintext; () if none.

    A device counts as encrypted if it is dm-crypt, and zram as memory unless it writes back to a
    disk. A cgroup that may not swap (``memory.swap.max`` 0) has none.
    """
    if _swap_forbidden():
        return ()
    try:
        lines = Path("/proc/swaps").read_text().splitlines()[1:]
    except OSError:
        return ()
    return tuple(line.split()[0] for line in lines if not _keeps_secrets(line.split()[0]))


def _swap_forbidden() -> bool:
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        group = next(line[3:] for line in groups if line.startswith("0::"))
        limit = Path(f"/sys/fs/cgroup{group}") / "memory.swap.max"
        return limit.read_text().strip() == "0"
    except (OSError, StopIteration):
        return False


def _keeps_secrets(device: str) -> bool:
    name = Path(device).resolve().name
    try:
        if name.startswith("zram"):
            return Path(f"/sys/block/{name}/backing_dev").read_text().strip() == "none"
        return Path(f"/sys/block/{name}/dm/uuid").read_text().startswith("CRYPT-")
    except OSError:
        # zram without that file cannot write back; anything else without it is a plain disk.
        return name.startswith("zram")
