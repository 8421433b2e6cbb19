"""What other distributions announce, without importing any of it.

Nothing counts that comes from the working directory just because Python was started there.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path

__all__ = ["announced", "source_of", "working_directory"]


def announced(group: str) -> dict[str, list[EntryPoint]]:
    """The entry points of a group by name, sorted; a name with more than one is ambiguous.

    Those of the working directory are left out. A distribution may stand on ``sys.path`` twice; the
    first one wins, as for imports.
    """
    stray = working_directory()
    found: dict[str, dict[tuple[str, str], EntryPoint]] = {}
    for entry in entry_points(group=group):
        if entry.dist is None or _folder_of(entry.dist) != stray:
            found.setdefault(entry.name, {}).setdefault((source_of(entry), entry.value), entry)
    return {name: list(found[name].values()) for name in sorted(found)}


def source_of(entry: EntryPoint) -> str:
    """The name of an entry point's distribution, which one that was removed by half may lack."""
    return (entry.dist and entry.dist.name) or "an unknown distribution"


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
