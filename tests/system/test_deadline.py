"""Giving up on calls, and the threads that they leave behind."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from keymgmt._system.deadline import Deadline, begin, within
from keymgmt.errors import ProviderUnavailable


def test_what_a_call_gives_or_raises():
    assert within(60, "a test", lambda: 7) == 7
    assert within(60, "a test", lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        within(60, "a test", lambda: 1 // 0)


def test_two_calls_run_beside_each_other():
    met = threading.Barrier(2, timeout=60)
    assert sorted(wait() >= 0 for wait in [begin(met.wait), begin(met.wait)]) == [True, True]
    failed = begin(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failed()


@pytest.mark.parametrize("run", [lambda call: within(60, "a test", call), lambda c: begin(c)()])
def test_nothing_of_a_call_that_failed_is_kept_once_its_error_is_handled(run):
    class Secret:
        pass

    kept: list[weakref.ref[Secret]] = []

    def fail() -> None:
        secret = Secret()
        kept.append(weakref.ref(secret))
        raise ValueError("refused")

    gc.disable()  # a cycle would live until the collector comes by
    try:
        for _ in range(2):  # the thread waits for its next call in between
            with pytest.raises(ValueError, match="refused"):
                run(fail)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_one_thread_serves_calls_one_after_the_other():
    within(60, "a test", lambda: None)
    before = threading.active_count()
    served = {within(60, "a test", threading.get_ident) for _ in range(200)}
    assert len(served) == 1
    assert threading.get_ident() not in served
    assert threading.active_count() == before


def test_a_call_that_hangs_is_left_behind_and_its_thread_serves_again():
    go_on, done = threading.Event(), threading.Event()

    def hang() -> int:
        go_on.wait(60)
        done.set()
        return threading.get_ident()

    with pytest.raises(ProviderUnavailable, match=r"a test gave no answer within 0\.05 seconds"):
        within(0.05, "a test", hang)
    assert within(60, "a test", lambda: 1) == 1
    go_on.set()
    assert done.wait(60)


def test_a_deadline_that_is_over_begins_nothing():
    deadline, begun = Deadline(0.0, "a test"), []
    with pytest.raises(ProviderUnavailable):
        deadline.run(lambda: begun.append(1))
    assert begun == []


def test_a_lock_is_waited_for_until_the_time_is_over():
    lock = threading.Lock()
    with Deadline(60, "a test").hold(lock):
        assert lock.locked()
        with (
            pytest.raises(ProviderUnavailable, match="a test: other threads"),
            Deadline(0.05, "a test").hold(lock),
        ):
            pytest.fail("held by two")
    assert not lock.locked()
    with pytest.raises(ZeroDivisionError), Deadline(60, "a test").hold(lock):
        raise ZeroDivisionError
    assert not lock.locked()
