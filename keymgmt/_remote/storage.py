"""The interface of a server that has the files of a sealed model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from keymgmt.errors import ConfigError, IntegrityError

__all__ = ["Part", "Storage", "changed"]


@dataclass(frozen=True)
class Part:
    """A part of a file.

    Attributes:
        content: the bytes.
        total: length of the whole file, in bytes.
        pin: identifies this version of the file, such as its ETag or digest; empty where the server
            gives nothing of the kind.
    """

    content: memoryview
    total: int
    pin: str


class Storage(Protocol):
    """The files of a sealed model at one location."""

    def part(self, name: str, start: int, end: int, pin: str = "") -> Part | None:
        """The bytes from ``start`` to before ``end``, fewer at the file's end; None for no file.

        Raises:
            IntegrityError: ``pin`` is given, and the file has another pin by now.
            StorageError: it is not to be had.
        """

    def replace(self, name: str, content: bytes, pin: str) -> str:  # noqa: ARG002
        """Replace a small file if it still has this pin; returns the new pin.

        Raises:
            IntegrityError: it was replaced meanwhile; nothing was changed.
            ConfigError: files cannot be replaced at this location, as where this is not overridden.
            StorageError: it is not to be had.
        """
        raise ConfigError(f"{name} cannot be replaced here")


def changed(what: str) -> IntegrityError:
    """The error for a file that was replaced while it was read."""
    return IntegrityError(
        f"{what} changed while it was read", hint="somebody replaced it: open the model again"
    )
