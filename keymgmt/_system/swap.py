"""Swap to which the memory of this process could go in plaintext."""

from __future__ import annotations

from pathlib import Path

from keymgmt._system.cgroup import groups, number

__all__ = ["unencrypted_swap"]


def unencrypted_swap() -> tuple[str, ...]:
    """Swap devices and files to which this process's memory could go in plaintext; () if none.

    A device counts as encrypted if it is dm-crypt, and zram as memory unless it writes back to a
    disk. A group that may not swap, own or parent (``memory.swap.max`` 0) has none.
    """
    if _swap_forbidden():
        return ()
    try:
        lines = Path("/proc/swaps").read_text().splitlines()[1:]
    except OSError:
        return ()
    return tuple(line.split()[0] for line in lines if not _writes_no_plaintext(line.split()[0]))


def _swap_forbidden() -> bool:
    return any(number(group / "memory.swap.max") == 0 for _, group in groups("memory"))


def _writes_no_plaintext(device: str) -> bool:
    name = Path(device).resolve().name
    try:
        if name.startswith("zram"):
            return Path(f"/sys/block/{name}/backing_dev").read_text().strip() == "none"
        return Path(f"/sys/block/{name}/dm/uuid").read_text().startswith("CRYPT-")
    except OSError:
        # zram without that file cannot write back; anything else without it is a plain disk.
        return name.startswith("zram")
