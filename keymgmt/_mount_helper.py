"""Make a file system in memory and hand it over; a program of its own, with no import of ours.

``python _mount_helper.py N``: makes a ramfs that is mounted nowhere (fsopen(2), fsmount(2)) and
sends its descriptor through the socket N. A user without the right to mount gets it in a user
namespace of this process, which is why it is not done in the caller's: a process with threads may
not enter one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
from pathlib import Path

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same on every architecture
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_CLOEXEC = 1
_SET_STRING, _CREATE = 1, 6
_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_PR_SET_DUMPABLE = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _call(number: int, *arguments: object) -> int:
    return _check(_libc.syscall(ctypes.c_long(number), *arguments))


def _make() -> int:
    # ramfs and not tmpfs: its pages are never swapped out, and its size is the caller's to watch.
    context = _call(_FSOPEN, b"ramfs", _CLOEXEC)
    _call(_FSCONFIG, context, _SET_STRING, b"mode", b"0700", 0)
    _call(_FSCONFIG, context, _CREATE, None, None, 0)
    return _call(_FSMOUNT, context, _CLOEXEC, _NOSUID_NODEV_NOEXEC)


def _become_root_here() -> None:
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
    with contextlib.suppress(OSError):  # where there is none, none is asked for
        Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def main(number: int) -> None:
    """Send the descriptor, or why there is none."""
    with socket.socket(fileno=number) as channel:
        try:
            try:
                mount = _make()
            except PermissionError:
                _become_root_here()
                mount = _make()
        except OSError as error:
            channel.send((error.strerror or "refused").encode())
        else:
            socket.send_fds(channel, [b"+"], [mount])


if __name__ == "__main__":
    main(int(sys.argv[1]))
