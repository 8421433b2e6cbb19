"""Time limits: what is left of a call's time, who gets which share of it, and giving up."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias, TypeVar, cast

from keymgmt._system.fork import ForkSafe
from keymgmt._system.libc import libc
from keymgmt.errors import ProviderUnavailable

__all__ = ["Deadline", "within"]

R = TypeVar("R")
T = TypeVar("T")
_MOMENT: Final = 50e-6  # seconds
_Answer: TypeAlias = "queue.SimpleQueue[tuple[R | None, BaseException | None]]"


class Deadline:
    """The moment at which a call is given up, however many steps it takes until then."""

    def __init__(self, seconds: float, what: str) -> None:
        """Begin now.

        Args:
            seconds: how long the call may take in all.
            what: the call in a few words, for the error: "the Vault server".
        """
        self.seconds, self.what = seconds, what
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
            raise _over(self.what, self.seconds)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time that is spent inside does not count: a person may be asked for a secret."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._end += time.monotonic() - begin

    def run(self, call: Callable[[], R]) -> R:
        """``within`` the seconds that are left."""
        self.check()
        return within(self.remaining, self.what, call)


def within(seconds: float, what: str, call: Callable[[], R]) -> R:
    """Run ``call`` and give up on it after ``seconds``, leaving its thread behind.

    For C libraries that cannot be interrupted: whatever ``call`` uses must not be used again
    after ProviderUnavailable was raised here.

    Raises:
        ProviderUnavailable: there was no answer in time; else what ``call`` raises.
    """
    answer: _Answer[R] = queue.SimpleQueue()
    _threads.begin(call, answer)
    try:
        _awake.wait(answer)
        value, failure = answer.get(timeout=seconds)
    except queue.Empty:
        raise _over(what, seconds) from None
    if failure is not None:
        raise failure
    return cast("R", value)


class _Awake(ForkSafe):
    """Lets a thread stay awake for a moment, since to be woken takes longer than many a call.

    One that waits for an answer and one that waits for a call may, so that no crowd of them keeps
    others from working. Where other processes want the processor, letting them run takes
    milliseconds: then for a second all threads sleep until they are woken.
    """

    def _renew(self) -> None:
        self._turns = [1, 2]
        self._not_until = 0.0

    def wait(self, waiting: queue.SimpleQueue[T]) -> None:
        begin = now = time.monotonic()
        if begin < self._not_until:
            return
        try:
            turn = self._turns.pop()
        except IndexError:
            return
        try:
            while waiting.empty() and now - begin < _MOMENT:
                libc.sched_yield()
                now = time.monotonic()
        finally:
            self._turns.append(turn)
        if now - begin > 4 * _MOMENT:
            self._not_until = now + 1.0


_awake: Final = _Awake()


class _Threads(ForkSafe):
    """Threads that wait for a call, and for the next one after it.

    None of them ends: OpenSSL holds locks of the whole process while a thread ends, after Python
    counts it as joined, and a child forked at that moment would wait for them for ever.
    """

    def _renew(self) -> None:
        self._idle: list[queue.SimpleQueue[Callable[[], None]]] = []

    def begin(self, call: Callable[[], R], answer: _Answer[R]) -> None:
        try:
            jobs = self._idle.pop()
        except IndexError:
            jobs = queue.SimpleQueue()
            threading.Thread(
                target=self._work, args=(jobs,), name="keymgmt call", daemon=True
            ).start()
        jobs.put(lambda: self._answer(call, answer, jobs))

    def _work(self, jobs: queue.SimpleQueue[Callable[[], None]]) -> None:
        while True:
            _awake.wait(jobs)
            jobs.get()()

    def _answer(
        self,
        call: Callable[[], R],
        answer: _Answer[R],
        jobs: queue.SimpleQueue[Callable[[], None]],
    ) -> None:
        try:
            value = call()
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._idle.append(jobs)
            answer.put((None, error))
        else:
            self._idle.append(jobs)
            answer.put((value, None))


_threads: Final = _Threads()


def _over(what: str, seconds: float) -> ProviderUnavailable:
    return ProviderUnavailable(
        f"{what} gave no answer within {seconds:.3g} seconds",
        hint="look whether the service hangs; the call was abandoned",
    )
