"""Damage to bytes that is a change for certain: a fixed last byte is the old one, once in 256."""

from __future__ import annotations


def flipped(content: bytes) -> bytes:
    """The same bytes, but the last bit is flipped."""
    return content[:-1] + bytes([content[-1] ^ 1])
