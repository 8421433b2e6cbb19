"""Giving up on calls, and the threads that they leave behind."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from keymgmt._system import deadline
from keymgmt._system.deadline import Deadline, within
from keymgmt.errors import ProviderUnavailable


def test_what_a_call_gives_or_raises() -> None:
    assert within(60, "a test", lambda: 7) == 7
    assert within(60, "a test", lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        within(60, "a test", lambda: 1 // 0)


def test_one_thread_serves_calls_one_after_the_other() -> None:
    within(60, "a test", lambda: None)
    before = threading.active_count()
    served = {within(60, "a test", threading.get_ident) for _ in range(200)}
    assert len(served) == 1
    assert threading.get_ident() not in served
    assert threading.active_count() == before


def test_a_call_that_hangs_is_left_behind_and_its_thread_serves_again() -> None:
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


def test_nobody_stays_awake_while_others_wait_for_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[int] = []

    def long_turn() -> None:
        turns.append(1)
        time.sleep(0.01)

    monkeypatch.setattr(deadline, "libc", SimpleNamespace(sched_yield=long_turn))
    monkeypatch.setattr(deadline, "_awake", deadline._Awake())
    assert within(60, "a test", lambda: time.sleep(0.1) or 1) == 1
    assert turns
    assert deadline._awake._not_until > 0.0
    deadline._awake._not_until = float("inf")
    before = len(turns)
    assert [within(60, "a test", lambda: 2) for _ in range(5)] == [2] * 5
    assert len(turns) <= before + 1  # the thread that was awake when this began


def test_a_deadline_that_is_over_begins_nothing() -> None:
    deadline, begun = Deadline(0.0, "a test"), []
    with pytest.raises(ProviderUnavailable):
        deadline.run(lambda: begun.append(1))
    assert begun == []
