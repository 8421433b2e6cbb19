"""What is asked of a server where the files of a sealed model lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from keymgmt.errors import IntegrityError

__all__ = ["Part", "Storage", "changed"]


@dataclass(frozen=True)
class Part:
    """Some bytes of a file.

    Attributes:
        content: the bytes.
        total: how many the file has.
        pin: tells the file from another that takes its place; empty where the server has nothing
            that does.
    """

    content: memoryview
    total: int
    pin: str


class Storage(Protocol):
    """Where the files of a sealed model lie."""

    def part(self, name: str, start: int, end: int, pin: str = "") -> Part | None:
        """The bytes from ``start`` to before ``end``, fewer where the file ends; None for no file.

        Raises:
            IntegrityError: ``pin`` is given and is not that of the file any more.
            StorageError: it is not to be had.
        """

    def replace(self, name: str, content: bytes, pin: str) -> str:
        """Replace a small file if it still has this pin; the new pin.

        Raises:
            IntegrityError: it was replaced meanwhile; nothing was changed.
            ConfigError: nothing can be replaced there.
            StorageError: it is not to be had.
        """


def changed(what: str) -> IntegrityError:
    """The error for a file in whose place there is another one by now."""
    return IntegrityError(
        f"{what} changed while it was read", hint="somebody replaced it: open the model again"
    )
