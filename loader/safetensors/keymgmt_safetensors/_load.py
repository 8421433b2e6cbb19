"""From a sealed .safetensors file to tensors, without a copy."""

from __future__ import annotations

import json
import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal

import keymgmt
from keymgmt.errors import ConfigError, FormatError
from keymgmt.loading import check_free_memory, choose_file, file_memory
from keymgmt_safetensors._header import Entry, read_header

if TYPE_CHECKING:
    from collections.abc import Callable

    from keymgmt import Config, SealedModel
    from keymgmt.loading import PrivateMemory

__all__ = ["load"]

_SUFFIX: Final = ".safetensors"
_INDEX: Final = ".safetensors.index.json"
_MAX_INDEX: Final = 100 << 20


def _names(text: str) -> dict[str, str]:
    return dict(zip(text.split()[::2], text.split()[1::2], strict=True))


# Types in a header -> their names in numpy and in torch; numpy does not have the other types.
_NUMPY: Final = _names(
    "F64 <f8 F32 <f4 F16 <f2 C64 <c8 BOOL ? I8 <i1 I16 <i2 I32 <i4 I64 <i8 "
    "U8 <u1 U16 <u2 U32 <u4 U64 <u8"
)
_TORCH: Final = _names(
    "F64 float64 F32 float32 F16 float16 BF16 bfloat16 C64 complex64 BOOL bool "
    "F8_E4M3 float8_e4m3fn F8_E5M2 float8_e5m2 I8 int8 I16 int16 I32 int32 I64 int64 "
    "U8 uint8 U16 uint16 U32 uint32 U64 uint64"
)


def load(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    file: str | None = None,
    framework: Literal["np", "pt"] = "np",
) -> dict[str, Any]:
    """Open a sealed model, and give its tensors as ``safetensors.numpy.load_file`` does.

    Each file is decrypted once, into memory that is out of core dumps and, within the limit of the
    process, kept from swap; the tensors are views of it, and may be written to. The memory is wiped
    when the last tensor, and the last view of a tensor, is gone.

    Args:
        path: the sealed model.
        name: the model that is expected; another one is refused.
        keys: a loaded config, or the path of one; else the one that ``keymgmt.load_config`` finds.
        file: a .safetensors file, or an index (.safetensors.index.json) with all files that it
            names; by default the only index of the model, or else the only .safetensors file.
        framework: ``np`` for numpy arrays, ``pt`` for torch tensors on the CPU.

    Returns:
        Name -> numpy array or torch tensor.

    Raises:
        FormatError: there is no such file, or it is not valid.
        ConfigError: torch is not installed, or the framework lacks the type of a tensor.
        SealedModelError, CannotUnlock, ConfigError: as ``keymgmt.open``.
        KeymgmtError: too little memory.
    """
    view = _views(framework)
    tensors: dict[str, Any] = {}
    with keymgmt.open(path, name=name, keys=keys) as sealed:
        files = _files(sealed, file)
        total = sum(sealed.manifest.file(each).size for each in files)
        check_free_memory(total, sealed.manifest.name)
        for each in files:
            label = f"{each} of {sealed.manifest.name}"
            memory = file_memory(sealed, each)
            for tensor, entry in read_header(
                memory, sealed.manifest.file(each).size, label
            ).items():
                if tensor in tensors:
                    raise FormatError(f"{label} has the tensor {tensor!r}, which another file has")
                try:
                    tensors[tensor] = view(memory, entry, f"{tensor!r} in {label}")
                except (ValueError, TypeError, OverflowError, RuntimeError):  # too many dimensions
                    raise FormatError(f"{label} has no possible shape for {tensor!r}") from None
    return tensors


def _files(sealed: SealedModel, file: str | None) -> list[str]:
    if file is None:
        indexes = [each for each in sealed.manifest.by_path if each.endswith(_INDEX)]
        file = indexes[0] if len(indexes) == 1 else None
    hint = "seal a .safetensors file, or a folder with it; other formats have their own loaders"
    chosen = choose_file(sealed, file, (_SUFFIX,), label=f"{_SUFFIX} file", hint=hint)
    if not chosen.endswith(_INDEX):
        return [chosen]
    label = f"{chosen} of {sealed.manifest.name}"
    if sealed.manifest.file(chosen).size > _MAX_INDEX:
        raise FormatError(f"{label} is too long for an index")
    try:
        names = set(json.loads(sealed.read(chosen))["weight_map"].values())
        paths = sorted(str(PurePosixPath(chosen).parent / each) for each in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{label} is not an index of tensors") from None
    if missing := [each for each in paths if each not in sealed.manifest.by_path]:
        raise FormatError(f"{label} names {missing[0]!r}, which is not a file of the model")
    return paths


def _views(framework: str) -> Callable[[PrivateMemory, Entry, str], Any]:
    """A function that makes a tensor as a view of a part of a memory."""
    if framework == "np":
        import numpy as np

        def array(memory: PrivateMemory, entry: Entry, label: str) -> Any:
            kind = np.dtype(_known(_NUMPY, entry, label, "numpy", 'take framework="pt"'))
            return np.ndarray(entry.shape, kind, memory, entry.start)

        return array
    if framework != "pt":
        raise ConfigError(f"no framework {framework!r}", hint='there are "np" and "pt"')
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"torch is not installed ({error})", hint='install it, or take framework="np"'
        ) from error

    def tensor(memory: PrivateMemory, entry: Entry, label: str) -> Any:
        kind = getattr(torch, _known(_TORCH, entry, label, "torch", 'take framework="np"'), None)
        if kind is None:
            raise ConfigError(f"this torch has no type for {label}", hint="take a newer one")
        if entry.count == 0:
            return torch.empty(entry.shape, dtype=kind)
        flat = torch.frombuffer(memory, dtype=kind, count=entry.count, offset=entry.start)
        return flat.reshape(entry.shape)

    return tensor


def _known(types: dict[str, str], entry: Entry, label: str, library: str, hint: str) -> str:
    if entry.kind not in types:
        raise ConfigError(f"{library} has no type {entry.kind} for {label}", hint=hint)
    return types[entry.kind]
