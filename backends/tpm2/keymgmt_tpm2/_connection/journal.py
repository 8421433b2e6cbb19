"""What an operation has loaded in a bare TPM, written down where the next one looks.

A bare TPM keeps what a killed process loaded, and has three slots. Each operation has a file of its
own in the key directory, which is gone when all that it loaded is; so whoever holds the directory
finds files of operations that were killed or given up. Handles mean nothing after a restart of the
machine, so each line names the boot.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Final

__all__ = ["Journal", "left_loaded"]

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_PREFIX: Final = ".loaded-"


class Journal:
    """The file of one operation; with no directory, behind a resource manager, nothing is kept."""

    def __init__(self, directory: Path | None) -> None:
        self.kept = directory is not None
        self._path = (directory or Path()) / f"{_PREFIX}{secrets.token_hex(8)}"

    def add(self, handle: int) -> None:
        """Write down that a handle of the TPM is in use."""
        if not self.kept:
            return
        # Where it cannot be written, what this process leaves is freed by `keymgmt tpm flush`.
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o600)
            try:
                os.write(descriptor, f"{_boot()} {handle:08x}\n".encode())
            finally:
                os.close(descriptor)

    def end(self) -> None:
        """Everything was freed."""
        if self.kept:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def left_loaded(directory: Path) -> list[int]:
    """Handles that operations before this one left in the TPM; the caller holds the directory."""
    handles: list[int] = []
    with contextlib.suppress(OSError):
        for path in directory.glob(f"{_PREFIX}*"):
            for line in path.read_text("ascii", "replace").splitlines():
                boot, _, handle = line.partition(" ")
                with contextlib.suppress(ValueError):
                    handles += [int(handle, 16)] if boot == _boot() else []
            path.unlink(missing_ok=True)
    return handles


def _boot() -> str:
    try:
        return _BOOT.read_text("ascii").strip()
    except OSError:
        return "unknown"
