"""Several transfers at once, which an error or Ctrl-C ends without waiting for any server."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Final, TypeVar

__all__ = ["Parallel"]

_THREADS: Final = 4
T = TypeVar("T")
R = TypeVar("R")


class _Stopped(Exception):
    """Nobody waits for this transfer any more."""


class Parallel:
    """Works on several things at once, and adds up how far all of it is.

    Its threads are daemons: one that waits for a server does not hold up the end of the process,
    and comes no further than its next ``told``.
    """

    def __init__(self, progress: Callable[[int, int], object] | None, total: int) -> None:
        """``progress`` is told the bytes done, and ``total``."""
        self._progress, self._total, self._done = progress, total, 0
        self._stopped = False
        self._lock = threading.Lock()

    def told(self, count: int) -> None:
        """So many bytes more are done; fewer than 0 where something begins anew.

        Whoever works calls this before each write, too: it raises where the work was given up.
        """
        if self._stopped:
            raise _Stopped
        if self._progress is not None and count:
            with self._lock:
                self._done += count
                self._progress(max(0, min(self._done, self._total)), self._total)

    def map(self, work: Callable[[T], R], things: Collection[T]) -> list[R]:
        """What ``work`` gives for each thing, in their order; the first error ends all of it."""
        left = queue.SimpleQueue[tuple[int, T]]()
        done = queue.SimpleQueue[tuple[int, Future[R]]]()
        for pair in enumerate(things):
            left.put(pair)

        def run() -> None:
            with contextlib.suppress(queue.Empty):
                while not self._stopped:
                    number, thing = left.get_nowait()
                    done.put((number, _try(work, thing)))

        for _ in range(min(_THREADS, len(things))):
            threading.Thread(target=run, name="keymgmt-transfer", daemon=True).start()
        results: dict[int, R] = {}
        try:
            while len(results) < len(things):
                number, future = done.get()
                results[number] = future.result()
        except BaseException:
            self._stopped = True
            raise
        return [results[number] for number in range(len(things))]


def _try(work: Callable[[T], R], thing: T) -> Future[R]:
    future = Future[R]()
    try:
        future.set_result(work(thing))
    except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
        future.set_exception(error)
    return future
