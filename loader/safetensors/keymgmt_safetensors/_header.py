"""The header of a .safetensors file: where each tensor is (github.com/huggingface/safetensors).

8 bytes, little-endian: the length of the header; the header, a JSON object; the tensors. What the
library of its authors refuses is refused: gaps, overlaps, a length that the shape does not give,
and JSON that it does not read. So is a member of an entry that the format does not have, which the
library does not look at, and a shape that no array can have.
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
_MAX: Final = 100_000_000  # bytes of a header, as the library has it
_MAX_NUMBER: Final = (1 << 63) - 1  # of a place, a dimension, and the elements of a tensor
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
        start: of its first byte, from the beginning of the file.
        count: number of its elements.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    count: int


def read_header(memory: PrivateMemory, size: int, label: str) -> dict[str, Entry]:
    """The tensors of a file of ``size`` bytes, which an error calls ``label``, by name.

    Raises:
        FormatError: it is not a valid one.
    """
    length = int.from_bytes(memory[:_PREFIX], "little")
    begin = _PREFIX + length
    if size < _PREFIX or length > _MAX or begin > size:
        raise FormatError(f"{label} is not a .safetensors file: its header ends beyond its end")
    try:
        members = _members(bytes(memory[_PREFIX:begin]))
        _check_metadata([value for name, value in members if name == _METADATA])
        # Of two tensors with one name the last counts, as in the library; both are looked at.
        found = {name: _entry(fields) for name, fields in members if name != _METADATA}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError(f"{label} is not a .safetensors file: its header is malformed") from None
    position = 0
    for name, (entry, end) in sorted(
        found.items(), key=lambda item: (item[1][0].start, item[1][1])
    ):
        bits = entry.count * _BITS[entry.kind]
        if entry.start != position or bits % 8 or end - position != bits // 8:
            raise FormatError(f"{label} is not a .safetensors file: {name!r} is not where it says")
        position = end
    if position != size - begin:
        raise FormatError(f"{label} is not a .safetensors file: its tensors do not fill it")
    return {name: replace(entry, start=begin + entry.start) for name, (entry, _) in found.items()}


def _members(text: bytes) -> tuple[tuple[str, Any], ...]:
    """The members of the header; each object in it is such a tuple too, and each array a list.

    Raises:
        ValueError: it is no JSON object, or has what an entry and the metadata cannot have.
        RecursionError: it is too deep.
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
    # Length first: the conversion of a long number takes quadratic time. "-0" is no integer to
    # the library.
    if len(text) > 19 or not text.isdigit() or int(text) > _MAX_NUMBER:
        raise ValueError(text[:20])
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(text[:20])


def _check_metadata(found: list[Any]) -> None:
    """ValueError where ``__metadata__`` is there twice, or is no object of texts."""
    if len(found) > 1:
        raise ValueError(_METADATA)
    for value in found:
        texts = isinstance(value, tuple) and all(isinstance(text, str) for _, text in value)
        if value is not None and not texts:
            raise ValueError(_METADATA)


def _entry(members: Any) -> tuple[Entry, int]:
    """An entry that starts where the tensors do, and its end; ValueError where it is none."""
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
