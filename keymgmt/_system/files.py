"""Writing files and folders so that a reader finds the old state or the new, never a mixture."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from keymgmt._system.libc import libc
from keymgmt._system.locks import acquire_lock, release_lock
from keymgmt._system.refused import translate
from keymgmt.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from keymgmt._system.steps import Wait

__all__ = [
    "from_system",
    "left_behind",
    "make_folder",
    "naming",
    "new_directory",
    "replace_file",
    "replace_in",
    "replacing",
    "resumable_directory",
    "save_file",
    "sync_directory",
    "target_of",
    "to_system",
]

_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2
_TEMPORARY: Final = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp", re.DOTALL)
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_ACCESS_LISTS: Final = ("system.posix_acl_access", "system.posix_acl_default")


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError is raised with the path that a person gave.

    The error of a call that takes a descriptor names no path, and the temporary files that we make
    have names that mean nothing to that person.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        if name is None or _is_ours(os.fsdecode(name) if isinstance(name, (str, bytes)) else ""):
            error.filename = os.fspath(path)
            error.filename2 = None
        raise


def _is_ours(name: str) -> bool:
    return name.startswith("/proc/self/fd/") or any(map(target_of, Path(name).parts))


def to_system(name: str) -> str:
    """A name of a sealed model, which is UTF-8 on every disk, as this system's calls take it."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def from_system(name: str) -> str:
    """A name that this system's calls gave, read as UTF-8 whatever the locale says."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def make_folder(folder: Path, mode: int = 0o755) -> None:
    """Make a folder, and those above it, that others cannot write whatever the umask is.

    Args:
        folder: the folder; it may exist.
        mode: its permission bits if it is new; the umask may take more away. Those above it get
            0755.

    Raises:
        OSError: as the system says.
    """
    missing = [folder, *(parent for parent in folder.parents if not parent.exists())]
    for path in reversed(missing):
        path.mkdir(mode if path == folder else 0o755, exist_ok=True)


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
            _keep_readers(str(path), file.fileno())


def replace_in(folder: int, name: str, content: Buffer) -> Generator[Wait, None, None]:
    """``replace_file`` in an open folder, for a file whose readers stay; as work in steps.

    Args:
        folder: descriptor of the folder, which stays open meanwhile.
        name: of the file in it.
        content: the whole new content.

    Raises:
        OSError: as the system says; the old file is whole and the temporary one is gone.
    """
    temporary = _temporary(name)
    descriptor = os.open(temporary, _NEW_FILE, 0o644, dir_fd=folder)
    try:
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            _keep_readers(f"/proc/self/fd/{folder}/{name}", descriptor)
            yield functools.partial(_put, descriptor, temporary, folder, name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise


def _put(descriptor: int, temporary: str, folder: int, name: str) -> None:
    os.fsync(descriptor)
    os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def save_file(path: Path, content: Buffer, *, mode: int = 0o644, force: bool = False) -> None:
    """``replace_file`` for a path that a person named; errors are ours, with a hint.

    Args:
        path: the target.
        content: the whole new content.
        mode: permission bits of a new file.
        force: replace an existing one, whose readers stay.

    Raises:
        ConfigError: the file exists and ``force`` is not given, or this user cannot write there.
        KeymgmtError: the disk is full, or broken.
    """
    try:
        replace_file(path, content, mode=mode, exclusive=not force, keep=force)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists", hint="name another file, or give --force") from error
    except OSError as error:
        raise translate(error, path) from error


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o644, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Give a temporary file beside ``path`` to write; it takes its place when all went well.

    Arguments and errors are those of ``replace_file``.
    """
    temporary = _beside(path)
    with naming(path):
        descriptor = os.open(temporary, _NEW_FILE, mode)
    try:
        with naming(path), open(descriptor, "wb", closefd=True) as file:  # noqa: PTH123 - a descriptor
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
def new_directory(
    target: Path, *, replaceable: Callable[[Path], object] | None = None, mode: int = 0o755
) -> Iterator[Path]:
    """Give a temporary folder beside ``target`` to fill; it becomes ``target`` when all went well.

    Until then only this user may write in it, and we reach it by its descriptor, so that renaming
    it changes nothing. Otherwise somebody who may write beside ``target`` could put a link in it,
    through which we would write into, or change the owner of, a file elsewhere.

    On an exception the folder is removed and ``target`` is as it was. What a killed process left
    for the same target is removed here by the next one.

    Args:
        target: the folder to be; its parent exists.
        replaceable: looks at an existing ``target`` and raises unless all that is in it may be
            deleted. It is called before anything is written, before the two folders are exchanged
            atomically, and after that, when nobody reaches the old folder by its name any more;
            then the old folder is removed. Owner, group, mode and access lists are kept. With None
            an existing ``target`` is refused.
        mode: permission bits of a new folder; the umask may take more away.

    Raises:
        FileExistsError: ``target`` exists and nothing is to be replaced, now or at the end.
        ConfigError: this user cannot keep the owner and group of the old folder.
        OSError: as the system says.
    """
    replaces = os.path.lexists(target)
    if replaces and replaceable is None:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if replaces and replaceable is not None:
        replaceable(target)
        _check_owner(target)
    _remove_abandoned(target)
    with contextlib.ExitStack() as stack, naming(target):
        temporary, descriptor = _make_locked(target, mode, stack)
        new_mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.fchmod(descriptor, stat.S_IRWXU | new_mode & stat.S_ISGID)
        folder = Path(f"/proc/self/fd/{descriptor}")
        yield folder
        _sync_tree(folder)
        if not os.path.samestat(temporary.lstat(), os.fstat(descriptor)):
            raise OSError(errno.ESTALE, "the temporary folder was exchanged", str(temporary))
        if replaceable is not None and os.path.lexists(target):
            replaceable(target)
            _keep_access(target, folder)
            _rename(temporary, target, _RENAME_EXCHANGE)
            try:
                replaceable(temporary)
            except BaseException:
                _rename(temporary, target, _RENAME_EXCHANGE)
                raise
        else:
            os.fchmod(descriptor, new_mode)
            _rename(temporary, target, _RENAME_NOREPLACE)
        sync_directory(target.parent)


