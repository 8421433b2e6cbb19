"""Where a quote of SGX or TDX holds its report data: Intel's DCAP quote library API, appendix A."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

__all__ = ["MAX_QUOTE", "padded", "report_data_of", "write_once"]

MAX_QUOTE: Final = 65536

REPORT_DATA: Final = 64
_PLACES: Final = {
    (3, 0x00): 48 + 320,
    (4, 0x00): 48 + 320,
    (4, 0x81): 48 + 520,
    (5, 0x81): 48 + 6 + 520,
}
"""By version and kind of TEE: header, in version 5 kind and size of the body, place in the body."""


def padded(report_data: bytes) -> bytes:
    """The 64 bytes of a report for a hash: zeros follow it; ValueError where it is not 32 bytes."""
    if len(report_data) != 32:
        raise ValueError(f"report data has 32 bytes, not {len(report_data)}")
    return report_data.ljust(REPORT_DATA, b"\0")


def report_data_of(quote: bytes) -> bytes:
    """The 64 bytes of report data in a quote, or nothing where it is no quote that is known."""
    version, tee = int.from_bytes(quote[:2], "little"), int.from_bytes(quote[4:8], "little")
    start = _PLACES.get((version, tee))
    return b"" if start is None else quote[start : start + REPORT_DATA]


def write_once(path: Path, content: bytes) -> None:
    """Write to a file that is there, in one call; OSError. The file counts when it is closed."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.EIO, "a part was written")
    finally:
        os.close(descriptor)
