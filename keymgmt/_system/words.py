"""Words that follow a number."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, thing: str) -> str:
    """``1 model``, ``2 models``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
