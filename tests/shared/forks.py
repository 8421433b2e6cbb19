"""Calls in a forked child."""

from __future__ import annotations

import os
from collections.abc import Callable

from keymgmt.testing._process import in_fork

NOBODY = 65534


def in_child(call: Callable[[], object], seconds: float = 60) -> None:
    """Run a call in a forked child; what it raises there fails the test here."""

    def told() -> str:
        call()
        return "done"

    assert in_fork(told, seconds) == "done"


def become_nobody() -> None:
    """Become another user, where this one is root; in a child."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def nobody_can(call: Callable[[], object]) -> bool:
    """Whether a call of another user, or of this one where it is not root, raises no OSError."""

    def told() -> str:
        become_nobody()
        try:
            call()
        except OSError:
            return "no"
        return "yes"

    answer = in_fork(told, 60)
    assert answer in ("yes", "no"), answer
    return answer == "yes"
