"""Nonces that need no memory: a time and random bytes, under a MAC of a key that instances share.

A nonce is 8 bytes of time (milliseconds, big endian), 16 random bytes and HMAC-SHA256 of both. Any
instance that has the key accepts it for its life, and more than once: the answer opens only for
the first client. A repeat that one process sees is reported to the caller, for the log.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
import time
from collections import OrderedDict
from typing import Final

from keymgmt_broker.protocol import NONCE_LENGTH

__all__ = ["LIFE", "NONCE_KEY_LENGTH", "Nonces"]

LIFE: Final = 60.0
"""Seconds for which a nonce counts; as much is allowed between the clocks of two instances."""
NONCE_KEY_LENGTH: Final = 32
_SIGNED: Final = 24
_REMEMBERED: Final = 100_000


class Nonces:
    """Makes nonces and recognises them; safe to use from several threads."""

    def __init__(self, key: bytes) -> None:
        """``key`` is secret: whoever has it can choose nonces, and make evidence in advance."""
        self._key = key
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, float] = OrderedDict()

    def make(self) -> bytes:
        """A new nonce."""
        signed = int(time.time() * 1000).to_bytes(8, "big") + os.urandom(16)
        return signed + self._mac(signed)

    def is_fresh(self, nonce: bytes) -> bool:
        """Whether ``nonce`` was made under this key within the last ``LIFE`` seconds."""
        signed, mac = nonce[:_SIGNED], nonce[_SIGNED:]
        if len(nonce) != NONCE_LENGTH or not hmac.compare_digest(mac, self._mac(signed)):
            return False
        return abs(time.time() - int.from_bytes(signed[:8], "big") / 1000) <= LIFE

    def is_repeat(self, nonce: bytes) -> bool:
        """Whether this process saw ``nonce`` before; it has seen it now."""
        now = time.monotonic()
        with self._lock:
            while self._seen:
                oldest = next(iter(self._seen))
                if now - self._seen[oldest] <= 2 * LIFE and len(self._seen) < _REMEMBERED:
                    break
                del self._seen[oldest]
            repeat = nonce in self._seen
            self._seen.setdefault(nonce, now)
            return repeat

    def _mac(self, signed: bytes) -> bytes:
        return hmac.digest(self._key, b"keymgmt broker nonce 1" + signed, hashlib.sha256)
