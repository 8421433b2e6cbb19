"""The header of a .safetensors file: where each tensor is (github.com/huggingface/safetensors).

8 bytes, little-endian: the length of the header; the header, a JSON object; the tensors. As the
library of its authors, this refuses gaps, overlaps, and a length that the shape does not give.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from keymgmt.errors import FormatError

if TYPE_CHECKING:
    from keymgmt.loading import PrivateMemory

__all__ = ["Entry", "read_header"]

_PREFIX: Final = 8
_MAX: Final = 100_000_000  # bytes of a header, as the library has it
# Type -> bits of an element.
_BITS: Final = {
    kind: bits
    for bits, kinds in (
        (4, "F4"),
        (6, "F6_E2M3 F6_E3M2"),
        (8, "BOOL I8 U8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ"),
        (16, "I16 U16 F16 BF16"),
        (32, "I32 U32 F32"),
        (64, "I64 U64 F64 C64"),
    )
    for kind in kinds.split()
}


@dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
        kind: its type, as the header names it.
        shape: its dimensions.
        start: of its first byte, from the beginning of the file.
    """

    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(memory: PrivateMemory, size: int, what: str) -> dict[str, Entry]:
    """The tensors of a file of ``size`` bytes, which an error calls ``what``, by name.

    Raises:
        FormatError: it is not a valid one.
    """
    length = int.from_bytes(memory[:_PREFIX], "little")
    begin = _PREFIX + length
    if size < _PREFIX or length > _MAX or begin > size:
        raise FormatError(f"{what} is not a .safetensors file: its header ends beyond its end")
    try:
        header = json.loads(memory[_PREFIX:begin])
        header.pop("__metadata__", None)
        found = {name: _entry(fields) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{what} is not a .safetensors file: its header is malformed") from None
    position = 0
    for name, (entry, end) in sorted(
        found.items(), key=lambda item: (item[1][0].start, item[1][1])
    ):
        bits = entry.count * _BITS[entry.kind]
        if entry.start != position or bits % 8 or end - position != bits // 8:
            raise FormatError(f"{what} is not a .safetensors file: {name!r} is not where it says")
        position = end
    if position != size - begin:
        raise FormatError(f"{what} is not a .safetensors file: its tensors do not fill it")
    return {
        name: Entry(entry.kind, entry.shape, begin + entry.start)
        for name, (entry, _) in found.items()
    }


def _entry(fields: dict[str, Any]) -> tuple[Entry, int]:
    """An entry that starts where the tensors do, and its end; ValueError where it is none."""
    kind, shape, (start, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    numbers = [*shape, start, end]
    if kind not in _BITS or not all(type(each) is int and each >= 0 for each in numbers):
        raise ValueError(kind)
    return Entry(kind, tuple(shape), start), end
