"""Whether there is memory for a model, asked before work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from keymgmt._system.cgroup import groups, number
from keymgmt.errors import KeymgmtError

__all__ = ["check_free_memory", "free_memory"]

# Limit, use, and the pages of files in memory.stat, children included: the kernel takes those back
# before it ends a process (cgroup-v1/memory.rst, cgroup-v2.rst).
_FILES: Final = {
    1: (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable")),
}


def check_free_memory(size: int, name: str) -> None:
    """KeymgmtError unless ``size`` bytes are free."""
    free = free_memory()
    if free is not None and size > free:
        raise KeymgmtError(
            f"{name} needs {_mib(size)} of memory and {_mib(free)} are free",
            hint="nothing was started; free some memory or raise the limit of the container",
        )


def free_memory() -> int | None:
    """Bytes that this process may still use, by the machine and its groups; None if unknown.

    Page cache that can be taken back counts as free.
    """
    limits = [_group(version, folder) for version, folder in groups("memory")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvail")]
    except OSError:
        pass
    return min((limit for limit in limits if limit is not None), default=None)


def _group(version: int, folder: Path) -> int | None:
    limit_file, use_file, reclaimable = _FILES[version]
    limit, use = number(folder / limit_file), number(folder / use_file)
    if limit is None or use is None:  # without a limit, as the root group is
        return None
    cache = 0
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            name, value = line.split()
            cache += int(value) if name in reclaimable else 0
    except OSError:
        pass  # then no page counts as cache that can be taken back
    return max(0, limit - use + min(cache, use))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
