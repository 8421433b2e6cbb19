"""Reading a file, and knowing who could have written it.

Rules: only regular files, at most so many bytes, and a fifo does not block. A file that decides
whom to trust, or that holds a secret, is read only where nobody but root and this user could have
put it there: the file, each folder above it, and each link on the way and what it points to belong
to one of the two and are not writable by others. In a folder with the sticky bit, such as /tmp,
others may add names and may not exchange ours, so an entry of ours in it counts.

A group may write where it is this user's own and has no other member, as Debian has it by default
and its sshd allows (user-group-modes.patch).
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import shlex
import stat
from pathlib import Path
from typing import Final, Literal

from keymgmt.errors import ConfigError, KeymgmtError

__all__ = ["Access", "check_trusted", "open_file", "read_file"]

Access = Literal["any", "trusted", "private"]
"""Who may have access: anybody; others may read and not write; nobody but this user and root."""

_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK
# A writer that works as we do may put a new file in the place of the opened one at any moment.
_EXCHANGES: Final = 100
_LINKS: Final = 40  # as many as the kernel follows (path_resolution(7))


def read_file(
    path: Path,
    *,
    label: str,
    limit: int,
    access: Access,
    error: type[KeymgmtError] = ConfigError,
    hint: str | None = None,
    irregular: str | None = None,
) -> bytearray:
    """The content of a regular file, in memory that the caller may wipe.

    Args:
        path: the file; links are followed.
        label: a word for the kind of file, for messages: "config", "key file".
        limit: bytes that it may have at most.
        access: who may have access to it.
        error: class of the error: ConfigError for a file that the operator named, a ProviderError
            for one that only a provider needs.
        hint: the way out where the file is missing or unreadable.
        irregular: the way out where it is a folder, a pipe or a device.

    Raises:
        KeymgmtError: of the class ``error``; ``__cause__`` is the OSError where the system refused,
            such as a FileNotFoundError.
    """
    descriptor = open_file(
        path, label=label, access=access, error=error, hint=hint, irregular=irregular
    )
    try:
        info = os.fstat(descriptor)
        if info.st_size > limit:
            raise error(f"the {label} {path} is larger than {limit} bytes")
        content = bytearray(info.st_size)
        try:
            # One byte more is asked for, to see whether the file grew meanwhile.
            count = os.preadv(descriptor, [content, bytearray(1)], 0)
            if count and not info.st_size:
                # sysfs and configfs make a file's content when it is read; before, its size is 0.
                with open(descriptor, "rb", closefd=False) as file:
                    content, count = bytearray(file.read(limit + 1)), 0
        except OSError as reason:
            raise error(f"cannot read the {label} {path}: {reason.strerror}") from reason
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise error(f"the {label} {path} is larger than {limit} bytes")
    if count != info.st_size:
        raise error(f"the {label} {path} changed while it was read", hint="try again")
    return content


def open_file(
    path: Path,
    *,
    label: str,
    access: Access,
    error: type[KeymgmtError] = ConfigError,
    hint: str | None = None,
    irregular: str | None = None,
    flags: int = os.O_RDONLY,
) -> int:
    """Open a regular file that may be large; the caller closes the descriptor.

    Arguments and errors are those of ``read_file``; ``flags`` are further ones of open(2).
    """
    for _ in range(_EXCHANGES):
        descriptor = _open_once(path, label, access, error, (hint, irregular), flags)
        if descriptor is not None:
            return descriptor
    raise error(f"the {label} {path} was exchanged again and again while it was read")


def _open_once(
    path: Path,
    label: str,
    access: Access,
    error: type[KeymgmtError],
    hints: tuple[str | None, str | None],
    flags: int,
) -> int | None:
    """A descriptor, or None where another file took the place of the one that was opened."""
    hint, irregular = hints
    try:
        descriptor = os.open(path, _FLAGS | flags)
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the name
        why = reason.strerror if isinstance(reason, OSError) else "its name has a NUL"
        raise error(f"cannot read the {label} {path}: {why}", hint=hint) from reason
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise error(f"the {label} {path} is not a regular file", hint=irregular)
        if access != "any":
            check_trusted(path, label=label, private=access == "private", error=error)
            if not _is_same(path, info):
                return None
        stack.pop_all()
    return descriptor


def check_trusted(
    path: Path, *, label: str, private: bool, error: type[KeymgmtError] = ConfigError
) -> None:
    """Refuse a file or folder that others than root and this user could have put there.

    Args:
        path: of the file or folder, which exists.
        label: a word for the kind of file, for messages.
        private: whether others may not even read it.
        error: class of the error.

    Raises:
        KeymgmtError: of the class ``error``; it names the one file, folder or link, and the way
            out: the one ``chmod`` or ``chown`` that mends it, but no ``chown`` of a folder above.
    """
    try:
        steps = _steps(path)
    except OSError as reason:
        raise error(f"cannot look at the {label} {path}: {reason.strerror}") from reason
    for index, (step, info) in enumerate(steps):
        last = index == len(steps) - 1
        # In a folder with the sticky bit nobody can exchange an entry of another user (chmod(2));
        # the next step looks at who owns the entry.
        sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX and not last
        problem = _owner_problem(info, above=not last) or (
            None
            if sticky or stat.S_ISLNK(info.st_mode)
            else _mode_problem(step, info, last and private)
        )
        if problem is not None:
            subject = f"the {label} {path}" if last else f"the {label} {path}, in {step},"
            raise error(
                f"{subject} is refused: {problem[0]}",
                hint=problem[1].format(path=shlex.quote(str(step))),
            )


def _steps(path: Path) -> list[tuple[Path, os.stat_result]]:
    """Each folder and link on the way to a file, from the root on, and the file."""
    steps: list[tuple[Path, os.stat_result]] = []
    # ".." goes up from where the links before it led, as in the kernel.
    todo = list(reversed(path.absolute().parts))
    current, links = Path(todo.pop()), 0
    steps.append((current, current.lstat()))
    while todo:
        part = todo.pop()
        current = current.parent if part == ".." else current / part
        info = current.lstat()
        steps.append((current, info))
        if stat.S_ISLNK(info.st_mode):
            links += 1
            if links > _LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = current.readlink()
            parts = list(target.parts)
            current = Path(parts.pop(0)) if target.is_absolute() else current.parent
            todo += reversed(parts)
    return steps


def _is_same(path: Path, info: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), info)
    except OSError:
        return False


def _owner_problem(info: os.stat_result, *, above: bool) -> tuple[str, str] | None:
    if info.st_uid == 0:
        return None
    # This is asked before the comparison with this user, who may have the very number that stands
    # for all users without a mapping.
    if _is_unmapped(info.st_uid):
        return (
            "its owner does not exist in this container or user namespace",
            "mount {path} so that its owner is root or this user in the container"
            + (
                f", and run it as another user than {info.st_uid}, which stands for all others"
                if info.st_uid == os.geteuid()
                else ""
            ),
        )
    if info.st_uid == os.geteuid():
        return None
    said = f"it belongs to user {info.st_uid}"
    if above:
        # It may be the home of that user, who would lose it by a chown.
        return said, "run this as that user, or keep the file in a folder of this user or of root"
    return said, f"chown {os.geteuid()} {{path}}"


def _is_unmapped(user: int) -> bool:
    """Whether the kernel shows this user for one that the user namespace does not map."""
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        mapped = Path("/proc/self/uid_map").read_text().split()
    except (OSError, ValueError):
        return False
    return user == overflow and mapped != ["0", "0", "4294967295"]


def _mode_problem(path: Path, info: os.stat_result, private: bool) -> tuple[str, str] | None:
    mode = stat.S_IMODE(info.st_mode)
    if private and mode & 0o077:
        return f"others can use it (mode {mode:04o})", "chmod go= {path}"
    if mode & 0o002:
        return f"others can write it (mode {mode:04o})", "chmod go-w {path}"
    # With an access list the bits of the group are its mask (acl(5)), and say nothing of the group.
    if mode & 0o020 and _has_access_list(path):
        return "others can write it (by its access list)", "setfacl -b {path}"
    if mode & 0o020 and not _own_group(info.st_gid):
        return f"others can write it (its group, mode {mode:04o})", "chmod g-w {path}"
    return None


def _has_access_list(path: Path) -> bool:
    try:
        os.getxattr(path, "system.posix_acl_access")
    except OSError as error:
        # The file has no list, or its file system has no lists. After any other error nothing is
        # known, and the file counts as one with a list.
        return error.errno not in (errno.ENODATA, errno.ENOTSUP)
    return True


def _own_group(group: int) -> bool:
    """Whether a group is this user's own, and nobody else is in it."""
    try:
        user = pwd.getpwuid(os.geteuid())
        members = set(grp.getgrgid(group).gr_mem) - {user.pw_name}
    except KeyError:
        return False
    if user.pw_gid != group or members:
        return False
    return not any(
        other.pw_gid == group and other.pw_uid != user.pw_uid for other in pwd.getpwall()
    )
