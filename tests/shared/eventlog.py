"""Event logs as firmware writes them, with digests of SHA-1 and SHA-256."""

from __future__ import annotations

import hashlib
import struct

SHA1, SHA256 = 0x0004, 0x000B
NO_ACTION, SEPARATOR, ACTION = 3, 4, 5


def event(index: int, kind: int, data: bytes) -> bytes:
    digests = struct.pack("<IH", 2, SHA1) + hashlib.sha1(data).digest()
    digests += struct.pack("<H", SHA256) + hashlib.sha256(data).digest()
    return struct.pack("<II", index, kind) + digests + struct.pack("<I", len(data)) + data


def log(*events: bytes) -> bytes:
    spec = b"Spec ID Event03\0" + struct.pack("<IBBBB", 0, 0, 2, 0, 2)
    spec += struct.pack("<IHHHHB", 2, SHA1, 20, SHA256, 32, 0)
    head = struct.pack("<II20sI", 0, NO_ACTION, bytes(20), len(spec))
    return head + spec + b"".join(events)
