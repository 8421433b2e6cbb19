"""A lock that a forked child has anew: whoever held it at the fork does not exist there."""

from __future__ import annotations

import os
import threading

__all__ = ["ProcessLock"]


class ProcessLock:
    """Gives the lock of this process."""

    def __init__(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()

    def here(self) -> threading.Lock:
        """The lock; keep it while it is held, and do not ask for it again to release it."""
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
        return self._lock
