"""Objects with locks, in a forked child: whoever held a lock at the fork does not exist there."""

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
        """Called once when it is made, and first of all in every forked child."""


_all: Final[weakref.WeakSet[ForkSafe]] = weakref.WeakSet()


def _in_child() -> None:
    for each in list(_all):
        each._renew()


os.register_at_fork(after_in_child=_in_child)
