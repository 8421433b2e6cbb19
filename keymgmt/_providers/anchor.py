"""An anchor: 32 bytes in a key service that only move forward, so that a disk cannot go back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from hashlib import sha256
from typing import Final

__all__ = ["ANCHOR_FIRST", "ANCHOR_START", "SupportsAnchor", "anchor_after"]

ANCHOR_FIRST: Final = sha256(b"keymgmt anchor/1").digest()
"""The first step, from 32 zero bytes, which sets an anchor up."""


def anchor_after(value: bytes, step: bytes) -> bytes:
    """The value of an anchor after a step, as a hash chain: SHA-256 over both, 32 bytes each."""
    return sha256(value + step).digest()


ANCHOR_START: Final = anchor_after(bytes(32), ANCHOR_FIRST)
"""The value of an anchor that was set up and never moved."""


class SupportsAnchor(ABC):
    """A provider that keeps an anchor where nobody who restores a disk reaches it.

    ``[policy] remember_releases`` binds the release memory to an anchor. An anchor never has the
    same value twice: each step replaces its value by ``anchor_after(value, step)``. The value
    ``ANCHOR_START`` says that no file was bound to the anchor yet, so an anchor gets it only when a
    person sets the anchor up.
    """

    @abstractmethod
    def anchor(self) -> bytes:
        """The present value of the anchor, 32 bytes.

        Raises:
            ConfigError: the provider's table names no anchor.
            KeyNotFound: the anchor does not exist, or was never set up.
        """

    @abstractmethod
    def move_anchor(self, value: bytes, step: bytes) -> None:
        """Move the anchor from ``value`` to ``anchor_after(value, step)``.

        Where the anchor has that value already, nothing is done.

        Raises:
            AccessDenied: this user may not move it, or not in this state of the machine; or the
                anchor has a third value.
        """
