"""Waiting for what happens in another thread or process."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any


def until(
    call: Callable[[], object], seconds: float = 60.0, said: Callable[[], object] = str
) -> None:
    """Call until the answer is true; it is asked often at first, and then less.

    ``said`` gives what may explain that it never is, such as a log.
    """
    end, pause = time.monotonic() + seconds, 0.005
    while not call():
        assert time.monotonic() < end, f"not in {seconds:g} seconds: {said()}"
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def until_it_listens(
    port: int, process: subprocess.Popen[Any], said: Callable[[], object] = str
) -> None:
    """Wait until a process takes connections at a port of loopback."""

    def up() -> bool:
        assert process.poll() is None, f"it ended: {said()}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    until(up, said=said)
