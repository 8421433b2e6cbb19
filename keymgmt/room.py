"""Whether there is memory for a model, asked before work starts."""

from __future__ import annotations

from keymgmt.errors import KeymgmtError

__all__ = ["check_room"]


def check_room(size: int, name: str) -> None:
    """KeymgmtError unless ``size`` bytes are free."""
    free = _free_memory()
    if free is not None and size > free:
        raise KeymgmtError(
            f"{name} needs {_mib(size)} of memory and {_mib(free)} are free",
            hint="nothing was started; free some memory or raise the limit of the container",
        )


def _free_memory() -> int | None:
    """Bytes that this process may still use, by the machine and its cgroup; None if unknown."""
    limits = []
    try:
        with open("/proc/meminfo") as file:  # noqa: PTH123 - no file of a disk
            limits += [int(line.split()[1]) << 10 for line in file if line.startswith("MemAvail")]
    except OSError:
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            limits.append(max(0, int(_text(limit)) - int(_text(used))))
        except (OSError, ValueError):  # another kind of cgroup, or the word "max"
            continue
    return min(limits, default=None)


def _text(path: str) -> str:
    with open(path) as file:  # noqa: PTH123
        return file.read().strip()


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
