"""A data key: made, split, held, wiped.

Rules: the bytes live in one wipeable buffer, no code here copies them into ``bytes``, and they
never appear in ``repr``, a pickle or an exception.
"""

from __future__ import annotations

import ctypes
import hmac
from typing import TYPE_CHECKING, Final, NoReturn, Self

from keymgmt._system.libc import check, libc

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

__all__ = ["DEK_LENGTH", "Dek", "fill_random", "wipe"]

DEK_LENGTH: Final = 32
# ctypes.memset releases the GIL. To get it back takes longer than to clear so few bytes.
_SMALL: Final = 4096


def wipe(buffer: Buffer) -> None:
    """Overwrite a writable, contiguous buffer of any length with zeros, in place."""
    view = memoryview(buffer).cast("B")
    size = len(view)
    if size <= _SMALL:
        view[:] = bytes(size)
    else:
        array = (ctypes.c_char * size).from_buffer(view)
        ctypes.memset(array, 0, size)
        del array


def fill_random(buffer: bytearray) -> None:
    """Fill a buffer from the kernel's generator (getrandom(2)), without an immutable copy."""
    done, size = 0, len(buffer)
    while done < size:
        rest = (ctypes.c_char * (size - done)).from_buffer(buffer, done)
        done += check(libc.getrandom(rest, size - done, 0))
        del rest


class Dek:
    """32 secret bytes in wipeable memory: a data key, or one share of a data key.

    A context manager that wipes on exit. Equality takes constant time. An object has no hash,
    refuses to be pickled or copied, and its ``repr`` shows none of the bytes.
    """

    __slots__ = ("__weakref__", "_bytes", "_live")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, data: Buffer) -> None:
        """Copy exactly 32 bytes; the caller wipes its own buffer. ValueError for another length."""
        self._live = False
        view = memoryview(data).cast("B")
        if len(view) != DEK_LENGTH:
            raise ValueError(f"a data key has {DEK_LENGTH} bytes, not {len(view)}")
        self._bytes = bytearray(view)
        self._live = True

    @classmethod
    def generate(cls) -> Dek:
        """Make a new data key from the kernel's generator."""
        dek = cls(bytes(DEK_LENGTH))
        fill_random(dek._bytes)
        return dek

    @classmethod
    def join(cls, shares: Iterable[Dek]) -> Dek:
        """XOR shares, one at least, into the key that ``split`` was given."""
        first, *others = shares
        joined = cls(first.view())
        for share in others:
            for index, byte in enumerate(share.view()):
                joined._bytes[index] ^= byte
        return joined

    def split(self, count: int) -> list[Dek]:
        """Split into ``count`` XOR shares: all but one random, so fewer than all say nothing."""
        if count < 1:
            raise ValueError("a key splits into at least one share")
        shares = [Dek.generate() for _ in range(count - 1)]
        shares.append(Dek.join([self, *shares]))
        return shares

    def view(self) -> memoryview:
        """The 32 bytes, read-only and without a copy. ValueError once wiped."""
        if not self._live:
            raise ValueError("this data key was wiped")
        return memoryview(self._bytes).toreadonly()

    def wipe(self) -> None:
        """Overwrite the key with zeros; may be called again."""
        wipe(self._bytes)
        self._live = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()

    def __del__(self) -> None:
        # __init__ may have refused its argument before the buffer existed.
        if getattr(self, "_live", False):
            wipe(self._bytes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Dek):
            return NotImplemented
        return hmac.compare_digest(self.view(), other.view())

    def __repr__(self) -> str:
        return "<Dek>" if self._live else "<Dek, wiped>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a data key is not pickled or copied")
