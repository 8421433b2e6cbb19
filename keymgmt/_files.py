"""Writing files and folders so that a reader finds the old state or the new, never a mixture."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["left_behind", "new_directory", "replace_file", "replacing", "sync_directory"]

_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable (fsync(2) of the directory)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(
    path: Path, content: Buffer, *, mode: int = 0o644, exclusive: bool = False, keep: bool = False
) -> None:
    """Write ``content`` to a temporary file beside ``path``, sync it, and put it in its place.

    Args:
        path: the target; its directory exists.
        content: the whole new content.
        mode: permission bits from the first moment on; the umask may take more away.
        exclusive: raise FileExistsError, and change nothing, if ``path`` exists.
        keep: whoever could read an existing file can read the new one: its permission bits stay,
            and its owner too where the system allows that.

    Raises:
        OSError: as the system says; the old file is whole and the temporary one is gone.
    """
    with replacing(path, mode=mode, exclusive=exclusive) as file:
        file.write(content)
        if keep:
            _keep_readers(path, file.fileno())


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o644, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Give a temporary file beside ``path`` to write; it takes its place when all went well.

    Arguments and errors are those of ``replace_file``.
    """
    temporary = _temporary(path)
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode
    )
    try:
        with open(descriptor, "wb", closefd=True) as file:  # noqa: PTH123 - a descriptor
            yield file
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            _rename(temporary, path, _RENAME_NOREPLACE)
        else:
            temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    sync_directory(path.parent)


@contextlib.contextmanager
def new_directory(target: Path, *, replace: bool = False, mode: int = 0o777) -> Iterator[Path]:
    """Give a temporary folder beside ``target`` to fill; it becomes ``target`` when all went well.

    On an exception the folder is removed and ``target`` is as it was. What a killed process left
    for the same target is removed here by the next one.

    Args:
        target: the folder to be; its parent exists.
        replace: exchange an existing ``target`` atomically, and remove the old one afterwards.
        mode: permission bits; the umask may take more away.

    Raises:
        FileExistsError: ``target`` exists and ``replace`` is false, now or at the end.
        OSError: as the system says.
    """
    if not replace and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    _remove_abandoned(target)
    with contextlib.ExitStack() as stack:
        temporary = _make_locked(target, mode, stack)
        yield temporary
        _sync_tree(temporary)
        if replace and os.path.lexists(target):
            _rename(temporary, target, _RENAME_EXCHANGE)
        else:
            _rename(temporary, target, _RENAME_NOREPLACE)
        sync_directory(target.parent)


def _keep_readers(path: Path, descriptor: int) -> None:
    try:
        old = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISREG(old.st_mode):
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def left_behind(target: Path) -> list[Path]:
    """Temporary files and folders of ``target``: those in use, and what killed processes left."""
    pattern = re.compile(rf"\.{re.escape(_stem(target))}\.[0-9a-f]{{16}}\.tmp")
    return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{_stem(path)}.{secrets.token_hex(8)}.tmp")


def _stem(path: Path) -> str:
    # At most 255 bytes in all; a long name is cut at a whole character.
    return path.name.encode()[:200].decode(errors="ignore")


def _make_locked(target: Path, mode: int, stack: contextlib.ExitStack) -> Path:
    """A new temporary folder, locked while it is in use; ``stack`` removes it."""
    while True:
        temporary = _temporary(target)
        # Before it is made, so that no interrupt comes between. The name is random, hence ours.
        # After an exchange it is that of the old folder; after a plain rename nothing has it.
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        temporary.mkdir(mode=mode)
        # Another process may have taken it for abandoned before it was locked.
        lock = _lock(temporary)
        if lock is not None:
            stack.callback(os.close, lock)
            if temporary.exists():
                return temporary


def _lock(directory: Path) -> int | None:
    """Lock a folder against removal as abandoned; None if somebody else has it, or it is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(target: Path) -> None:
    for path in left_behind(target):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                lock = _lock(path)
                if lock is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(lock)


def _sync_tree(directory: Path) -> None:
    for parent, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(Path(parent) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(parent))


def _rename(source: Path, target: Path, flags: int) -> None:
    """renameat2(2); on a file system that lacks the flags, the nearest that rename(2) can do."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(source), os.fsencode(target)
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], flags) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(target))
    if flags == _RENAME_EXCHANGE:
        # Not atomic here: the old folder waits under a third name until the new one is in place.
        aside = _temporary(target)
        target.rename(aside)
        try:
            source.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        aside.rename(source)
    elif os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    else:
        source.rename(target)
