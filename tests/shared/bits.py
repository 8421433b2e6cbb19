"""Damage to bytes that is a change for certain: a fixed byte is the old one, once in 256."""

from __future__ import annotations

from pathlib import Path


def flipped(content: bytes, at: int = -1, mask: int = 1) -> bytes:
    """The same bytes, but bits of one are flipped: the last one of the last, if nothing is said."""
    changed = bytearray(content)
    changed[at] ^= mask
    return bytes(changed)


def flip_in(file: Path, at: int = -1) -> None:
    """Flip a bit of a file."""
    file.write_bytes(flipped(file.read_bytes(), at))
