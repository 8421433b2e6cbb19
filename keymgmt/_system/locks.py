"""Locks between processes (flock(2)), with a bound on the wait.

A lock is given back with LOCK_UN, and not only by closing its descriptor: a process that was forked
meanwhile has a copy of the descriptor, and would go on holding the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["acquire_lock", "lock_file", "release_lock"]

_PAUSE: Final = 0.01
_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def acquire_lock(descriptor: int, seconds: float, path: str | os.PathLike[str] = "") -> None:
    """Lock an open file or folder for this process alone.

    Args:
        descriptor: of the file or folder.
        seconds: how long to wait for whoever holds the lock; 0 tries once.
        path: its name, for the error.

    Raises:
        TimeoutError: another process held the lock all that time (``errno`` is ETIMEDOUT).
        OSError: the file system has no locks.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                message = f"another process held its lock for {seconds:g} seconds"
                raise TimeoutError(errno.ETIMEDOUT, message, os.fspath(path)) from None
            time.sleep(_PAUSE)
        else:
            return


def release_lock(descriptor: int) -> None:
    """Give the lock back and close the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _open(path: Path, mode: int, like: os.stat_result | None) -> int:
    while True:
        try:
            descriptor = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, mode)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # removed by whoever held it
                return os.open(path, _FLAGS)
        else:
            made = os.fstat(descriptor)
            if like is not None and (made.st_uid, made.st_gid) != (like.st_uid, like.st_gid):
                with contextlib.suppress(PermissionError):
                    owner = like.st_uid if os.geteuid() == 0 else -1
                    os.fchown(descriptor, owner, like.st_gid)
            if stat.S_IMODE(made.st_mode) != mode:
                os.fchmod(descriptor, mode)
            return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def lock_file(
    path: Path,
    seconds: float,
    *,
    mode: int = 0o600,
    like: os.stat_result | None = None,
    remove: bool = False,
) -> Iterator[None]:
    """Hold the lock of a file that is only there to be locked, and is made if it is missing.

    Only a user who may write to the file can hold its lock. flock(2) asks for no more than an open
    descriptor, so anybody who may read a file could hold its lock for ever: therefore a new file is
    made with ``mode``, which lets no reader in by default.

    Args:
        path: the lock file; its folder exists.
        seconds: how long to wait for whoever holds it; 0 tries once.
        mode: permission bits of a new one, whatever the umask.
        like: status of the folder; a new file gets the folder's owner and group where this user
            may set them, so that they can lock the file also after this process was killed.
        remove: remove the file before the lock is given back.

    Raises:
        TimeoutError: another process held the lock all that time.
        OSError: the file cannot be made, or is a link or a folder.
    """
    until = time.monotonic() + seconds
    while True:
        descriptor = _open(path, mode, like)
        try:
            acquire_lock(descriptor, max(0.0, until - time.monotonic()), path)
            # The file that was locked here may have been removed meanwhile: then others make a new
            # file and lock that, so this lock keeps nobody out.
            current = _is_at(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if current:
            break
        os.close(descriptor)
    try:
        yield
    finally:
        if remove:
            # A process that waits for the lock sees that the file is gone, and makes a new one.
            path.unlink(missing_ok=True)
        release_lock(descriptor)
