"""The objects that an operation has loaded in a bare TPM, noted in a file for the next operation.

A TPM without a resource manager keeps the objects of a killed process, and has three slots for all.
So each operation notes its objects in a file of its own in the key directory, and removes the file
when all of them are freed. An operation that holds the directory then finds only files of
operations that were killed or given up, and frees their objects. Handles are void after a restart
of the machine, so each line names the boot.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final

__all__ = ["Journal", "free_left"]

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_PREFIX: Final = ".loaded-"


class Journal:
    """The file of one operation; without a directory (with a resource manager) none is written."""

    def __init__(self, directory: Path | None) -> None:
        self.kept = directory is not None
        self._path = _new_path(directory or Path())

    def add(self, handle: int) -> None:
        """Note that a handle of the TPM is in use."""
        if not self.kept:
            return
        # If the file cannot be written, `keymgmt tpm flush` frees the objects of a killed process.
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o600)
            try:
                os.write(descriptor, f"{_boot()} {handle:08x}\n".encode())
            finally:
                os.close(descriptor)

    def end(self) -> None:
        """Remove the file after everything was freed."""
        if self.kept:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def free_left(directory: Path, free: Callable[[list[int]], object]) -> None:
    """Free what earlier operations left in the TPM; the caller holds the directory.

    A file goes once all of it is freed, so that a connection that breaks here loses none. It has a
    new name before it is read: a given-up operation that notes one more object makes a new file.
    """
    with contextlib.suppress(OSError):
        for path in list(directory.glob(f"{_PREFIX}*")):
            taken = path.rename(_new_path(directory))
            handles: list[int] = []
            for line in taken.read_text("ascii", "replace").splitlines():
                boot, _, handle = line.partition(" ")
                with contextlib.suppress(ValueError):
                    handles += [int(handle, 16)] if boot == _boot() else []
            free(handles)
            taken.unlink(missing_ok=True)


def _new_path(directory: Path) -> Path:
    return directory / f"{_PREFIX}{secrets.token_hex(8)}"


def _boot() -> str:
    try:
        return _BOOT.read_text("ascii").strip()
    except OSError:
        return "unknown"
