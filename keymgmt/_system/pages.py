"""Fresh memory, made ready at once.

The first write to each page of new memory is a trap into the kernel, and for a gigabyte of
plaintext these cost more than decrypting it. ``MADV_POPULATE_WRITE`` (Linux 5.14) makes ready a
whole range in one call, by as many threads as ask. With huge pages it is four times as fast again,
unless the machine is a virtual one whose host took the free blocks back: then it is five times as
slow, for as long as it takes to get them again. So huge pages are tried and timed, and given up
where they turn out slow.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from typing import Final

from keymgmt._system.libc import libc

__all__ = ["BLOCK", "FreshMemory", "unwritten"]

BLOCK: Final = 2 << 20  # bytes of a huge page, on x86-64 and on ARM with pages of 4 KiB
_TRIES: Final = 2  # blocks of small pages, to know what they cost
_AHEAD: Final = 4
_MAY_COST: Final = 16  # what huge pages may cost before they are given up, in blocks of small ones
_MADV_POPULATE_WRITE: Final = 23  # <linux/mman.h>; the module mmap does not have it


def unwritten(size: int) -> bytearray:
    """A bytearray of undefined content, for callers that fill all of it before anybody reads it.

    ``bytearray(size)`` writes zeros all over it, on one core and holding the GIL.
    """
    array = bytearray()
    ctypes.pythonapi.PyByteArray_Resize(ctypes.py_object(array), ctypes.c_ssize_t(size))
    return array


class FreshMemory:
    """Makes the pages of one buffer ready to be written to, part by part, by several threads.

    Only speed depends on this, so a system that refuses such a call is not reported.
    """

    def __init__(self, view: memoryview) -> None:
        """Look after a writable, contiguous ``view`` of bytes."""
        self._view = view
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0
        self._end = self._start + len(view)
        self._first = -(-self._start // BLOCK)  # the first whole block, numbered by its address
        self._claimed = bytearray(max(0, self._end // BLOCK - self._first))
        # The range of blocks with huge pages. The blocks before it are filled while the times are
        # taken from which this range is decided.
        self._huge_from = self._huge_to = self._end // BLOCK * BLOCK
        # Changed by any thread at any time: at worst a few blocks get the slower pages.
        self._tried = 0  # blocks of small pages
        self._small_time = float("inf")  # CPU seconds that one of these took
        self._lost = 0.0  # CPU seconds, by the latest huge pages

    def part(self, start: int, length: int) -> memoryview:
        """A part of the buffer, its pages ready."""
        position, last = self._start + start, self._start + start + length
        while position < last:
            number = position // BLOCK
            end = min(last, (number + 1) * BLOCK)
            index = number - self._first
            if 0 <= index < len(self._claimed):
                # A block belongs to one thread. Another, whose part ends at the edge of this block,
                # does not wait: the worst is that it writes to pages that are not ready yet.
                if not self._claimed[index]:
                    self._claimed[index] = 1
                    self._prepare_block(number * BLOCK)
            else:
                _prepare_pages(position, end)
            position = end
        return self._view[start : start + length]

    def _prepare_block(self, address: int) -> None:
        if _is_resident(address):
            return
        started = time.thread_time()
        libc.madvise(address, BLOCK, _MADV_POPULATE_WRITE)
        seconds = time.thread_time() - started
        if self._huge_from <= address < self._huge_to:
            self._lost = max(0.0, self._lost + seconds - self._small_time)
            if self._lost > _MAY_COST * self._small_time:
                self._huge_to = self._advise(address, mmap.MADV_NOHUGEPAGE, self._huge_to)
        elif address < self._huge_from:
            self._small_time = min(seconds, self._small_time)
            self._tried += 1
            if self._tried >= _TRIES and self._huge_from == self._huge_to:
                self._huge_from = self._advise(address, mmap.MADV_HUGEPAGE, self._huge_to)

    def _advise(self, address: int, advice: int, end: int) -> int:
        """Give the kernel ``advice`` for the blocks that no thread has reached; their start."""
        start = min(address + _AHEAD * BLOCK, end)
        if start < end:
            libc.madvise(start, end - start, advice)
        return start


def _prepare_pages(start: int, end: int) -> None:
    """Small pages, for what is less than a block."""
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if end - start > 2 * mmap.PAGESIZE and not _is_resident(start):
        libc.madvise(start, end - start, _MADV_POPULATE_WRITE)


def _is_resident(address: int) -> bool:
    """Whether the pages from ``address`` on are resident, judged by the second page of them.

    The first may have been touched by a neighbour that shares it.
    """
    resident = ctypes.create_string_buffer(1)
    asked = libc.mincore(address + mmap.PAGESIZE, mmap.PAGESIZE, resident)
    return bool(asked != 0 or resident.raw != b"\0")
