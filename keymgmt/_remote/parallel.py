"""Several transfers at once; an error or Ctrl-C ends them without waiting for a server."""

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
    """Runs several transfers at once, and adds up their progress.

    Its threads are daemons: a thread that waits for a server does not delay the end of the process,
    and an abandoned thread ends at its next call of ``advance``.
    """

    def __init__(self, progress: Callable[[int, int], object] | None, total: int) -> None:
        """``progress`` is called with the bytes done and with ``total``."""
        self._progress, self._total, self._done = progress, total, 0
        self._stopped = False
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        """Add ``count`` bytes to the progress; it is negative where a transfer begins anew.

        Call it before each write as well: it raises where the transfers were abandoned.
        """
        if self._stopped:
            raise _Stopped
        if self._progress is not None and count:
            with self._lock:
                self._done += count
                self._progress(max(0, min(self._done, self._total)), self._total)

    def map(self, work: Callable[[T], R], things: Collection[T]) -> list[R]:
        """The result of ``work`` for each thing, in their order; the first error ends them all."""
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
    except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for it
        future.set_exception(error)
    return future
