"""An opt-in cache of data keys, for configs where asking the key service is what takes the time.

Off unless ``[cache]`` is in the config, and kept by one loaded ``Config``. A key lives in locked
memory that is in no core dump and is zero in a forked child, for so many seconds and so many uses,
whichever ends first, and is wiped by a timer even if nobody asks again. Signature, name, release,
commitment and MAC are checked on every open as without it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from dataclasses import dataclass
from typing import Final

from keymgmt._crypto.dek import DEK_LENGTH, Dek, wipe
from keymgmt._system.fork import ForkSafe
from keymgmt._system.libc import libc

__all__ = ["DekCache"]

_SLOTS: Final = mmap.PAGESIZE // DEK_LENGTH
_MADV_WIPEONFORK: Final = 18
_MADV_DONTDUMP: Final = 16


@dataclass
class _Entry:
    slot: int
    until: float
    uses: int


class DekCache(ForkSafe):
    """At most 128 data keys in one locked page; thread-safe."""

    _lock: threading.Lock
    _timer: threading.Timer | None
    _entries: dict[bytes, _Entry]
    _unlocked: int  # the errno that says why the page is not locked; 0 if it is

    def __init__(self, seconds: float, uses: int) -> None:
        """Keep a key for ``seconds`` and for ``uses`` opens; OSError if memory cannot be locked."""
        self._seconds, self._uses = seconds, uses
        self._page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._page.madvise(_MADV_DONTDUMP)
        self._page.madvise(_MADV_WIPEONFORK)
        super().__init__()
        if self._unlocked:
            raise OSError(self._unlocked, os.strerror(self._unlocked))

    def _renew(self) -> None:
        self._lock, self._timer = threading.Lock(), None
        # The kernel gave the child a page of zeros (MADV_WIPEONFORK), so any entry would be a key
        # of zeros.
        self._entries = {}
        # A child does not inherit the memory locks of its parent (mlock(2)).
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        failed = libc.mlock(address, mmap.PAGESIZE)
        self._unlocked = ctypes.get_errno() if failed else 0

    def get(self, name: bytes) -> Dek | None:
        """A copy of the key under ``name``, if there is one that may still be used."""
        with self._lock:
            self._expire()
            entry = self._entries.get(name)
            if entry is None:
                return None
            dek = Dek(self._view(entry.slot))
            entry.uses -= 1
            if entry.uses <= 0:
                self._drop(name)
            return dek

    def put(self, name: bytes, dek: Dek) -> None:
        """Keep a copy of ``dek`` under ``name``; not if all slots are taken."""
        with self._lock:
            self._expire()
            if name in self._entries:
                self._drop(name)
            free = set(range(_SLOTS)) - {entry.slot for entry in self._entries.values()}
            if not free or self._unlocked:
                return
            slot = min(free)
            self._view(slot)[:] = dek.view()
            self._entries[name] = _Entry(slot, time.monotonic() + self._seconds, self._uses)
            self._arm()

    def clear(self) -> None:
        """Wipe everything; may be called again."""
        with self._lock:
            wipe(self._page)
            self._entries.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _view(self, slot: int) -> memoryview:
        return memoryview(self._page)[slot * DEK_LENGTH : (slot + 1) * DEK_LENGTH]

    def _drop(self, name: bytes) -> None:
        wipe(self._view(self._entries.pop(name).slot))

    def _expire(self) -> None:
        now = time.monotonic()
        for name in [name for name, entry in self._entries.items() if entry.until <= now]:
            self._drop(name)

    def _arm(self) -> None:
        if self._timer is None and self._entries:
            wait = min(entry.until for entry in self._entries.values()) - time.monotonic()
            self._timer = threading.Timer(max(wait, 0) + 0.01, self._tick)
            self._timer.daemon = True
            self._timer.start()

    def _tick(self) -> None:
        with self._lock:
            self._timer = None
            self._expire()
            self._arm()

    def __repr__(self) -> str:
        return f"<DekCache {len(self._entries)} keys>"
