"""Work that hands its waiting to the caller, who may let many pieces of work wait at once.

Such work is a generator. Where it would wait for a disk or a server it yields a ``Wait``; the
caller makes that call, in any thread, and goes on with ``next_step``. Most of what such work does
between its waits takes less time than a change of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

__all__ = ["Wait", "finish", "next_step", "outcome"]

S = TypeVar("S")
T = TypeVar("T")
Wait = Callable[[], object]


def outcome(wait: Wait) -> BaseException | None:
    """Make the call of a ``Wait``; gives what it raised."""
    try:
        wait()
    except BaseException as error:  # noqa: BLE001 - raised in the work
        return error
    return None


def next_step(work: Generator[S, None, Any], failure: BaseException | None) -> S:
    """Go on with work after a wait, in which it meets the failure of the call if there is one."""
    return next(work) if failure is None else work.throw(failure)


def finish(work: Generator[Any, None, T]) -> T:
    """Do work here and now; what it yields besides calls is passed over."""
    failure = None
    while True:
        try:
            step = next_step(work, failure)
        except StopIteration as end:
            result: T = end.value
            return result
        failure = outcome(step) if callable(step) else None
