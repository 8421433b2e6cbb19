"""The header of a .safetensors file: where each tensor is (github.com/huggingface/safetensors).

8 bytes, little-endian: the length of the header; the header, a JSON object; the tensors. Everything
that the ``safetensors`` library refuses is refused here: gaps, overlaps, a length that does not
follow from the shape, and JSON that the library does not read. Two more things are refused: unknown
members of an entry, which the library ignores, and a shape that no array can have.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

from keymgmt.errors import FormatError

if TYPE_CHECKING:
    from keymgmt.loading import PrivateMemory

__all__ = ["Entry", "read_header"]

_PREFIX: Final = 8
_MAX: Final = 100_000_000  # bytes of a header: the library's limit
_MAX_NUMBER: Final = (1 << 63) - 1  # for an offset, a dimension, and the elements of a tensor
_METADATA: Final = "__metadata__"
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
        start: offset of its first byte in the file.
        count: number of its elements.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    count: int


def read_header(memory: PrivateMemory, size: int, label: str) -> dict[str, Entry]:
    """The tensors of a file of ``size`` bytes, which an error calls ``label``, by name.

    Raises:
        FormatError: it is not a valid .safetensors file.
    """
    length = int.from_bytes(memory[:_PREFIX], "little")
    begin = _PREFIX + length
    if size < _PREFIX or length > _MAX or begin > size:
        raise FormatError(f"{label} is not a .safetensors file: its header ends beyond its end")
    try:
        members = _members(bytes(memory[_PREFIX:begin]))
        _check_metadata([value for name, value in members if name == _METADATA])
        # Of two tensors with one name the last counts, as in the library; both must be valid.
        entries = {name: _entry(fields) for name, fields in members if name != _METADATA}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError(f"{label} is not a .safetensors file: its header is malformed") from None
    position = 0
    for name, (entry, end) in sorted(
        entries.items(), key=lambda item: (item[1][0].start, item[1][1])
    ):
        bits = entry.count * _BITS[entry.kind]
        if entry.start != position or bits % 8 or end - position != bits // 8:
            raise FormatError(
                f"{label} is not a .safetensors file: the offsets of {name!r} are wrong"
            )
        position = end
    if position != size - begin:
        raise FormatError(f"{label} is not a .safetensors file: its tensors do not fill it")
    return {name: replace(entry, start=begin + entry.start) for name, (entry, _) in entries.items()}


def _members(text: bytes) -> tuple[tuple[str, Any], ...]:
    """The members of the header; each object in it is such a tuple too, and each array a list.

    Raises:
        ValueError: it is not a JSON object, or holds a number that no entry can have.
        RecursionError: it is nested too deep.
    """
    header = json.loads(
        text.decode(),
        parse_int=_number,
        parse_float=_refuse,
        parse_constant=_refuse,
        object_pairs_hook=tuple,
    )
    json.dumps(header, ensure_ascii=False).encode()  # ValueError: half a surrogate pair
    if isinstance(header, tuple):
        return header
    raise ValueError(header)


def _number(text: str) -> int:
    # The length is checked first, since converting a long number takes quadratic time. The library
    # does not take "-0" for an integer.
    if len(text) > 19 or not text.isdigit() or int(text) > _MAX_NUMBER:
        raise ValueError(text[:20])
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(text[:20])


def _check_metadata(values: list[Any]) -> None:
    """ValueError if ``__metadata__`` occurs twice, or is not an object of texts."""
    if len(values) > 1:
        raise ValueError(_METADATA)
    for value in values:
        texts = isinstance(value, tuple) and all(isinstance(text, str) for _, text in value)
        if value is not None and not texts:
            raise ValueError(_METADATA)


def _entry(members: Any) -> tuple[Entry, int]:
    """An entry, with its start relative to the first tensor, and its end; or ValueError."""
    fields = dict(members)
    kind, shape, (start, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    numbers = [*shape, start, end]
    if (
        not isinstance(members, tuple)
        or len(members) != 3
        or kind not in _BITS
        or not isinstance(shape, list)
        or not all(type(each) is int for each in numbers)
    ):
        raise ValueError(kind)
    count = 1
    for each in shape:
        count *= each
        if count > _MAX_NUMBER:
            raise ValueError(kind)
    return Entry(kind, tuple(shape), start, count), end
