"""A config with keys of its own, for the demo and the leak check; it goes with its folder."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import keymgmt

if TYPE_CHECKING:
    from pathlib import Path

    from keymgmt import Config

__all__ = ["make_throwaway_keys"]


def make_throwaway_keys(home: Path) -> Config:
    """Make the folder ``home`` as ``keymgmt init`` does: keymgmt.toml, keys, publisher.pem."""
    subprocess.run(
        [sys.executable, "-m", "keymgmt.cli", "init", home], check=True, stdout=subprocess.DEVNULL
    )
    return keymgmt.load_config(home / "keymgmt.toml")
