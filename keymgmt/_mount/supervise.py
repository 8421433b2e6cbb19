"""A program that is watched until it is ready, and then is given what it has read only once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from keymgmt.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from keymgmt._mount.private import PrivateMount

__all__ = ["Ready", "supervise"]

_PASSED_ON: Final = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGALRM,
}
_PAUSE: Final = 0.2  # seconds between two looks


@dataclass
class Ready:
    """What tells that a program is ready: a file, a port of this machine, or a command."""

    kind: str
    value: str
    _asked: int | None = field(default=None, init=False)

    @classmethod
    def parse(cls, text: str) -> Ready:
        """``file:PATH``, ``port:NUMBER`` or ``command:WORDS``; ConfigError for anything else."""
        kind, colon, value = text.partition(":")
        right = {
            "file": value.startswith("/"),
            "port": value.isascii()
            and value.isdigit()
            and len(value) < 6
            and 0 < int(value) < 65536,
            "command": bool(_words(value)),
        }
        if not colon or not right.get(kind):
            raise ConfigError(
                f"nothing tells when the program is ready: {text!r}",
                hint="write file:/ABSOLUTE/PATH, port:8000, or command:'curl -fs localhost:8000'",
            )
        return cls(kind, value)

    def __call__(self, start: Callable[[list[str]], int]) -> bool:
        """Whether it is ready now; ``start`` runs a command as the program is run."""
        if self.kind == "file":
            return os.path.exists(self.value)  # noqa: PTH110 - what cannot be looked at is not there
        if self.kind == "port":
            place = ("localhost", int(self.value))
            with contextlib.suppress(OSError), socket.create_connection(place, 1):
                return True
            return False
        if self._asked is None:
            with contextlib.suppress(OSError):  # no process is left; later, perhaps
                self._asked = start(_words(self.value))
            return False
        ended, status = os.waitpid(self._asked, os.WNOHANG)
        if ended:
            self._asked = None
        return bool(ended) and status == 0


def supervise(
    mounted: PrivateMount,
    ready: Ready,
    execute: Callable[..., NoReturn],
    tell: Callable[[str], None],
) -> NoReturn:
    """Run the program as a child, drop the files when it is ready, and end as it does.

    ``execute`` turns a fork of this process, whose number it gets, into the program, or into the
    command that it gets as well.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        execute(parent)

    def start(words: list[str]) -> int:
        asked = os.fork()
        if asked == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGIO, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                nothing = os.open(os.devnull, os.O_RDWR)
                for number in range(3):
                    os.dup2(nothing, number)
                execute(parent, words)
            finally:
                os._exit(127)  # it is not there yet
        return asked

    # Who opens a file while its lease is held makes the kernel send this.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    waiting = True
    while True:
        got = signal.sigtimedwait({*_PASSED_ON, signal.SIGCHLD}, _PAUSE if waiting else 3600)
        # What the terminal sends, it sends to the program too.
        if got and got.si_signo != signal.SIGCHLD and got.si_code <= 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, got.si_signo)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _end_as(os.waitstatus_to_exitcode(status), before)
        if waiting and ready(start):
            waiting = False
            try:
                tell(_drop(mounted.descriptor))
                sys.stderr.flush()
            except (OSError, SystemExit):
                # The program goes on where nobody reads what we say; rich ends with SystemExit
                # then. What is still to be written must not be our exit code in its place.
                with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                    os.dup2(nowhere.fileno(), 2)


def _end_as(code: int, mask: set[signal.Signals | int]) -> NoReturn:
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.kill(os.getpid(), -code)
    # The first process of a container ends by no signal that it sends itself (pid_namespaces(7)).
    sys.exit(code if code >= 0 else 128 - code)


def _drop(folder: int) -> str:
    """Remove the files that nobody has open or mapped; say how much that gave back."""
    given, in_use, unknown = 0, "", ""
    for parent, _, names in os.walk(f"/proc/self/fd/{folder}"):
        for name in names:
            file = Path(parent, name)
            try:
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    # A lease for writing is given only while nobody else has the file open, and
                    # what is mapped is open (fcntl(2), F_SETLEASE).
                    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                    given += os.fstat(descriptor).st_size
                    file.unlink()
                finally:
                    os.close(descriptor)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    in_use += f"; {name} stays: it is open or mapped"
                else:
                    unknown += f"; {name} stays: whether it is in use is not known"
    back = f"{given / (1 << 20):,.0f} MiB that it had read were given back"
    return f"the program is ready: {back}{in_use}{unknown}"


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quotation that does not end
        return []
