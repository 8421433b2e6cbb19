"""Objects with locks or connections, in a process that forks.

A thread that held a lock at the fork does not exist in the child, where the lock stays held for
ever; and on a connection that parent and child both use, one of them reads the answer to the
other's question. So the child gets new locks and new connections. An object whose C library must
not be forked in the middle of a call can also hold the fork up.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from typing import Final

__all__ = ["ForkSafe"]


class ForkSafe(ABC):
    """Makes its locks, and what a child must not take over, in ``_renew``."""

    def __init__(self) -> None:
        self._renew()
        _all.add(self)

    @abstractmethod
    def _renew(self) -> None:
        """Called once when the object is made, and first of all in every forked child."""

    def _before_fork(self) -> None:  # noqa: B027 - most objects hold nothing up
        """Called in the parent before it forks; may wait, but not for ever. Raises nothing."""

    def _after_fork(self) -> None:  # noqa: B027
        """Called in the parent after it forked."""


_all: Final[weakref.WeakSet[ForkSafe]] = weakref.WeakSet()
# The objects whose ``_before_fork`` ran: ``_after_fork`` is called for these and no others, even if
# another thread made one meanwhile.
_held: Final[list[ForkSafe]] = []


def _before() -> None:
    for each in list(_all):
        _held.append(each)
        each._before_fork()


def _in_parent() -> None:
    while _held:
        _held.pop()._after_fork()


def _in_child() -> None:
    _held.clear()
    for each in list(_all):
        each._renew()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
