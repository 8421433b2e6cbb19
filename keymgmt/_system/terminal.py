"""Asking a person on the terminal while something else may be drawing there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["asking", "drawing"]

_Change = Callable[[], object]
_drawn: list[tuple[_Change, _Change]] = []
# A question may come from any thread: one is asked at a time.
_lock = threading.RLock()


@contextlib.contextmanager
def drawing(pause: _Change, resume: _Change) -> Iterator[None]:
    """Something is drawn, such as a progress bar; it is paused while a question is asked."""
    changes = (pause, resume)
    with _lock:
        _drawn.append(changes)
    try:
        yield
    finally:
        with _lock:
            _drawn.remove(changes)


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Have the terminal to oneself: nothing is drawn, and no other thread asks."""
    with _lock:
        for pause, _ in _drawn:
            pause()
        try:
            yield
        finally:
            for _, resume in _drawn:
                resume()
