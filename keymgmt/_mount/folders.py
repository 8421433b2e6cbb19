"""Folders of files that are on no disk: memfds behind links, and a private file system.

Memfds need a non-dumpable process (``harden``): otherwise another process of the same user opens
them through ``/proc/PID/fd``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from keymgmt._mount.locked import LockedMapping, lock_mappings
from keymgmt._system.files import to_system
from keymgmt._system.locks import acquire_lock, release_lock
from keymgmt._system.namespace import FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable

    from keymgmt._system.namespace import User

__all__ = ["MemfdFolder", "MountedFolder", "locked_folder"]

_MFD_NOEXEC_SEAL: Final = 0x0008  # <linux/memfd.h>, Linux 6.3; Python names it from 3.14 on
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_PREFIX: Final = "keymgmt-mount-"


class MemfdFolder:
    """Sealed memfds (memfd_create(2)), and a folder of links to them, in /proc.

    The links hold no plaintext. Another process of the same user can list and exchange them. They
    point to ``/proc/self/fd/N``, or, with ``process``, to ``/proc/PID/fd/N`` of that process: then
    other processes of the user, such as those that it starts without its descriptors, can read the
    files as long as it runs. With ``lock`` the memfds are kept from swap, as far as the limit
    permits, until the last mapping of them ends.
    """

    path: Path

    def __init__(self, lock: bool = False, process: int | None = None) -> None:
        """Make the empty folder; OSError where the system permits no memfd, or has no /proc."""
        self._written: set[tuple[int, int]] = set()
        self._lock = lock
        self._fd_folder = f"/proc/{process or 'self'}/fd"
        self._locks: list[LockedMapping] = []
        self._descriptors: dict[str, int] = {}
        self._links: dict[Path, tuple[int, ...] | None] = {}
        descriptor = _memfd()
        try:
            os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC))
        finally:
            os.close(descriptor)
        self.path, self._lock_fd = locked_folder()

    def write(self, path: str, size: int, fill: Callable[[mmap.mmap], None]) -> None:
        """Make the read-only file ``path`` of ``size`` bytes; ``fill`` writes all of them."""
        descriptor = self._descriptors[path] = _memfd()
        self._written.add(_identity(descriptor))
        writable = _is_mapped_writable(path)
        os.fchmod(descriptor, 0o600 if writable else 0o400)
        if size:
            # Without this, memory that runs out would be a SIGBUS while the file is filled.
            os.posix_fallocate(descriptor, 0, size)
            if self._lock:
                self._locks.append(LockedMapping(descriptor, size))  # before any plaintext
            _fill(descriptor, size, fill)
        seals = _SEALS & ~fcntl.F_SEAL_WRITE if writable else _SEALS
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        link = self.path / to_system(path)
        link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        link.symlink_to(f"{self._fd_folder}/{descriptor}")
        self._links[link] = _state(link)

    def changed(self) -> str | None:
        """The path of a link that somebody exchanged since it was made; None if there is none."""
        for link, state in self._links.items():
            # Renaming a link away and back changes its ctime (inode(7)).
            if _state(link) != state:
                return str(link.relative_to(self.path))
        return None

    def close(self) -> None:
        """Remove the folder; files that were opened in it stay open, and are closed on exec."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        # After the descriptors were closed, since rmtree needs some itself.
        shutil.rmtree(self.path, ignore_errors=True)
        release_lock(self._lock_fd)
        self._close_on_exec()
        if self._lock:
            lock_mappings(self._written)
            for lock in self._locks:
                lock.close()
            # Once more: the limit may not have been high enough for both locks at a time.
            lock_mappings(self._written)

    def hand_over(self, user: User | None) -> None:
        """Let a program that is executed next have the files and the folder, as ``user``.

        Its descriptors keep the files, and the lock by which the folder counts as in use.
        """
        for descriptor in (*self._descriptors.values(), self._lock_fd):
            os.set_inheritable(descriptor, True)
            if user is not None:
                os.fchown(descriptor, user.uid, user.gid)
        if user is not None:
            # The outermost folder is given last: until then that user cannot reach the inner ones,
            # and put a link in the place of a folder whose owner is changed next.
            for parent, _, _ in os.walk(self.path, topdown=False):
                os.chown(parent, user.uid, user.gid, follow_symlinks=False)

    def _close_on_exec(self) -> None:
        # OpenVINO 2026.4 opens files without O_CLOEXEC, so a program that is executed later would
        # inherit descriptors of plaintext.
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # the descriptor of this listing is closed by now
                if _identity(int(link.name)) in self._written:
                    os.set_inheritable(int(link.name), False)


class MountedFolder:
    """The folder of a private file system, reached by its descriptor from inside or outside."""

    def __init__(self, descriptor: int, user: User | None = None) -> None:
        """Write to the folder of ``descriptor``; its files belong to ``user``, if one is given."""
        self.path = Path(f"/proc/self/fd/{descriptor}")
        self._user = user

    def write(self, path: str, size: int, fill: Callable[[mmap.mmap], None]) -> None:
        """Make the read-only file ``path`` of ``size`` bytes; ``fill`` writes all of them."""
        file = self.path / to_system(path)
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            folder = self.path / to_system(str(parent))
            if not folder.is_dir():
                folder.mkdir(mode=0o700)
                self._give(folder)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            self._give(descriptor)
            os.ftruncate(descriptor, size)
            if size:
                _fill(descriptor, size, fill)
        finally:
            os.close(descriptor)

    def _give(self, path: Path | int) -> None:
        if self._user is not None:
            os.chown(path, self._user.uid, self._user.gid)


def _is_mapped_writable(path: str) -> bool:
    # Readers of GGUF (gguflib, which OpenVINO GenAI has in it) map the file shared and writable.
    return path.lower().endswith(".gguf")


def _state(link: Path) -> tuple[int, ...] | None:
    """A state that differs after a link was exchanged or put back; None where the link is gone."""
    try:
        info = link.lstat()
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_ctime_ns, info.st_mode


def locked_folder() -> tuple[Path, int]:
    """A new folder, and a descriptor that holds its lock as long as the process lives.

    Folders that killed processes left are removed.
    """
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None  # noqa: S108
    _sweep(Path(base or tempfile.gettempdir()))
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        descriptor = os.open(path, FOLDER)
        # Before it was locked, another process may have removed it as an abandoned one.
        with contextlib.suppress(TimeoutError):
            acquire_lock(descriptor, 0)
            if path.exists():
                return path, descriptor
        os.close(descriptor)


def _sweep(base: Path) -> None:
    """Remove the folders that killed processes left: nobody holds their locks."""
    for folder in base.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, FOLDER)
            try:
                if os.geteuid() in (0, os.fstat(descriptor).st_uid):
                    acquire_lock(descriptor, 0)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                release_lock(descriptor)


def _identity(descriptor: int) -> tuple[int, int]:
    info = os.fstat(descriptor)
    return info.st_dev, info.st_ino


def _memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("keymgmt", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create("keymgmt", flags)  # before Linux 6.3


def _fill(descriptor: int, size: int, fill: Callable[[mmap.mmap], None]) -> None:
    memory = mmap.mmap(descriptor, size)
    # If ``fill`` fails, it has wiped the mapping. That cannot be closed here, since the frames of
    # the error still have views of it; it is freed together with the error.
    fill(memory)
    memory.close()
