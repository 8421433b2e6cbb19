"""Files below a user's home directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["expand_home"]


def expand_home(text: str, error: Callable[[str], Exception] = ValueError) -> Path:
    """A path with its leading ``~`` or ``~user`` expanded; ``error`` where there is no home.

    A relative HOME is none: it would lead into whatever folder one is in.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError as cause:
        raise error(f"there is no home directory for {text!r}") from cause
    if text.startswith("~") and not path.is_absolute():
        raise error(f"there is no home directory for {text!r}: HOME is a relative path")
    return path
