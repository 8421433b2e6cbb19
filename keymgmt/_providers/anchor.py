"""An anchor: 32 bytes in a key service that only move forward, so that a disk cannot go back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from hashlib import sha256
from typing import Final

__all__ = ["ANCHOR_FIRST", "ANCHOR_START", "SupportsAnchor", "anchor_after"]

ANCHOR_FIRST: Final = sha256(b"keymgmt anchor/1").digest()
"""The step from 32 zero bytes that sets an anchor up."""


def anchor_after(value: bytes, step: bytes) -> bytes:
    """The value of an anchor after a step, as a hash chain: SHA-256 over both, 32 bytes each."""
    return sha256(value + step).digest()


ANCHOR_START: Final = anchor_after(bytes(32), ANCHOR_FIRST)
"""The value of an anchor that was set up and never moved."""


class SupportsAnchor(ABC):
    """A provider that keeps an anchor where nobody who restores a disk reaches it.

    ``[policy] remember_releases`` binds its file to one. No value comes back: a step makes
    ``anchor_after`` of the present one. ``ANCHOR_START`` says that nothing was bound to it yet, so
    only a person who sets it up gives it that value.
    """

    @abstractmethod
    def anchor(self) -> bytes:
        """Its present value, 32 bytes.

        Raises:
            ConfigError: the provider's table names none.
            KeyNotFound: it is not there, or was never set up.
        """

    @abstractmethod
    def move_anchor(self, value: bytes, step: bytes) -> None:
        """Move it from ``value`` to ``anchor_after(value, step)``; nothing more where it is there.

        Raises:
            AccessDenied: this user or machine state may not, or it has another value.
        """
