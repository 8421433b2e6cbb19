"""Several transfers at once; an error or Ctrl-C ends them without waiting for a server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from typing import Any, Final, TypeVar

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
        left = iter(enumerate(things))  # next() of it is one step under the GIL
        done = queue.SimpleQueue[tuple[int, R | None, BaseException | None]]()

        def run() -> None:
            for number, thing in left:
                if self._stopped:
                    return
                try:
                    done.put((number, work(thing), None))
                except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                    done.put((number, None, error))

        for _ in range(min(_THREADS, len(things))):
            threading.Thread(target=run, name="keymgmt-transfer", daemon=True).start()
        results: dict[int, Any] = {}
        failure: BaseException | None = None
        try:
            while failure is None and len(results) < len(things):
                number, results[number], failure = done.get()
        finally:
            self._stopped = failure is not None or len(results) < len(things)
        if failure is not None:
            raise failure
        return [results[number] for number in range(len(things))]
