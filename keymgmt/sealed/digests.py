"""The digest of a payload file: the root of a hash tree over its header and segments.

The tree is that of RFC 9162 (section 2.1): a leaf is H(0x00 || data), a node H(0x01 || left ||
right), and in a row with an odd count the last hash moves up unchanged. The first byte tells leaves
from nodes, so that no file can be built whose leaf looks like a node of another file. H is BLAKE3,
SHA-256 or SHA-384, by profile. The leaves of a payload are its FLOE header and then its segments,
as they lie in the file, so that a mirror can check a file without any key, and threads can hash its
parts in any order.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, Literal, Protocol

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

__all__ = ["DigestName", "digest_length", "leaf_hash", "tree_root"]

DigestName = Literal["blake3", "sha256", "sha384"]


class _Hash(Protocol):
    def update(self, data: Buffer, /) -> object: ...
    def digest(self) -> bytes: ...


_HASHES: Final[dict[str, Callable[[bytes], _Hash]]] = {
    "blake3": blake3,
    "sha256": hashlib.sha256,
    "sha384": hashlib.sha384,
}


def digest_length(digest: DigestName) -> int:
    """Length of a hash in bytes."""
    return 48 if digest == "sha384" else 32


def leaf_hash(digest: DigestName, data: Buffer) -> bytes:
    """The hash of one leaf; gives up the GIL while it hashes."""
    hasher = _HASHES[digest](b"\0")
    hasher.update(data)
    return hasher.digest()


def tree_root(digest: DigestName, leaves: Buffer) -> bytes:
    """The root over the hashes of one or more leaves, which follow each other in one buffer."""
    view, length = memoryview(leaves).cast("B"), digest_length(digest)
    if not len(view) or len(view) % length:
        raise ValueError(f"a tree has one leaf or more, each hashed to {length} bytes")
    make = _HASHES[digest]
    row = bytes(view)
    while len(row) > length:
        above = bytearray()
        for start in range(0, len(row), 2 * length):
            pair = row[start : start + 2 * length]
            complete = len(pair) == 2 * length
            above += make(b"\1" + pair).digest() if complete else pair
        row = bytes(above)
    return row
