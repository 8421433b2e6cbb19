"""Where the config file is: the path given, else ``$KEYMGMT_CONFIG``, the user's, the machine's."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from keymgmt.errors import ConfigError

__all__ = ["FILE_NAME", "find_config", "user_directory"]

FILE_NAME: Final = "keymgmt.toml"


def find_config() -> Path:
    """The config file that is used when none is named; ConfigError if there is none."""
    named = os.environ.get("KEYMGMT_CONFIG")
    if named:
        return Path(named)
    user = user_directory()
    candidates = [user / FILE_NAME] if user else []
    candidates.append(Path("/etc/keymgmt") / FILE_NAME)
    closed = []
    for path in candidates:
        # Not is_file(): since Python 3.14 that calls a file absent which it may not look for.
        try:
            if stat.S_ISREG(path.stat().st_mode):
                return path
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            closed.append(path)
    if closed:
        # Whoever opens it says why it cannot be read.
        return closed[0]
    raise ConfigError(
        "no config file: looked at $KEYMGMT_CONFIG, " + ", ".join(map(str, candidates)),
        hint="make one with: keymgmt init; or name one with -c FILE",
    )


def user_directory() -> Path | None:
    """Where this user's config is; None for a user without a home."""
    named = Path(os.environ.get("XDG_CONFIG_HOME") or "")
    if named.is_absolute():  # the XDG specification has relative ones ignored
        return named / "keymgmt"
    try:
        return Path.home() / ".config" / "keymgmt"
    except RuntimeError:
        return None