@contextlib.contextmanager
def resumable_directory(target: Path, label: str) -> Iterator[Path]:
    """Give a temporary folder beside ``target`` that is kept where filling it fails.

    The next call with this label gets what came so far, and so does nobody else: whoever makes
    ``target`` another way removes it.

    Args:
        target: what will be made of the folder's content; its parent exists.
        label: what it is filled with.

    Raises:
        ConfigError: another process fills it, or the folder of its name is not private to this
            user.
        OSError: as the system says.
    """
    number = hashlib.sha256(label.encode()).hexdigest()[:16]
    temporary = target.with_name(f".{_stem(target.name)}.{number}.tmp")
    with naming(target):
        while True:
            with contextlib.suppress(FileExistsError):
                temporary.mkdir(mode=0o700)
            lock = _lock(temporary)
            if lock is not None:
                break
            if os.path.lexists(temporary):
                raise ConfigError(
                    f"another process is making {target}", hint="wait until it is done"
                )
    try:
        info = os.fstat(lock)
        if info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise ConfigError(
                f"{temporary} is not private to this user, and {target} would be made of it",
                hint="look who made it, and remove it",
            )
        yield Path(f"/proc/self/fd/{lock}")
        shutil.rmtree(temporary, ignore_errors=True)
    finally:
        release_lock(lock)


def _check_owner(old: Path) -> None:
    """Refuse to replace a folder whose owner and group this user cannot give to another."""
    info = old.lstat()
    groups = {os.getegid(), *os.getgroups()}
    if os.geteuid() != 0 and (info.st_uid != os.geteuid() or info.st_gid not in groups):
        raise ConfigError(
            f"{old} belongs to user {info.st_uid} and group {info.st_gid}, which a new folder in "
            "its place would lose",
            hint="run this as that user, in that group, or name another folder",
        )


