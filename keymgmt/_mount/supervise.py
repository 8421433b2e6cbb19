"""Watching a program until it is ready, and then freeing the files that it has read into memory."""

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
    """A sign that a program is ready: a file, a port of this machine, or a command."""

    kind: str
    value: str
    _command: int | None = field(default=None, init=False)

    @classmethod
    def parse(cls, text: str) -> Ready:
        """``file:PATH``, ``port:NUMBER`` or ``command:WORDS``; ConfigError for anything else."""
        kind, colon, value = text.partition(":")
        valid = {
            "file": value.startswith("/"),
            "port": value.isascii()
            and value.isdigit()
            and len(value) < 6
            and 0 < int(value) < 65536,
            "command": bool(_words(value)),
        }
        if not colon or not valid.get(kind):
            raise ConfigError(
                f"{text!r} does not say how to see that the program is ready",
                hint="write file:/ABSOLUTE/PATH, port:8000, or command:'curl -fs localhost:8000'",
            )
        return cls(kind, value)

    def __call__(self, start: Callable[[list[str]], int]) -> bool:
        """Whether it is ready now; ``start`` runs a command as the program is run."""
        if self.kind == "file":
            return os.path.exists(self.value)  # noqa: PTH110 - what cannot be looked at is not there
        if self.kind == "port":
            address = ("localhost", int(self.value))
            with contextlib.suppress(OSError), socket.create_connection(address, 1):
                return True
            return False
        if self._command is None:
            with contextlib.suppress(OSError):  # no process can be forked now; it is tried again
                self._command = start(_words(self.value))
            return False
        ended, status = os.waitpid(self._command, os.WNOHANG)
        if ended:
            self._command = None
        return bool(ended) and status == 0


def supervise(
    mounted: PrivateMount,
    ready: Ready,
    execute: Callable[..., NoReturn],
    tell: Callable[[str], None],
) -> NoReturn:
    """Run the program as a child, remove the files when it is ready, and end as the child ends.

    Args:
        mounted: the file system with the files.
        ready: tells whether the program is ready.
        execute: turns a fork of this process into the program. It gets the number of this process
            and, as a second argument, a command to execute in place of the program.
        tell: called with a message about the files that were removed.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        execute(parent)

    def start(words: list[str]) -> int:
        command = os.fork()
        if command == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGIO, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                null = os.open(os.devnull, os.O_RDWR)
                for number in range(3):
                    os.dup2(null, number)
                execute(parent, words)
            finally:
                os._exit(127)  # the command cannot be executed, or not yet
        return command

    # The kernel sends SIGIO when somebody opens a file on which _drop holds a lease.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    waiting = True
    while True:
        signal_ = signal.sigtimedwait({*_PASSED_ON, signal.SIGCHLD}, _PAUSE if waiting else 3600)
        # A signal with a positive code is from the kernel: the program gets it from the terminal.
        if signal_ and signal_.si_signo != signal.SIGCHLD and signal_.si_code <= 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal_.si_signo)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _end_like(os.waitstatus_to_exitcode(status), before)
        if waiting and ready(start):
            waiting = False
            try:
                tell(_drop(mounted.descriptor))
                sys.stderr.flush()
            except (OSError, SystemExit):
                # Nobody reads stderr any more, in which case rich raises SystemExit. The program
                # goes on. What is left in the buffer must not fail when this process ends, since
                # that would replace the exit code of the program.
                with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                    os.dup2(nowhere.fileno(), 2)


def _end_like(code: int, mask: set[signal.Signals | int]) -> NoReturn:
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.kill(os.getpid(), -code)
    # The first process of a container ends by no signal that it sends itself (pid_namespaces(7)).
    sys.exit(code if code >= 0 else 128 - code)


def _drop(folder: int) -> str:
    """Remove the files that nobody has open or mapped; a sentence about the memory that is free."""
    freed, in_use, unknown = 0, "", ""
    for parent, _, names in os.walk(f"/proc/self/fd/{folder}"):
        for name in names:
            file = Path(parent, name)
            try:
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    # The kernel gives a lease for writing only while nobody else has the file open,
                    # and a mapped file counts as open (fcntl(2), F_SETLEASE).
                    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                    freed += os.fstat(descriptor).st_size
                    file.unlink()
                finally:
                    os.close(descriptor)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    in_use += f"; {name} stays: it is open or mapped"
                else:
                    unknown += f"; {name} stays: whether it is in use is not known"
    text = f"{freed / (1 << 20):,.0f} MiB that it had read were given back"
    return f"the program is ready: {text}{in_use}{unknown}"


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quotation that does not end
        return []
