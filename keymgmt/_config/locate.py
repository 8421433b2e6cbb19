"""Finding the config file and reading its TOML; shell completion needs only this module.

The file is the one that is named, else that of ``$KEYMGMT_CONFIG``, the user's, or the machine's.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import tomllib
from pathlib import Path
from typing import Any, Final

from keymgmt._system.trusted_file import read_file
from keymgmt.errors import ConfigError

__all__ = ["FILE_NAME", "MAX_CONFIG", "find_config", "read_config", "user_directory"]

FILE_NAME: Final = "keymgmt.toml"
MAX_CONFIG: Final = 1 << 20
MAX_DOTS: Final = 100
_QUOTED: Final = re.compile(rb"\"[^\"]*\"|'[^']*'")


def find_config() -> Path:
    """The config file that is used when none is named; ConfigError if there is none."""
    named = os.environ.get("KEYMGMT_CONFIG")
    if named:
        if _is_missing(Path(named)):
            raise ConfigError(
                f"there is no config {named}, which $KEYMGMT_CONFIG names",
                hint="correct or unset the variable, or make one with: keymgmt init",
            )
        return Path(named)
    user = user_directory()
    candidates = [user / FILE_NAME] if user else []
    candidates.append(Path("/etc/keymgmt") / FILE_NAME)
    closed = []
    for path in candidates:
        # is_file() would not do: since Python 3.14 it is false for a file in a folder that this
        # user may not enter, and such a config must not be passed over.
        try:
            if stat.S_ISREG(path.stat().st_mode):
                return path
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            closed.append(path)
    if closed:
        # Opening it raises the error that says why it cannot be read.
        return closed[0]
    raise ConfigError(
        "no config file: looked at $KEYMGMT_CONFIG, " + ", ".join(map(str, candidates)),
        hint="make one with: keymgmt init; or name one with -c FILE",
    )


def user_directory() -> Path | None:
    """Where this user's config is; None for a user without a home."""
    named = Path(os.environ.get("XDG_CONFIG_HOME") or "")
    if named.is_absolute():  # the XDG Base Directory specification says to ignore relative paths
        return named / "keymgmt"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    # With HOME=. the config of whatever folder one is in would be taken.
    return home / ".config" / "keymgmt" if home.is_absolute() else None


def read_config(file: Path, *, absent: str = "make one with: keymgmt init") -> dict[str, Any]:
    """The TOML of a config file; ConfigError where it cannot be read, trusted or parsed.

    ``absent`` is the hint where there is no such file.
    """
    content = read_file(
        file,
        label="config",
        limit=MAX_CONFIG,
        access="trusted",
        hint=absent if _is_missing(file) else "let this user read it, or name another one: -c FILE",
        irregular=f"name the file in it: -c {shlex.quote(str(file / FILE_NAME))}"
        if _is_folder(file)
        else "name the file itself: -c FILE; a pipe could change before it is read",
    )
    _check_dots(file, content)
    try:
        return tomllib.loads(content.decode("utf-8-sig"))  # some editors write a byte-order mark
    except (ValueError, RecursionError) as error:  # bad TOML, bad UTF-8, or too long a number
        raise ConfigError(f"{file} is not TOML: {error}") from error


def _is_missing(file: Path) -> bool:
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return True
    except OSError:
        return False
    return False


def _is_folder(file: Path) -> bool:
    return os.path.isdir(file)  # noqa: PTH112 - unlike Path.is_dir(), it raises for no path


def _check_dots(file: Path, content: bytearray) -> None:
    """Refuse dotted keys of very many parts, for which tomllib takes quadratic time."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.count(b".") > MAX_DOTS and _QUOTED.sub(b"", line).count(b".") > MAX_DOTS:
            raise ConfigError(
                f"{file} has more than {MAX_DOTS} dots outside of quotes in line {number}"
            )
