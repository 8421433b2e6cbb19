"""Running any program on a sealed model: two processes, and only one of them ever has a key.

The process that was started becomes the program. First it forks one that opens the model, where
files and users are what they are outside; itself it enters namespaces, mounts a file system in
memory there, and hands that over to be filled::

    the program to be                       its child
    enters a mount namespace                reads config, trust and keys; opens the model
                     <----------- name and sizes of the files
    mounts, opens   the folder --------->
                                            decrypts into it, closes the keys, and ends
    mounts it read-only, drops what it may, and executes the program

Where no namespace is permitted, the process decrypts into memfds itself, and the program inherits
these.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
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
# The kernel pipes a core dump to a handler whatever the limit, except this one (core(5)).
_NO_CORE: Final = 1


class NotStarted(KeymgmtError):
    """The program cannot be executed: 127 where there is none, 126 otherwise, as shells say."""

    def __init__(self, message: str, code: int, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = code


@dataclass
class Launch:
    """A program that is to run on a sealed model, and how.

    Attributes:
        command: program and arguments; ``{sealed}`` in them becomes the folder.
        at: where the folder is to be; None for one in the private ``/tmp``.
        user: whom the program runs as, if not this user.
        private_tmp: give it an empty ``/tmp`` and ``/var/tmp`` in memory.
        ready: when to give back what the program has read; None for never.
        forget: variables that the program does not get.
        tell: told what a person should know.
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
        """Find the program, so that one that is not there costs nothing; NotStarted."""
        name = self.command[0]
        found = shutil.which(name)
        if found is None and "/" in name and os.path.exists(name):  # noqa: PTH110 - also no path
            raise NotStarted(
                f"{name} is not executable", 126, hint=f"make it so with: chmod a+x {name}"
            )
        if found is None:
            raise NotStarted(f"there is no program {name}", 127, hint="give its path")
        self._program = found

    def check_places(self) -> None:
        """ConfigError where the folder cannot be, or what is named is behind the private /tmp."""
        if self.private_tmp:
            # What is relative to the working directory is found: a process keeps that open.
            for path in [self._program, *self.command[1:]]:
                if _is_temporary(path) and os.path.exists(path):  # noqa: PTH110 - also no path
                    raise ConfigError(
                        f"{path} would be out of the program's sight: it gets a temporary folder "
                        "of its own, in memory",
                        hint="move it to another place, or give --shared-tmp --at EMPTY_FOLDER",
                    )
        if self.at is None:
            if not self.private_tmp:
                raise ConfigError(
                    "with --shared-tmp the model has no place of its own",
                    hint="name an empty folder for it with --at",
                )
            return
        self.at = self.at.absolute()
        if self.private_tmp and _is_temporary(str(self.at)):
            return
        if self.at.is_symlink() or not self.at.is_dir():
            raise ConfigError(
                f"{self.at} is no folder to show the model in",
                hint=f"make an empty one: mkdir -p {self.at}",
            )
        try:
            check_trusted(self.at, what="place for the model", private=False)
        except ConfigError as error:
            # Renamed by another, outside, it takes the model with it, and leaves its name free.
            raise ConfigError(
                f"{error}: who may rename it can have the program read another model",
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
            for place in _TEMPORARY:
                if place.is_dir():
                    mount_memory(
                        place, None, mode=0o1777, swappable=not unencrypted_swap(), execute=True
                    )

    def try_out(self) -> None:
        """All that ``into_mount`` asks of the system, for a process that ends afterwards."""
        self.enter()
        mount_memory(self.at if self.at and self.at.is_dir() else "/", 1 << 20, mode=0o700)

    def into_mount(self, fill: Callable[[socket.socket], None]) -> None:
        """Execute the program on a private file system; returns in the child, when it is full.

        Args:
            fill: opens the model in the child and calls ``send_files``; what it raises goes its
                way there, and its exit code is that of this process.
        """
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            ours.close()
            end_with(parent)
            set_undumpable()
            with theirs:
                fill(theirs)
            return
        theirs.close()
        code = None
        try:
            with ours:
                mounted = self._receive(ours)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            if code is None:
                _end(child)
        if code < 0:
            raise KeymgmtError(
                f"the process that decrypts was ended by a signal: {signal.strsignal(-code)}",
                hint="if it was for want of memory, raise the container's limit",
            )
        if code or mounted is None:
            sys.exit(code or 1)  # the child said why
        mounted.protect()
        folder = mounted.target
        if self.ready is not None:
            start = partial(self._execute, folder)
            supervise(mounted, self.ready, start, self.tell)
        self._execute(folder)

    def _receive(self, channel: socket.socket) -> PrivateMount | None:
        """Enter namespaces, and mount what the child says; None if it says nothing."""
        try:
            self.enter()
            set_undumpable()
            with channel.makefile("r") as lines:
                line = lines.readline()
            if not line:
                return None
            said = json.loads(line)
            self.forget |= set(said["forget"])
            if CREDENTIALS in self.forget and (folder := os.environ.get(CREDENTIALS)):
                mount_memory(folder, _EMPTY, mode=0o500, user=self.user)
            target = self.at or _TEMPORARY[0] / _MODELS / said["name"]
            if self.private_tmp and _is_temporary(str(target)):
                target.mkdir(parents=True, exist_ok=True)
            mounted = PrivateMount(target, said["sizes"], self.user)
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
        """In the child: say what the folder must hold, and fill it."""
        files = sealed.manifest.files
        said = {
            "name": sealed.manifest.name,
            "sizes": [entry.size for entry in files],
            "forget": sorted(forget),
        }
        channel.sendall(json.dumps(said).encode() + b"\n")
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
        if not descriptors:
            raise SystemExit(1)  # the parent says why
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
        """Become the program, on what ``into_memfds`` made."""
        self.private_tmp = False
        self._execute(folder)

    def _become(self) -> None:
        """Whatever the program may not do, from here on; in the process that is to be it."""
        forbid_new_privileges()
        # Where the limit is 0 and may not be raised, what a handler gets is empty by our filter.
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (_NO_CORE, _NO_CORE))
        if self.user is not None:
            self.user.become()
        elif self._nested or os.geteuid() != 0:
            drop_capabilities()
        # Python ignores these two, and what is ignored stays so in a program.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)

    def _execute(
        self, folder: Path, parent: int | None = None, command: Sequence[str] | None = None
    ) -> NoReturn:
        """Become the program, or a ``command`` that is run as it is.

        One that has a parent which watches it ends with that.
        """
        gone = self.forget | set(_VARIABLES if self.private_tmp else ())
        environment = {key: value for key, value in os.environ.items() if key not in gone}
        environment["KEYMGMT_MODEL"] = str(folder)
        if self.user is not None:
            name = self.user.name
            environment |= {"HOME": self.user.home, "USER": name, "LOGNAME": name}
        arguments = [part.replace("{sealed}", str(folder)) for part in command or self.command]
        program = command[0] if command else self._program
        self._become()
        if parent is not None:
            end_with(parent)  # a change of user would end that (prctl(2))
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            os.execvpe(program, arguments, environment)  # noqa: S606 - the program that was asked for
        except OSError as error:
            code = 127 if error.errno == errno.ENOENT else 126
            raise NotStarted(f"cannot execute {program}: {error.strerror}", code) from error


def _is_temporary(path: str) -> bool:
    found = Path(os.path.normpath(path))  # "/srv/../tmp/x" is, and "/tmp/../srv/x" is not
    return any(place in found.parents for place in _TEMPORARY)


def _end(child: int) -> None:
    """End it, after the time that it may take to give back what it has at a key service."""
    os.kill(child, signal.SIGTERM)
    for _ in range(_LAST_SECONDS * 20):
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
