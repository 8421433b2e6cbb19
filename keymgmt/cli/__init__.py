"""The command line: ``main`` is the script ``keymgmt``, ``app`` its commands.

Results go to stdout, all else to stderr; with ``--json`` one object on stdout, errors too. The exit
code says whose fault it is: 0 ok, 2 usage, 3 config, 4 damaged or untrusted, 5 denied, 6
unavailable, 1 anything else; 130 after Ctrl-C, 141 where nobody reads stdout any more.

Nothing is imported here before ``main`` looks after Ctrl-C, closed streams and a closed pipe.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keymgmt.cli._app import app as app

__all__ = ["app", "main"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name != "app":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from keymgmt.cli._app import app

        return app


def main() -> None:
    """Run the command line and exit: the console script ``keymgmt``."""
    # Until something of ours could be left half done, Ctrl-C just ends the process.
    python = signal.getsignal(signal.SIGINT)
    if python is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_closed_streams()
    from keymgmt._system.libc import libc
    from keymgmt.cli._run import run

    if python is signal.default_int_handler:
        signal.signal(signal.SIGINT, python)
    try:
        run(sys.argv[1:])
    finally:
        # A vendor's library may crash as it is unloaded. This runs after Python's own ending and
        # before that, so the exit code is ours (glibc's on_exit; elsewhere nothing changes).
        if hasattr(libc, "on_exit"):
            libc.fflush(None)
            libc.on_exit(libc._exit, None)


def _open_closed_streams() -> None:
    """Give closed standard streams a number, so that no file of ours gets one of theirs.

    What is written to a closed stdout fails, as it should: it is opened for reading.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            flags = os.O_RDONLY if number == 1 else os.O_RDWR
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
