"""Look through an ONNX file for tensors that would be read from somewhere else.

OpenVINO resolves a tensor's external data against the working directory, and takes the location
``*/_ORT_MEM_ADDR_/*`` as an address in this process: both would let a model read what is not its
own. So a model in memory must hold all of its tensors itself.

Only the wire format is read (protobuf.dev/programming-guides/encoding) and of onnx.proto only the
fields on the way to a TensorProto; every occurrence of a field is looked at, since a parser merges
them.
"""

from __future__ import annotations

from typing import Final

from keymgmt.errors import FormatError

__all__ = ["check_self_contained"]

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


def check_self_contained(model: memoryview, what: str) -> None:
    """Return if the serialised ModelProto in ``model`` holds every tensor itself.

    Args:
        model: the bytes of the .onnx file.
        what: how an error calls it.

    Raises:
        FormatError: it names data outside of itself, or is no protobuf message.
    """
    try:
        _walk(model, "Model", what, 0)
    except IndexError:
        raise FormatError(f"{what} is not an ONNX model: it ends in the middle") from None


def _walk(data: memoryview, message: str, what: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FormatError(f"{what}: graphs nested more than {MAX_DEPTH} deep")
    inner = _FIELDS[message]
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position, what)
        if tag >> 32:  # parsers cut a tag to 32 bits, and so would see another field
            raise FormatError(f"{what} is not an ONNX model: field number {tag >> 3}")
        field, wire = tag >> 3, tag & 7
        if message == "Tensor" and field in (_EXTERNAL_DATA, _DATA_LOCATION):
            _refuse_external(data, position, field, wire, what)
        if wire == 0:
            _, position = _varint(data, position, what)
        elif wire == 1:
            position += 8
        elif wire == 5:
            position += 4
        elif wire == 2:
            length, position = _varint(data, position, what)
            if length > end - position:
                raise IndexError
            if field in inner:
                _walk(data[position : position + length], inner[field], what, depth + 1)
            position += length
        else:  # groups (3, 4) were never in onnx.proto, 6 and 7 are no wire types
            raise FormatError(f"{what} is not an ONNX model: wire type {wire}")
    if position != end:
        raise IndexError


def _refuse_external(data: memoryview, position: int, field: int, wire: int, what: str) -> None:
    if field == _DATA_LOCATION and wire == 0 and _varint(data, position, what)[0] == 0:
        return  # DEFAULT: in the message
    raise FormatError(
        f"{what} keeps tensors outside of itself, and those are not read from memory",
        hint="convert it to OpenVINO IR (openvino.convert_model, save_model) and seal that",
    )


def _varint(data: memoryview, position: int, what: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
    raise FormatError(f"{what} is not an ONNX model: a number of more than 10 bytes")
