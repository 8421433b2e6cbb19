"""Time limits: what is left of a call's time, who gets which share of it, and giving up."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias, TypeVar, cast

from keymgmt._system.fork import ForkSafe
from keymgmt.errors import ProviderUnavailable

__all__ = ["Deadline", "begin", "within"]

R = TypeVar("R")
_Answer: TypeAlias = "queue.SimpleQueue[tuple[R | None, BaseException | None]]"
_Calls: TypeAlias = "queue.SimpleQueue[tuple[Callable[[], Any], _Answer[Any]]]"


class Deadline:
    """The moment at which a call is given up, however many steps it takes until then."""

    def __init__(self, seconds: float, label: str) -> None:
        """Begin now.

        Args:
            seconds: how long the call may take in all.
            label: the call in a few words, for the error: "the Vault server".
        """
        self.seconds, self.label = seconds, label
        self._end = time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds that are left; 0 when the time is over."""
        return max(0.0, self._end - time.monotonic())

    def share(self, parts: int, *, most: float = float("inf")) -> float:
        """Seconds for the next of ``parts`` tries, so that each of them gets its turn.

        Raises:
            ProviderUnavailable: the time is over.
        """
        self.check()
        return min(most, self.remaining / max(1, parts))

    def check(self) -> None:
        """ProviderUnavailable if the time is over."""
        if not self.remaining:
            raise _over(self.label, self.seconds)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time that is spent inside does not count: a person may be asked for a secret."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._end += time.monotonic() - begin

    @contextlib.contextmanager
    def hold(self, lock: threading.Lock | threading.Semaphore) -> Iterator[None]:
        """Hold a lock inside; ProviderUnavailable if other threads hold it until time is over."""
        if not lock.acquire(timeout=self.remaining):
            raise ProviderUnavailable(
                f"{self.label}: other threads of this process were first for {self.seconds:.3g} s",
                hint="look whether the service hangs; a larger timeout lets more threads wait",
            )
        try:
            yield
        finally:
            lock.release()

    def run(self, call: Callable[[], R]) -> R:
        """``within`` the seconds that are left."""
        self.check()
        return within(self.remaining, self.label, call)


def within(seconds: float, label: str, call: Callable[[], R]) -> R:
    """Run ``call`` and give up on it after ``seconds``, leaving its thread behind.

    For C libraries that cannot be interrupted: whatever ``call`` uses must not be used again
    after ProviderUnavailable was raised here.

    Raises:
        ProviderUnavailable: there was no answer in time; else what ``call`` raises.
    """
    answer = _start(call)
    try:
        outcome = answer.get(timeout=seconds)
    except queue.Empty:
        raise _over(label, seconds) from None
    try:
        return _given(*outcome)
    finally:
        del outcome  # it may hold an error: see _given


def begin(call: Callable[[], R]) -> Callable[[], R]:
    """Run ``call`` in another thread.

    What is returned waits for it, and gives what it returned or raises what it raised; once.
    """
    answer = _start(call)
    return lambda: _given(*answer.get())


def _start(call: Callable[[], R]) -> _Answer[R]:
    answer: _Answer[R] = queue.SimpleQueue()
    _threads.free().put((call, answer))
    return answer


def _given(value: R | None, failure: BaseException | None) -> R:
    if failure is not None:
        try:
            raise failure
        finally:
            # Its traceback leads to this frame: together they would be a cycle, which keeps what
            # the failed call held, secrets included, until the collector comes by.
            del failure
    return cast("R", value)


class _Threads(ForkSafe):
    """Threads that wait for a call, and for the next one after it.

    None of them ends: OpenSSL holds locks of the whole process while a thread ends, after Python
    counts it as joined, and a child forked at that moment would wait for them for ever.
    """

    def _renew(self) -> None:
        self._idle: list[_Calls] = []

    def free(self) -> _Calls:
        """Where to put a call, and the place for its answer, for a thread that has none."""
        try:
            return self._idle.pop()
        except IndexError:
            calls: _Calls = queue.SimpleQueue()
            threading.Thread(
                target=self._work, args=(calls,), name="keymgmt call", daemon=True
            ).start()
            return calls

    def _work(self, calls: _Calls) -> None:
        while True:
            call, answer = calls.get()
            outcome = _outcome(call)
            # First, so that whoever waits for the answer finds this thread for the next call.
            self._idle.append(calls)
            answer.put(outcome)
            # Nothing of a call is kept while there is none.
            del call, answer, outcome


_threads: Final = _Threads()


def _outcome(call: Callable[[], R]) -> tuple[R | None, BaseException | None]:
    try:
        return call(), None
    except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
        return None, error


def _over(label: str, seconds: float) -> ProviderUnavailable:
    return ProviderUnavailable(
        f"{label} gave no answer within {seconds:.3g} seconds",
        hint="look whether the service hangs; the call was abandoned",
    )
