"""What other distributions announce, without importing any of it.

Nothing counts that comes from the working directory just because Python was started there.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path

__all__ = ["installed_entry_points", "working_directory"]


def installed_entry_points(group: str) -> list[EntryPoint]:
    """The entry points of a group, without those of the working directory."""
    stray = working_directory()
    return [
        entry
        for entry in entry_points(group=group)
        if entry.dist is None or _folder_of(entry.dist) != stray
    ]


def working_directory() -> Path | None:
    """The directory that ``python -m``, ``-c`` and the prompt put on ``sys.path`` unasked."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return None  # the directory was removed, and nothing can be imported from it
    if sys.flags.safe_path:
        return None  # python -P puts no directory on sys.path unasked
    unasked = "" in sys.path or getattr(sys.modules.get("__main__"), "__spec__", None) is not None
    # Where it is there twice, an editable install or PYTHONPATH also put it there, on purpose.
    times = sys.path.count("") + sys.path.count(str(here))
    return here if unasked and times == 1 else None


def _folder_of(distribution: Distribution) -> Path:
    return Path(str(distribution.locate_file(""))).absolute()
