"""What a machine remembers against rollback: the highest release of each name, and a time.

The time is the highest that the clock showed when a model was opened that expires, less ten
minutes, so that a clock may be set by a little.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from keymgmt._system.files import replace_file
from keymgmt._system.locks import lock_file
from keymgmt._system.strict_json import JsonReader, dump, load_json
from keymgmt._system.trusted_file import read_file
from keymgmt.errors import ConfigError, FormatError
from keymgmt.sealed.times import check_time, utc_text

__all__ = ["remember", "remembered_release", "remembered_time"]

FORMAT: Final = "keymgmt-releases/1"
MAX_FILE: Final = 1 << 20
_WAIT: Final = 30.0
_LITTLE: Final = timedelta(minutes=10)
_HOUR: Final = len("2026-01-01T00")


def remembered_release(path: Path, name: str) -> int | None:
    """The highest release of ``name`` that was remembered, or None.

    Raises:
        ConfigError: the file is unreadable or damaged; it is never taken for an empty one.
    """
    return _read(path)[0].get(name)


def remembered_time(path: Path) -> str | None:
    """The highest time that was remembered, or None; raises as ``remembered_release``."""
    return _read(path)[1]


def remember(path: Path, name: str, release: int, *, time: bool = False) -> None:
    """Remember ``release`` of ``name`` if it is the highest, and ``time``, now, if it is later.

    The time is written once an hour at most. ConfigError if it cannot be kept.
    """
    now = utc_text(datetime.now(UTC) - _LITTLE) if time else ""

    def changed() -> bytes | None:
        known, seen = _read(path)
        later = now[:_HOUR] > (seen or "")[:_HOUR]
        if not later and release <= known.get(name, -1):
            return None
        known[name] = max(release, known.get(name, -1))
        return dump({"format": FORMAT, "releases": known, "time": now if later else seen})

    if changed() is None:
        return
    try:
        with lock_file(path.with_name(f".{path.name}.lock"), _WAIT):
            content = changed()
            if content is not None:
                replace_file(path, content, mode=0o600, keep=True)
    except OSError as error:
        raise ConfigError(
            f"cannot remember the release in {path}: {error.strerror}",
            hint="[policy] remember_releases names a file that this user can write",
        ) from error


def _read(path: Path) -> tuple[dict[str, int], str | None]:
    try:
        content = read_file(path, what="release memory", limit=MAX_FILE, access="trusted")
    except ConfigError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}, None
        raise
    try:
        reader = load_json(content, path.name, MAX_FILE)
        reader.version(FORMAT, "another version of keymgmt wrote it")
        entries = JsonReader(reader.members("releases"), f"releases in {path.name}")
        time = reader.text_or_none("time", limit=20)
        reader.end()
        check_time(time, f"time in {path.name}")
        return {name: entries.integer(name) for name in entries.names()}, time
    except FormatError as error:
        raise ConfigError(
            f"{path} is damaged: {error}",
            hint="restore it; without it an old release could be put back unnoticed",
        ) from error
