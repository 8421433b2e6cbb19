"""The version, said without typer, whose import takes most of the time."""

from __future__ import annotations

import keymgmt

__all__ = ["print_version"]


def print_version() -> None:
    """Say which version this is."""
    print(f"keymgmt {keymgmt.__version__}")  # noqa: T201
