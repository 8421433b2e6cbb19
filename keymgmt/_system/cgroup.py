"""The control groups that this process is in, own and parents, of version 1 and 2 (cgroups(7))."""

from __future__ import annotations

import functools
import math
import os
import sys
from pathlib import Path, PurePosixPath

__all__ = ["cpus", "groups", "number"]


def groups(controller: str) -> list[tuple[int, Path]]:
    """Version and folder of each group that limits ``controller`` here, the innermost first.

    A container sees its own group at the root of the mounted hierarchy, and the kernel may name a
    path that is not there (``/..`` stands for a group outside, cgroup_namespaces(7)).
    So the parents of the path are listed too, up to that root; whoever reads the files of a group
    passes over a folder that does not exist.
    """
    folders = []
    mounts = [line.split() for line in _lines("/proc/self/mounts")]
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        version = 1 if controllers else 2
        if version == 1 and controller not in controllers.split(","):
            continue
        for _, mount_point, kind, options, *_ in mounts:
            if (version == 2 and kind == "cgroup2") or (
                version == 1 and kind == "cgroup" and controller in options.split(",")
            ):
                inner = PurePosixPath(path.replace("/..", "").lstrip("/"))
                folders += [(version, Path(mount_point) / each) for each in (inner, *inner.parents)]
    return list(dict.fromkeys(folders))


def number(path: Path) -> int | None:
    """The number in a file of a group; None where the file is missing or says that no limit is set.

    A file without a limit says ``max`` in version 2.
    """
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def cpus() -> int:
    """Processors that this process may keep busy: by affinity, and by the quotas of its groups."""
    return max(1, min(len(os.sched_getaffinity(0)), _quota()))


@functools.cache  # six files of the system are read: more than it costs to decrypt a small model
def _quota() -> int:
    """The processors that the groups of this process allow, as they were when it first asked."""
    allowed = sys.maxsize
    for version, group in groups("cpu"):
        try:
            if version == 2:
                quota, period = map(int, (group / "cpu.max").read_text().split())
            else:
                quota, period = (
                    int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
                )
        except (OSError, ValueError):  # the root group has no such file, and "max" is no limit
            continue
        if quota > 0:
            allowed = min(allowed, math.ceil(quota / period))
    return allowed


# Who forks a worker may put it into a group of its own.
os.register_at_fork(after_in_child=_quota.cache_clear)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
