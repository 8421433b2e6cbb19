"""The tensors that an ONNX file keeps in other files, and the same model with other locations.

A runtime takes the location of such a tensor for a file beside the model, OpenVINO for a file in
the working directory, and ``*/_ORT_MEM_ADDR_/*`` for an address in its process. So a model could
read what does not belong to it. A location must be a file of the same model, or it is refused.

Only the wire format is parsed (protobuf.dev/programming-guides/encoding), and of onnx.proto only
the fields that lead to a TensorProto. Every occurrence of a field is examined, as parsers merge
them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from keymgmt.errors import FormatError

__all__ = ["CONVERT", "External", "external_files", "move_external", "outside_path"]

MAX_DEPTH: Final = 64

# Message -> field number -> message in it; from onnx.proto of ONNX 1.x (IR version 13).
_FIELDS: Final[dict[str, dict[int, str]]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
_EXTERNAL_DATA: Final = 13
_DATA_LOCATION: Final = 14
_WIRES: Final = {_EXTERNAL_DATA: 2, _DATA_LOCATION: 0}
CONVERT: Final = (  # without the last option, the weights would be rounded to f16
    "convert it to OpenVINO IR where it works, and seal that: "
    "openvino.save_model(openvino.convert_model(MODEL), 'model.xml', compress_to_fp16=False)"
)


@dataclass(frozen=True)
class External:
    """Where the bytes of a tensor are, as ``TensorProto.external_data`` says.

    Attributes:
        location: a path from the model's folder, or another text that a runtime may accept.
        offset: of the first byte.
        length: number of bytes, or None for all from ``offset`` on.
    """

    location: str
    offset: int
    length: int | None


Visit = Callable[[External], External | None]
Parts = list[memoryview | bytes]


def move_external(model: memoryview, label: str, visit: Visit) -> Parts | None:
    """Call ``visit`` for each tensor outside of the ModelProto ``model``, which may move it.

    Args:
        model: the bytes of the .onnx file.
        label: the name of the model in errors.
        visit: called with each tensor; returns its place in the new model, or None for the old
            place.

    Returns:
        The new model, in parts of the old one and new bytes; None if nothing was moved.

    Raises:
        FormatError: it is not a protobuf message, or contradicts itself.
    """
    try:
        return _walk(model, "Model", label, 0, visit)
    except IndexError:
        raise FormatError(f"{label} is not an ONNX model: it ends in the middle") from None


def outside_path(model_path: str, location: str, label: str) -> str:
    """The path in the sealed model of a location that the ONNX file ``model_path`` names.

    Raises:
        FormatError: it is absolute, an address, or leaves the model.
    """
    path = PurePosixPath(location)
    if not location or path.is_absolute() or ".." in path.parts or {"*", "\0"} & {*location}:
        raise FormatError(
            f"{label} keeps tensors at {location!r}, which is no file of this model", hint=CONVERT
        )
    return str(PurePosixPath(model_path).parent / path)


def external_files(descriptor: int, path: str, label: str) -> set[str]:
    """The paths in the sealed model of the files that an open ONNX file needs.

    Raises:
        FormatError: as ``move_external`` and ``outside_path``.
    """
    found: set[str] = set()
    if os.fstat(descriptor).st_size:  # nothing is no message, and no mapping either
        content = memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
        move_external(
            content, label, lambda each: found.add(outside_path(path, each.location, label))
        )
    return found


def _walk(data: memoryview, message: str, label: str, depth: int, visit: Visit) -> Parts | None:
    """The parts of a message in which a tensor was moved; None if none was."""
    if depth > MAX_DEPTH:
        raise FormatError(f"{label}: graphs nested more than {MAX_DEPTH} deep")
    inner = _FIELDS[message]
    is_tensor = message == "Tensor"
    entries: list[memoryview] = []
    locations: set[int] = set()
    parts: Parts = []
    kept = position = 0  # all bytes before ``kept`` are in ``parts``, or left out
    end = len(data)
    while position < end:
        start = position
        tag, position = _varint(data, position, label)
        if tag >> 32:  # parsers cut a tag to 32 bits, and so would see another field
            raise FormatError(f"{label} is not an ONNX model: field number {tag >> 3}")
        field, wire = tag >> 3, tag & 7
        if is_tensor and wire != _WIRES.get(field, wire):
            raise FormatError(f"{label} is not an ONNX model: wire type {wire} of field {field}")
        if wire == 0:
            value, position = _varint(data, position, label)
            if is_tensor and field == _DATA_LOCATION:
                locations.add(value)
        elif wire == 1:
            position += 8
        elif wire == 5:
            position += 4
        elif wire == 2:
            length, position = _varint(data, position, label)
            if length > end - position:
                raise IndexError
            content = data[position : position + length]
            position += length
            if field in inner:
                moved = _walk(content, inner[field], label, depth + 1, visit)
                if moved is not None:
                    size = sum(map(len, moved))
                    parts += [data[kept:start], _number(tag), _number(size), *moved]
                    kept = position
            elif is_tensor and field == _EXTERNAL_DATA:
                entries.append(content)
                parts.append(data[kept:start])
                kept = position
        else:  # groups (3, 4) were never in onnx.proto, 6 and 7 are no wire types
            raise FormatError(f"{label} is not an ONNX model: wire type {wire}")
    if position != end:
        raise IndexError
    if entries or locations - {0}:
        if not entries or locations != {1}:  # runtimes would differ in what they make of it
            raise FormatError(
                f"{label} contradicts itself on whether a tensor is outside", hint=CONVERT
            )
        moved_to = visit(_external(entries, label))
        if moved_to is None:
            return None
        parts.append(data[kept:])
        for key, text in (
            ("location", moved_to.location),
            ("offset", str(moved_to.offset)),
            ("length", str(moved_to.length)),
        ):
            pair = b"".join(
                _number(number << 3 | 2) + _number(len(part)) + part
                for number, part in ((1, key.encode()), (2, text.encode()))
            )
            parts.append(_number(_EXTERNAL_DATA << 3 | 2) + _number(len(pair)) + pair)
        return parts
    return [*parts, data[kept:]] if parts else None


def _external(entries: list[memoryview], label: str) -> External:
    """Of StringStringEntryProto messages: 1 is the key and 2 the value, both strings."""
    values: dict[str, str] = {}
    for entry in entries:
        pair: dict[int, str] = {}
        position = 0
        while position < len(entry):
            tag, position = _varint(entry, position, label)
            length, position = _varint(entry, position, label)
            if tag not in (1 << 3 | 2, 2 << 3 | 2) or length > len(entry) - position:
                raise FormatError(f"{label} is not an ONNX model: wrong external data")
            try:
                pair[tag >> 3] = str(entry[position : position + length], "utf-8")
            except UnicodeDecodeError:
                raise FormatError(
                    f"{label} is not an ONNX model: external data that is no text"
                ) from None
            position += length
        key = pair.get(1, "")
        if key in values:
            raise FormatError(f"{label} names the {key} of a tensor's external data twice")
        values[key] = pair.get(2, "")
    numbers: dict[str, int | None] = {}
    for key in ("offset", "length"):
        text = values.get(key, "")
        if text and not (text.isascii() and text.isdigit() and len(text) < 20):
            raise FormatError(f"{label} has external data with the {key} {text[:40]!r}")
        numbers[key] = int(text) if text else None
    return External(values.get("location", ""), numbers["offset"] or 0, numbers["length"])


def _number(value: int) -> bytes:
    """A base-128 varint."""
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def _varint(data: memoryview, position: int, label: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
    raise FormatError(f"{label} is not an ONNX model: a number of more than 10 bytes")