def _keep_access(old: Path, new: Path) -> None:
    """Give a new folder and all in it the owner, group, mode and access list of the old.

    A file that the old folder does not have gets those of the old folder itself.
    """
    for parent, _, names in os.walk(new, topdown=False):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            like = old / path.relative_to(new)
            if not os.path.lexists(like) or like.is_dir() != path.is_dir():
                like = old
            info = like.lstat()
            # keys.json may belong to another user, who rewrapped: its group and mode say who may
            # read it, and are kept.
            owner = info.st_uid if path == new or os.geteuid() == 0 else -1
            try:
                os.chown(path, owner, info.st_gid)
            except PermissionError:
                os.chown(path, owner, old.lstat().st_gid)
            path.chmod(stat.S_IMODE(info.st_mode) & (0o7777 if path.is_dir() else 0o666))
            if like != old or path == new:
                _keep_access_lists(like, path)


def _keep_access_lists(old: Path | str, new: Path | int) -> None:
    # A file has only the first of them.
    for name in _ACCESS_LISTS[: 1 if isinstance(new, int) else 2]:
        try:
            content = os.getxattr(old, name)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOTSUP):
                raise
        else:
            os.setxattr(new, name, content)


def _keep_readers(path: str, descriptor: int) -> None:
    try:
        old = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISREG(old.st_mode):
        new, mode = os.fstat(descriptor), stat.S_IMODE(old.st_mode) & 0o666
        try:
            if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
                os.fchown(descriptor, old.st_uid, old.st_gid)
        except PermissionError:
            try:
                os.fchown(descriptor, -1, old.st_gid)
            except PermissionError as error:
                if mode >> 3 & ~mode & 0o7:  # the group has a right that others do not have
                    raise ConfigError(
                        f"{path} is read by the group {old.st_gid}, which this user cannot keep",
                        hint="run this as its owner, or as a member of that group",
                    ) from error
        if stat.S_IMODE(new.st_mode) != mode:
            os.fchmod(descriptor, mode)
        _keep_access_lists(path, descriptor)


def left_behind(target: Path) -> list[Path]:
    """Temporary files and folders of ``target``: those in use, and what killed processes left."""
    folder, stem = target.parent, _stem(target.name)
    prefix = f".{stem}."
    return [
        folder / name
        for name in os.listdir(folder)  # noqa: PTH208 - thousands, and few are ours
        if name.startswith(prefix) and target_of(name) == stem
    ]


def target_of(name: str) -> str | None:
    """The name (its first 200 bytes) for which ``name`` is temporary; None for any other name."""
    match = _TEMPORARY.fullmatch(name)
    return match[1] if match else None


def _beside(path: Path) -> Path:
    return path.with_name(_temporary(path.name))


def _temporary(name: str) -> str:
    return f".{_stem(name)}.{os.urandom(8).hex()}.tmp"


def _stem(name: str) -> str:
    # With dot, number and ending at most 255 bytes, which is the limit of Linux file systems
    # (NAME_MAX). Bytes are cut, and not characters, since a name need not be UTF-8.
    return os.fsdecode(os.fsencode(name)[:200])


def _make_locked(target: Path, mode: int, stack: contextlib.ExitStack) -> tuple[Path, int]:
    """A new temporary folder and its descriptor, locked while in use; ``stack`` removes it."""
    while True:
        temporary = _beside(target)
        # Registered before the folder is made, so that no interrupt comes between the two; nobody
        # else has a folder of this random name. After an exchange it is the name of the old folder,
        # which goes then; after a plain rename nothing has this name.
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        temporary.mkdir(mode=mode)
        # Before it was locked, another process may have removed it as an abandoned one.
        lock = _lock(temporary)
        if lock is not None:
            stack.callback(release_lock, lock)
            if temporary.exists():
                return temporary, lock


def _lock(directory: Path) -> int | None:
    """Lock a folder against removal as abandoned; None if somebody else has it, or it is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        acquire_lock(descriptor, 0)
    except TimeoutError:
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
                    release_lock(lock)


def _sync_tree(directory: Path) -> None:
    for parent, _, names in os.walk(directory):
        for name in names:
            descriptor = os.open(Path(parent) / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(parent))


def _rename(source: Path, target: Path, flags: int) -> None:
    """renameat2(2); on a file system that lacks the flags, the nearest that rename(2) can do."""
    paths = os.fsencode(source), os.fsencode(target)
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], flags) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(target))
    if flags == _RENAME_EXCHANGE:
        # Not atomic here: the old folder waits under a third name until the new one is in place.
        aside = _beside(target)
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
