"""Folders of files that are on no disk and that only this process can open.

Two kinds, tried in this order; each says at its making whether this system permits it, so that
nothing is decrypted before. Both need a non-dumpable process (``harden``): otherwise another
process of the same user gets in through ``/proc/PID/fd``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from keymgmt._locked_files import LockedMapping, lock_mappings
from keymgmt.errors import KeymgmtError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DetachedFolder", "MemfdFolder", "PrivateFolder", "private_folder"]

_MFD_NOEXEC_SEAL: Final = 0x0008  # <linux/memfd.h>, Linux 6.3; Python names it from 3.14 on
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_HELPER: Final = Path(__file__).with_name("_mount_helper.py")
_HELPER_SECONDS: Final = 30


class PrivateFolder(ABC):
    """A folder in memory; ``path`` is how this process reaches it.

    Making one raises OSError where the system does not permit this kind.
    """

    path: Path

    def __init__(self) -> None:
        self._written: set[tuple[int, int]] = set()

    @abstractmethod
    def write(self, path: str, size: int, fill: Callable[[mmap.mmap], None]) -> None:
        """Make the read-only file ``path`` of ``size`` bytes; ``fill`` writes all of them."""

    @abstractmethod
    def changed(self) -> str | None:
        """A path that somebody exchanged since it was written; None if there is none."""

    @abstractmethod
    def close(self) -> None:
        """Remove the folder; what was opened in it stays open, and is closed on exec."""

    def _note(self, descriptor: int) -> None:
        self._written.add(_identity(descriptor))

    def _close_on_exec(self) -> None:
        # OpenVINO opens without O_CLOEXEC: a program executed later would inherit plaintext.
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # the one of this listing is closed by now
                if _identity(int(link.name)) in self._written:
                    os.set_inheritable(int(link.name), False)


class MemfdFolder(PrivateFolder):
    """Sealed memfds (memfd_create(2)), and a folder of links to ``/proc/self/fd/N``.

    The links hold no plaintext. Another process of the same user can list and exchange them.
    With ``lock`` they are kept from swap, as far as the limit permits, until the last mapping of
    them ends.
    """

    def __init__(self, lock: bool = False) -> None:
        super().__init__()
        self._lock = lock
        self._locks: list[LockedMapping] = []
        self._descriptors: dict[str, int] = {}
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None  # noqa: S108
        descriptor = _memfd()
        try:
            os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC))
        finally:
            os.close(descriptor)
        self.path = Path(tempfile.mkdtemp(prefix="keymgmt-", dir=base))

    def write(self, path: str, size: int, fill: Callable[[mmap.mmap], None]) -> None:
        """See PrivateFolder."""
        descriptor = self._descriptors[path] = _memfd()
        self._note(descriptor)
        os.fchmod(descriptor, 0o400)
        if size:
            os.posix_fallocate(descriptor, 0, size)  # no room is an error here, not a SIGBUS later
            if self._lock:
                self._locks.append(LockedMapping(descriptor, size))  # before any plaintext
            _fill(descriptor, size, fill)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        link = self.path / path
        link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        link.symlink_to(f"/proc/self/fd/{descriptor}")

    def changed(self) -> str | None:
        """See PrivateFolder."""
        for path, descriptor in self._descriptors.items():
            link = self.path / path
            if not link.is_symlink() or str(link.readlink()) != f"/proc/self/fd/{descriptor}":
                return path
        return None

    def close(self) -> None:
        """See PrivateFolder."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        shutil.rmtree(self.path, ignore_errors=True)  # needs descriptors itself
        self._close_on_exec()
        if self._lock:
            lock_mappings(self._written)
            for lock in self._locks:
                lock.close()
            lock_mappings(self._written)  # where the limit had no room for both


class DetachedFolder(PrivateFolder):
    """A ramfs that is mounted nowhere: it is reached through its descriptor alone.

    A helper process makes it, since only one without threads can get the right to.
    """

    def __init__(self) -> None:
        super().__init__()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            helper = [sys.executable, "-I", str(_HELPER), str(theirs.fileno())]
            try:
                subprocess.run(
                    helper,
                    pass_fds=[theirs.fileno()],
                    timeout=_HELPER_SECONDS,
                    check=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            except subprocess.SubprocessError as error:
                raise OSError(errno.EPERM, "the helper that mounts it ended early") from error
            ours.setblocking(False)
            said, descriptors, _, _ = socket.recv_fds(ours, 256, 1)
        if not descriptors:
            raise OSError(errno.EPERM, said.decode())
        self._mount = descriptors[0]
        os.set_inheritable(self._mount, False)
        self.path = Path(f"/proc/self/fd/{self._mount}")

    def write(self, path: str, size: int, fill: Callable[[mmap.mmap], None]) -> None:
        """See PrivateFolder."""
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            (self.path / parent).mkdir(mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o400, dir_fd=self._mount)
        try:
            self._note(descriptor)
            os.ftruncate(descriptor, size)
            if size:
                _fill(descriptor, size, fill)
        finally:
            os.close(descriptor)

    def changed(self) -> str | None:
        """See PrivateFolder; nobody else can reach it."""
        return None

    def close(self) -> None:
        """See PrivateFolder."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
        os.close(self._mount)
        self._close_on_exec()


def private_folder(lock: bool = False) -> PrivateFolder:
    """The first kind that this system permits; never one on a disk, or that others can read.

    Args:
        lock: keep the files from swap, as far as the limit permits (a ramfs has none to go to).

    Raises:
        KeymgmtError: it permits none; the reasons are named.
    """
    reasons = []
    kinds = ((partial(MemfdFolder, lock), "memfd"), (DetachedFolder, "detached ramfs"))
    for kind, name in kinds:
        try:
            return kind()
        except OSError as error:
            reasons.append(f"{name}: {error.strerror or error}")
    raise KeymgmtError(
        "this system has no files in memory that only one process can reach "
        f"({'; '.join(reasons)}), and a disk is not used instead",
        hint="permit memfd_create in the container's seccomp profile, with /proc mounted; or load "
        "the model from memory (keymgmt_openvino.load, or load_llm with a generation_config=)",
    )


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
    # On failure it is zeros, and goes with the error whose frames still show it.
    fill(memory)
    memory.close()
