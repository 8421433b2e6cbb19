"""Things that are made once and shared, such as connections: by the calls of one command."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from keymgmt._system.fork import ForkSafe

__all__ = ["Kept"]

T = TypeVar("T")


class Kept(ForkSafe):
    """Keeps each thing under a name, until ``clear``; a forked child begins with none.

    Whoever still uses a thing after that keeps it alive: it is closed when nobody does.
    """

    def _renew(self) -> None:
        self._lock = threading.RLock()  # what is made may need another thing
        self._things: dict[Hashable, tuple[object, Any]] = {}

    def get(self, name: Hashable, state: object, make: Callable[[], T]) -> T:
        """The thing of this name, made now if there is none, or if ``state`` was another then."""
        with self._lock:
            if name not in self._things or self._things[name][0] != state:
                self._things[name] = state, make()
            thing: T = self._things[name][1]
            return thing

    def pop(self, name: Hashable) -> Any:
        """Take out the thing of this name; None if there is none."""
        with self._lock:
            return self._things.pop(name, (None, None))[1]

    def clear(self) -> None:
        """Keep nothing that was made until now."""
        with self._lock:
            self._things = {}
