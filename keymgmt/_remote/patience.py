"""How long a model that is elsewhere may keep us waiting, in all of its requests together."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Final

from keymgmt._system.deadline import Deadline
from keymgmt._system.fork import ForkSafe
from keymgmt.errors import StorageUnavailable

__all__ = ["MIB", "Patience"]

MIB: Final = 1 << 20
_SECONDS: Final = 4.0  # for each MiB


class _Try(threading.local):
    """The try of a request that a thread is at."""

    left = 1
    moved = 0
    end = float("inf")


class Patience(Deadline, ForkSafe):
    """The deadline of one model, for any thread.

    Only the time counts in which a request is under way. Each MiB that arrives or is sent gives
    four seconds back, so that a large model may take long; there are never more than at the start.
    Each try of a request has a share of what is left, which begins anew with each MiB.
    """

    def __init__(self, seconds: float, label: str) -> None:
        """``seconds`` in all; ``label`` is the location, for the error."""
        Deadline.__init__(self, seconds, label)
        self._since = time.monotonic()
        self._try = _Try()
        ForkSafe.__init__(self)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0

    def check(self) -> None:
        """StorageUnavailable if the time is over."""
        if not self.remaining:
            raise self.over()

    def over(self) -> StorageUnavailable:
        """The error for a server that is too slow."""
        return StorageUnavailable(
            f"{self.label} did not give what was asked for within {self.seconds:g} seconds",
            hint="wait longer with deadline in [remote], or find out why it is slow",
        )

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A request is under way inside."""
        with self._lock:
            if not self._under_way:
                self._give(time.monotonic() - self._since)
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                self._since = time.monotonic()

    def begin_try(self, left: int) -> None:
        """Begin a try of this thread's request, of which ``left`` are left; raises as ``check``."""
        self._try.left, self._try.moved = left, 0
        self._try.end = time.monotonic() + self.share(left)

    @property
    def left_to_try(self) -> float:
        """Seconds that are left for this thread's try; 0 or less when they are over."""
        return self._try.end - time.monotonic()

    def moved(self, count: int) -> None:
        """Bytes arrived or were sent; TimeoutError where the try of this thread is over."""
        with self._lock:
            self._give(count * _SECONDS / MIB)
        self._try.moved += count
        if self._try.moved >= MIB:
            self.begin_try(self._try.left)
        if self.left_to_try < 0:
            raise TimeoutError

    def end(self) -> None:
        """The time is over: nobody waits any more."""
        self._end = float("-inf")

    def _give(self, seconds: float) -> None:
        self._end = min(self._end + seconds, time.monotonic() + self.seconds)
