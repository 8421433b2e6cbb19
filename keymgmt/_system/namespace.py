"""File systems in memory that only this process and what it starts can see (mount_namespaces(7)).

A process enters a mount namespace of its own and mounts there; when the last process in the
namespace ends, its mounts are gone. Where the user may not do so, the process enters a user
namespace (user_namespaces(7)) with it, in which the user keeps its number; a process with several
threads cannot do that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pwd
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keymgmt._system.libc import check, libc

__all__ = [
    "FOLDER",
    "User",
    "drop_capabilities",
    "end_with",
    "enter_mount_namespace",
    "file_system",
    "forbid_new_privileges",
    "mount_memory",
    "mount_read_only",
    "unmount",
    "why_it_fails",
]

FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags to open a folder that nobody has put a link in the place of."""
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000  # <linux/sched.h>
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_SLAVE = 1, 32, 4096, 16384, 1 << 19
_NOSUID_NODEV, _NOEXEC = 2 | 4, 8
_MNT_DETACH: Final = 2
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38  # <linux/prctl.h>
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_NO_ID: Final = 2**32 - 1  # setresuid(2) takes it for "as it is": a program would stay root
_CAPABILITIES: Final = 64  # as many as capset(2) has room for
_CAPABILITY_VERSION: Final = 0x20080522


