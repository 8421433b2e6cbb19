"""Waiting for what happens in another thread or process."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(call: Callable[[], object], seconds: float = 30.0) -> None:
    """Call until the answer is true; it is asked often at first, and then less."""
    end, pause = time.monotonic() + seconds, 0.005
    while not call():
        assert time.monotonic() < end, f"not in {seconds:g} seconds"
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
