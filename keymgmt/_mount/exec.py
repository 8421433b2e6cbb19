"""Running any program on a sealed model: two processes, and only one of them ever has a key.

The process that was started becomes the program. First it forks a child, which opens the model and
stays outside of all namespaces, so that files and their owners are what the config expects. Then it
enters namespaces itself, mounts a file system in memory there, and gives the child a descriptor of
that, to fill it::

    the program to be                       its child
    enters a mount namespace                reads config, trust and keys; opens the model
                     <----------- name and sizes of the files
    mounts, opens   the folder --------->
                                            decrypts into it, closes the keys, and ends
    mounts it read-only, drops its privileges, and executes the program

Where the system permits no namespace, the process decrypts into memfds itself, and the program
inherits these.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from keymgmt._mount.decrypt import decrypt_files
from keymgmt._mount.folders import MemfdFolder, MountedFolder
from keymgmt._mount.private import PrivateMount, no_namespace
from keymgmt._mount.supervise import supervise
from keymgmt._providers.secret_source import CREDENTIALS
from keymgmt._system.harden import set_undumpable
from keymgmt._system.namespace import (
    drop_capabilities,
    end_with,
    enter_mount_namespace,
    forbid_new_privileges,
    mount_memory,
)
from keymgmt._system.swap import unencrypted_swap
from keymgmt._system.trusted_file import check_trusted
from keymgmt.errors import ConfigError, KeymgmtError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from keymgmt._mount.supervise import Ready
    from keymgmt._system.namespace import User
    from keymgmt._verbs.open import SealedModel

__all__ = ["Launch", "NotStarted"]

_TEMPORARY: Final = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - mounted over
_VARIABLES: Final = ("TMPDIR", "TMP", "TEMP")
_EMPTY: Final = 4096  # bytes
_LAST_SECONDS: Final = 2
_MODELS: Final = "keymgmt"
# A kernel that pipes core dumps to a handler ignores every limit but this value (core(5)).
_NO_CORE: Final = 1


class NotStarted(KeymgmtError):
    """The program cannot be executed.

    The exit code is that of shells: 127 where there is no such program, 126 otherwise.
    """

    def __init__(self, message: str, code: int, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = code


_EXECUTE: Final[dict[int | None, str]] = {  # The program itself was found before.
    errno.ENOENT: "the interpreter in its first line, or its loader, is not on this machine",
    errno.ENOEXEC: "it is for another processor, or a script without a line such as #!/bin/sh",
}


@dataclass
class Launch:
    """A program that is to run on a sealed model, and how.

    Attributes:
        command: program and arguments; ``{sealed}`` in them becomes the folder.
        at: the folder to mount over; None for a new folder in the private ``/tmp``.
        user: the user that the program runs as, if not this user.
        private_tmp: give the program an empty ``/tmp`` and ``/var/tmp`` in memory.
        ready: tells when the program has read the files, so that their memory can be given back;
            None for never.
        forget: environment variables that the program does not get.
        tell: called with messages for the person who started this.
    """

    command: Sequence[str]
    tell: Callable[[str], None]
    at: Path | None = None
    user: User | None = None
    private_tmp: bool = True
    ready: Ready | None = None
    forget: set[str] = field(default_factory=set)
    _nested: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Find the program before any work is done; NotStarted where there is none."""
        name = self.command[0]
        program = shutil.which(name)
        if program is None and "/" in name and os.path.isdir(name):  # noqa: PTH112 - also no path
            raise NotStarted(f"{name} is a folder", 126, hint="name a program in it")
        if program is None and "/" in name and os.path.exists(name):  # noqa: PTH110 - also no path
            raise NotStarted(
                f"{name} is not executable",
                126,
                hint=f"make it so with: chmod a+x {shlex.quote(name)}",
            )
        if program is None:
            raise NotStarted(f"there is no program {name}", 127, hint="give its path")
        self._program = program

    def check_places(self) -> None:
        """ConfigError where ``at`` is unusable, or the private /tmp hides a path of the command."""
        if self.private_tmp:
            # Only absolute paths: a process keeps its working directory open, so paths relative to
            # that are still found.
            for path in [self._program, *self.command[1:]]:
                if _is_temporary(path) and os.path.exists(path):  # noqa: PTH110 - also no path
                    raise ConfigError(
                        f"{path} would be out of the program's sight: it gets a temporary folder "
                        "of its own, in memory",
                        hint="move it to another folder, or give --shared-tmp --at EMPTY_FOLDER",
                    )
        if self.at is None:
            if not self.private_tmp:
                raise ConfigError(
                    "with --shared-tmp the model has no folder of its own",
                    hint="name an empty folder for it with --at",
                )
            return
        self.at = self.at.absolute()
        if self.private_tmp and _is_temporary(str(self.at)):
            return
        if self.at.is_symlink() or not self.at.is_dir():
            raise ConfigError(
                f"{self.at} is not a folder to show the model in",
                hint=f"make an empty one: mkdir -p {shlex.quote(str(self.at))}",
            )
        try:
            check_trusted(self.at, label="folder for the model", private=False)
        except ConfigError as error:
            # If another user renames the folder outside of the namespace, the mount moves with it,
            # and that user can put another folder at the path that the program reads.
            raise ConfigError(
                f"{error}: whoever may rename it can have the program read another model",
                hint="leave --at out, or name a folder that only root and this user can rename",
            ) from error
        if self.at.is_mount() or any(self.at.iterdir()):
            raise ConfigError(
                f"{self.at} is in use: something is mounted there or in it",
                hint="name an empty folder with --at; the program would not see what is there",
            )

    def enter(self) -> None:
        """Enter namespaces; OSError where the system does not permit it."""
        self._nested = enter_mount_namespace(user_namespace=self.user is None)
        if self.private_tmp:
            for folder in _TEMPORARY:
                if folder.is_dir():
                    mount_memory(
                        folder, None, mode=0o1777, swappable=not unencrypted_swap(), execute=True
                    )

    def try_out(self) -> None:
        """Make the system calls of ``into_mount``, in a process that ends afterwards."""
        self.enter()
        mount_memory(self.at if self.at and self.at.is_dir() else "/", 1 << 20, mode=0o700)

    def into_mount(self, fill: Callable[[socket.socket], None]) -> None:
        """Execute the program on a private file system; returns in the child, when it is full.

        Args:
            fill: opens the model in the child and calls ``send_files``. An error that it raises is
                reported in the child, and this process ends with the child's exit code.
        """
        channel, child_channel = socket.socketpair()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            channel.close()
            end_with(parent)
            set_undumpable()
            with child_channel:
                fill(child_channel)
            return
        child_channel.close()
        code = None
        try:
            with channel:
                mounted = self._receive(channel)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            if code is None:
                _end_child(child)
        if code < 0:
            raise KeymgmtError(
                f"the process that decrypts was ended by a signal: {signal.strsignal(-code)}",
                hint="if memory ran out, raise the container's limit",
            )
        if code or mounted is None:
            sys.exit(code or 1)  # the child printed the reason
        mounted.protect()
        folder = mounted.target
        if self.ready is not None:
            start = partial(self._execute, folder)
            supervise(mounted, self.ready, start, self.tell)
        self._execute(folder)

    def _receive(self, channel: socket.socket) -> PrivateMount | None:
        """Enter namespaces, and mount as the child orders; None if it ended without an order."""
        try:
            self.enter()
            set_undumpable()
            with channel.makefile("r") as lines:
                line = lines.readline()
            if not line:
                return None
            order = json.loads(line)
            self.forget |= set(order["forget"])
            if CREDENTIALS in self.forget and (folder := os.environ.get(CREDENTIALS)):
                mount_memory(folder, _EMPTY, mode=0o500, user=self.user)
            target = self.at or _TEMPORARY[0] / _MODELS / order["name"]
            if self.private_tmp and _is_temporary(str(target)):
                target.mkdir(parents=True, exist_ok=True)
            mounted = PrivateMount(target, order["sizes"], self.user)
        except OSError as error:
            raise no_namespace(f"{error.filename}: {error.strerror}", "use --via memfd") from error
        socket.send_fds(channel, [b"+"], [mounted.descriptor])
        return mounted

    def send_files(
        self,
        channel: socket.socket,
        sealed: SealedModel,
        forget: set[str],
        progress: Callable[[int, int], object] | None,
    ) -> None:
        """In the child: tell the parent which files to make room for, and fill its folder."""
        files = sealed.manifest.files
        order = {
            "name": sealed.manifest.name,
            "sizes": [entry.size for entry in files],
            "forget": sorted(forget),
        }
        channel.sendall(json.dumps(order).encode() + b"\n")
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        if not descriptors:
            raise SystemExit(1)  # the parent prints the reason
        decrypt_files(sealed, MountedFolder(descriptors[0], self.user).write, progress=progress)

    def into_memfds(
        self, sealed: SealedModel, progress: Callable[[int, int], object] | None
    ) -> Path:
        """Decrypt into memfds that a program executed next inherits; their folder."""
        folder = MemfdFolder(process=os.getpid())
        decrypt_files(sealed, folder.write, progress=progress)
        folder.hand_over(self.user)
        return folder.path

    def execute_on_memfds(self, folder: Path) -> NoReturn:
        """Become the program, on the folder of ``into_memfds``."""
        self.private_tmp = False
        self._execute(folder)

    def _become(self) -> None:
        """Give up, in this process, the privileges that the program must not have."""
        forbid_new_privileges()
        # A limit of 0 may not be raised to 1, which is a ValueError. A handler then gets an empty
        # core dump, by ``empty_core_dumps``.
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (_NO_CORE, _NO_CORE))
        if self.user is not None:
            self.user.become()
        elif self._nested or os.geteuid() != 0:
            drop_capabilities()
        # Python ignores these two signals, and a program inherits ignored signals (execve(2)).
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)

    def _execute(
        self, folder: Path, parent: int | None = None, command: Sequence[str] | None = None
    ) -> NoReturn:
        """Become the program, or a ``command`` that runs in the same environment.

        Args:
            folder: of the model.
            parent: a process that watches the program, with which it ends; None for no process.
            command: what to execute in place of the program.
        """
        removed = self.forget | set(_VARIABLES if self.private_tmp else ())
        environment = {key: value for key, value in os.environ.items() if key not in removed}
        environment["KEYMGMT_MODEL"] = str(folder)
        if self.user is not None:
            name = self.user.name
            environment |= {"HOME": self.user.home, "USER": name, "LOGNAME": name}
        arguments = [part.replace("{sealed}", str(folder)) for part in command or self.command]
        program = command[0] if command else self._program
        self._become()
        # An interrupt that came in a fork is raised again by a timer (keymgmt/cli/_run.py). The
        # timer would outlive the exec (execve(2)) and end the program: its interrupt comes first.
        # A timer without a handler of ours is that of whoever started us, for the program.
        while callable(signal.getsignal(signal.SIGALRM)) and (
            left := signal.getitimer(signal.ITIMER_REAL)[0]
        ):
            time.sleep(left)
        if parent is not None:
            end_with(parent)  # after the change of user, which would undo it (prctl(2))
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            os.execvpe(program, arguments, environment)  # noqa: S606 - the program that was asked for
        except OSError as error:
            code = 127 if error.errno == errno.ENOENT else 126
            raise NotStarted(
                f"cannot execute {program}: {error.strerror}", code, hint=_EXECUTE.get(error.errno)
            ) from error


def _is_temporary(path: str) -> bool:
    # normpath, so that "/srv/../tmp/x" counts as temporary, and "/tmp/../srv/x" does not.
    return any(folder in Path(os.path.normpath(path)).parents for folder in _TEMPORARY)


def _end_child(child: int) -> None:
    """End the child, which gets two seconds to close its sessions at a key service."""
    # There is no such child where an interrupt came after it was waited for.
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGTERM)
        for _ in range(_LAST_SECONDS * 20):
            if os.waitpid(child, os.WNOHANG)[0]:
                return
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