@dataclass(frozen=True)
class User:
    """Another user for a program: name, numbers with all groups, and home directory."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @classmethod
    def find(cls, text: str) -> User:
        """By name, or by a number, which need not have an account; KeyError if there is none."""
        if text.isascii() and text.isdigit():
            number = int(text) if len(text) <= len(str(_NO_ID)) else _NO_ID
            if number >= _NO_ID:
                raise KeyError(text)
            try:
                entry = pwd.getpwuid(number)
            except KeyError:
                return cls(text, number, number, (number,), "/")
        else:
            entry = pwd.getpwnam(text)
        groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir)

    def become(self) -> None:
        """Be that user for good; as root. The capabilities of root go with it."""
        os.setgroups(self.groups)
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)


def enter_mount_namespace(*, user_namespace: bool = True) -> bool:
    """Enter a mount namespace of its own; True where that took a user namespace.

    In one, this process has every capability over its own mounts and none over anything else. It
    keeps its user, group and supplementary groups; files of other users are shown with the
    overflow user (``/proc/sys/kernel/overflowuid``) as their owner.

    Args:
        user_namespace: whether one may be taken.

    Raises:
        OSError: the system does not permit it, and this process is in the namespaces it was in;
            EINVAL where it takes a user namespace and this process has several threads.
    """
    nested = False
    try:
        check(libc.unshare(_CLONE_NEWNS))
    except PermissionError:
        if not user_namespace:
            raise
        if len(os.listdir("/proc/self/task")) > 1:  # noqa: PTH208 - the count alone
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
        # Entering has four steps that cannot be taken back. A process in which only the first
        # succeeded would have the overflow user's number, and so would the files of all others.
        if reason := why_it_fails(_enter_user_namespace):
            raise PermissionError(errno.EPERM, reason) from None
        _enter_user_namespace()
        nested = True
    # As slaves (MS_SLAVE): mounts outside still show up here, and mounts here do not show outside.
    _mount(None, "/", None, _MS_REC | _MS_SLAVE, None)
    return nested


def _enter_user_namespace() -> None:
    user, group = os.geteuid(), os.getegid()
    check(libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def mount_memory(
    target: str | os.PathLike[str],
    size: int | None,
    *,
    mode: int,
    user: User | None = None,
    swappable: bool = False,
    execute: bool = False,
) -> str:
    """Mount a file system in memory over the folder ``target``, and return its kind.

    The kind is a tmpfs with ``noswap`` where the kernel has that option (Linux 6.4, and refused in
    a user namespace: tmpfs(5)); else a ramfs, whose pages are never swapped, and which has no limit
    of its own.

    Args:
        target: an existing folder.
        size: its limit in bytes; None for half of the memory.
        mode: permission bits of its root.
        user: owner of its root, if not this user.
        swappable: take a tmpfs that may be swapped rather than a ramfs without a limit.
        execute: whether programs in it may be run.

    Raises:
        OSError: as the system says.
    """
    common = f"mode={mode:o}" + (f",size={size}" if size is not None else "")
    flags = _NOSUID_NODEV | (0 if execute else _NOEXEC)
    options = [f"{common},noswap,huge=within_size", f"{common},noswap"]
    attempts = [("tmpfs", each) for each in options]
    attempts.append(("tmpfs", common) if swappable else ("ramfs", f"mode={mode:o}"))
    for kind, each in attempts:
        try:
            _mount("keymgmt", target, kind, flags, each)
        except OSError as error:
            if error.errno != errno.EINVAL or (kind, each) == attempts[-1]:
                raise
        else:
            break
    if user is not None:
        folder = os.open(target, FOLDER)
        try:
            os.fchown(folder, user.uid, user.gid)
        finally:
            os.close(folder)
    return kind


def mount_read_only(target: str | os.PathLike[str]) -> None:
    """Mount the file system at ``target`` a second time over itself, read-only.

    The first mount, below, can still be written, by descriptors that were opened before.
    """
    _mount(target, target, None, _MS_BIND, None)
    flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _NOSUID_NODEV | _NOEXEC
    _mount(None, target, None, flags, None)


def unmount(target: str | os.PathLike[str]) -> None:
    """Take off the topmost mount at ``target``; what is open in it stays open."""
    check(libc.umount2(os.fsencode(target), _MNT_DETACH), os.fspath(target))


def file_system(path: str | os.PathLike[str]) -> tuple[str, frozenset[str]] | None:
    """Kind and options of the file system that holds an existing ``path``; None if not known."""
    device = os.stat(path).st_dev  # noqa: PTH116 - a descriptor's path too
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            kind, _, options = after.split(" ", 2)
            return kind, frozenset(options.split(","))
    return None


def forbid_new_privileges() -> None:
    """What is executed from here on gains nothing by its set-user-id bit or capabilities."""
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def drop_capabilities() -> None:
    """Give up all capabilities, also those that a program that is executed would get."""
    for number in range(_CAPABILITIES):
        if libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0):
            code = ctypes.get_errno()
            # EINVAL: the kernel has no capability of this number, so all are dropped. EPERM: this
            # process may drop none from its bounding set. A program that it executes gets
            # capabilities from the ambient set, which is cleared next, or from its file
            # (execve(2)), which ``forbid_new_privileges`` forbids.
            if code in (errno.EINVAL, errno.EPERM):
                break
            raise OSError(code, os.strerror(code))
    check(libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()))


def end_with(parent: int) -> None:
    """Be killed when ``parent``, which forked this process, ends; at once if it has ended."""
    check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)


def why_it_fails(call: Callable[[], object]) -> str | None:
    """Try ``call`` in a forked child, and return why it fails there; None if it does not fail.

    For calls that cannot be taken back, such as entering a namespace. This process has one thread,
    so the fork is safe.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        reason = b"it ended early"
        try:
            call()
            reason = b""
        except OSError as error:
            reason = f"{error.filename or ''}: {error.strerror}".removeprefix(": ").encode()
        finally:
            os.write(writer, reason or b"\0")
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer, contextlib.suppress(ChildProcessError):  # noqa: PTH123
        reason = answer.read()
        os.waitpid(child, 0)
    return None if reason == b"\0" else reason.decode(errors="replace") or "it was killed"


def _mount(
    source: str | os.PathLike[str] | None,
    target: str | os.PathLike[str],
    kind: str | None,
    flags: int,
    options: str | None,
) -> None:
    def text(value: str | os.PathLike[str] | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    names = text(source), text(target), text(kind)
    check(libc.mount(*names, ctypes.c_ulong(flags), text(options)), os.fspath(target))
