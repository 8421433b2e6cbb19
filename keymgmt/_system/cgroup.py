"""The control groups that this process is in, own and parents, of version 1 and 2 (cgroups(7))."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

__all__ = ["cpus", "groups", "number"]


def groups(controller: str) -> list[tuple[int, Path]]:
    """Version and folder of each group that limits ``controller`` here, the innermost first.

    In a container, whose own group is at the root of what it sees, the path that the kernel tells
    may not be there; the root is.
    """
    found = []
    mounts = [line.split() for line in _lines("/proc/self/mounts")]
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        version = 1 if controllers else 2
        if version == 1 and controller not in controllers.split(","):
            continue
        for _, place, kind, options, *_ in mounts:
            if (version == 2 and kind == "cgroup2") or (
                version == 1 and kind == "cgroup" and controller in options.split(",")
            ):
                inner = PurePosixPath(path.replace("/..", "").lstrip("/"))
                found += [(version, Path(place) / each) for each in (inner, *inner.parents)]
    return list(dict.fromkeys(found))


def number(path: Path) -> int | None:
    """What a file of a group says; None where it is not there, or says that there is no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def cpus() -> int:
    """Processors that this process may keep busy: by affinity, and by the quotas of its groups."""
    allowed = len(os.sched_getaffinity(0))
    for version, group in groups("cpu"):
        try:
            if version == 2:
                quota, period = map(int, (group / "cpu.max").read_text().split())
            else:
                quota, period = (
                    int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
                )
        except (OSError, ValueError):  # the root has none, and "max" is no limit
            continue
        if quota > 0:
            allowed = min(allowed, math.ceil(quota / period))
    return max(1, allowed)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
