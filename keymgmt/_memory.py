"""Fresh memory, made ready at once.

The first write to each page of new memory is a trap into the kernel, and for a gigabyte of
plaintext these cost more than decrypting it. ``MADV_POPULATE_WRITE`` (Linux 5.14) makes ready a
whole range in one call, by as many threads as ask.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

__all__ = ["populate"]

_MADV_POPULATE_WRITE: Final = 23  # <linux/mman.h>; the module mmap does not have it

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def populate(view: memoryview) -> None:
    """Make the whole pages of a writable, contiguous view ready to be written to.

    Only speed depends on it, so nothing is said where the system has no such call. Where the
    first page is there already, so are the others as a rule, and none is asked for.
    """
    if len(view) < 4 * mmap.PAGESIZE:
        return
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + len(view)) // mmap.PAGESIZE * mmap.PAGESIZE
    resident = ctypes.create_string_buffer(1)
    # The second page: the first may have come with the range before this one.
    if _libc.mincore(start + mmap.PAGESIZE, mmap.PAGESIZE, resident) == 0 and resident.raw == b"\0":
        _libc.madvise(start, end - start, _MADV_POPULATE_WRITE)
