"""Writing files so that a reader finds the old content or the new, never half of either."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

__all__ = ["replace_file", "sync_directory"]


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable (fsync(2) of the directory)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes, *, mode: int = 0o644, exclusive: bool = False) -> None:
    """Write ``content`` to a temporary file beside ``path``, sync it, and put it in its place.

    Args:
        path: the target; its directory exists.
        content: the whole new content.
        mode: permission bits from the first moment on; the umask may take more away.
        exclusive: raise FileExistsError, and change nothing, if ``path`` exists.

    Raises:
        OSError: as the system says; the old file is whole and the temporary one is gone.
    """
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode
    )
    try:
        with open(descriptor, "wb", closefd=True) as file:  # noqa: PTH123 - a descriptor
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            # link(2) refuses an existing name, which rename(2) would replace.
            os.link(temporary, path)
        else:
            temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    sync_directory(path.parent)
