"""From an open sealed model to a graph: from memory where OpenVINO can, else by private files."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

import keymgmt
from keymgmt.loading import (
    GRAPHS,
    External,
    check_free_memory,
    choose_file,
    file_bytes,
    joined_bytes,
    move_external,
    outside_part,
)
from keymgmt_openvino._ask import ask
from keymgmt_openvino._memory import Memory, filled, release

if TYPE_CHECKING:
    import openvino as ov

    from keymgmt import SealedModel

__all__ = ["read_file", "read_sealed", "read_weights"]

_ADDRESS: Final = "*/_ORT_MEM_ADDR_/*"  # a location whose offset is an address in this process
_NO_GRAPH: Final = (
    "name it with file=, or convert the model (openvino.convert_model, save_model with "
    "compress_to_fp16=False) and seal the .xml; the folder of a pipeline is opened with "
    "keymgmt_openvino.genai (docs/genai.md)"
)
_SAVED_MODEL: Final = "saved_model.pb"  # TensorFlow reads the folder that it is in


def read_sealed(
    sealed: SealedModel, core: ov.Core, file: str | None = None
) -> tuple[ov.Model, list[Memory]]:
    """Read a graph of an open sealed model: ``file``, else its main one.

    Returns:
        The graph, and the storage of its weights, which the caller hands to ``release``; none
        where OpenVINO keeps copies of its own, or maps private files.
    """
    path = choose_file(sealed, file, GRAPHS, label="graph", hint=_NO_GRAPH)
    suffix = PurePosixPath(path).suffix.lower()
    label = f"{path} of {sealed.manifest.name}"
    cannot = f"OpenVINO cannot read {label}"
    if suffix == ".onnx":
        return _read_onnx(sealed, core, path, label, cannot), []
    if suffix != ".xml":
        with keymgmt.mount(sealed, only=lambda each: _goes_with(each, path)) as folder:
            target = folder / path
            target = target.parent if target.name == _SAVED_MODEL else target
            return ask(cannot, core.read_model, target), []
    memory = read_weights(sealed, path)
    try:
        with file_bytes(sealed, path) as (data, _):
            return ask(cannot, core.read_model, data, memory.tensor), [memory]
    except BaseException:
        release(memory)
        raise


def _read_onnx(sealed: SealedModel, core: ov.Core, path: str, label: str, cannot: str) -> ov.Model:
    """Read an ONNX graph from memory, with tensors in other files; OpenVINO copies all tensors."""
    files: dict[str, Memory] = {}
    copied = 0  # bytes that OpenVINO will copy, counting each time the model names the same bytes

    def in_memory(tensor: External) -> External:
        file, length = outside_part(sealed, path, tensor, label)
        if file not in files:
            files[file] = read_file(sealed, file)
        nonlocal copied
        copied += length
        return External(_ADDRESS, files[file].address + tensor.offset, length)

    try:
        # OpenVINO's frontend parses a copy and copies each tensor: measured with 1 GiB, four times
        # the size in all.
        with file_bytes(sealed, path, copies=4) as (data, room):
            parts = move_external(room, label, in_memory)
            if parts is None:
                return ask(cannot, core.read_model, data)
            check_free_memory(copied, sealed.manifest.name)
            with joined_bytes(parts) as moved:
                return ask(cannot, core.read_model, moved)
    finally:
        for memory in files.values():
            release(memory)


def _goes_with(path: str, graph: str) -> bool:
    """Whether a file belongs to a graph that is read by path."""
    each, main = PurePosixPath(path), PurePosixPath(graph)
    if main.name == _SAVED_MODEL:
        return each.is_relative_to(main.parent)
    return each.with_suffix("") == main.with_suffix("")  # Paddle keeps its weights so


def read_weights(sealed: SealedModel, graph: str) -> Memory:
    """Decrypt the .bin beside the .xml ``graph``; an empty storage where there is none."""
    weights = str(PurePosixPath(graph).with_suffix(".bin")).casefold()
    # Paths of a sealed model are unique under case folding.
    matches = [path for path in sealed.manifest.by_path if path.casefold() == weights]
    return read_file(sealed, matches[0]) if matches else Memory(0)


def read_file(sealed: SealedModel, path: str) -> Memory:
    """Decrypt a file of an open sealed model into memory that OpenVINO owns.

    Raises:
        KeymgmtError: there is too little memory.
        IntegrityError: damaged or forged; the memory was wiped.
    """
    size = sealed.manifest.file(path).size
    return filled(size, sealed.manifest.name, lambda room: sealed.read_into(path, room))
