"""Files of an open sealed model in memory, as runtimes take them."""

from __future__ import annotations

import contextlib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from keymgmt._crypto.memory import PrivateMemory, private_bytes
from keymgmt._system.free_memory import check_free_memory
from keymgmt._verbs.onnx import CONVERT, External, outside_path
from keymgmt.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from keymgmt._verbs.open import SealedModel

__all__ = ["choose_file", "file_bytes", "file_memory", "outside_part"]


def choose_file(
    sealed: SealedModel, file: str | None, suffixes: Collection[str], *, label: str, hint: str
) -> str:
    """The path of the file that a loader reads: ``file``, else the main one, else the only one.

    Args:
        sealed: an open model.
        file: the path that the caller gave, or None.
        suffixes: endings of the names of such files, in lower case.
        label: the word for such a file in errors.
        hint: the hint of the error where there is no such file.

    Raises:
        FormatError: there is no such file, there are several, or ``file`` is not in the model.
    """
    manifest = sealed.manifest
    if file is not None:
        if file not in manifest.by_path:
            raise FormatError(
                f"{manifest.name} has no file {file!r}", hint=f"it has {_listed(manifest.by_path)}"
            )
        return file
    candidates = [
        path for path in manifest.by_path if PurePosixPath(path).suffix.lower() in suffixes
    ]
    if manifest.main in candidates:
        return manifest.main
    if len(candidates) > 1:
        raise FormatError(
            f"{manifest.name} has {len(candidates)} {label}s",
            hint=f"say which: file={_listed(candidates)}",
        )
    if not candidates:
        raise FormatError(f"{manifest.name} ({manifest.kind}) has no {label}", hint=hint)
    return candidates[0]


def _listed(paths: Collection[str]) -> str:
    first = list(paths)[:10]
    return ", ".join(first) + (f", and {len(paths) - 10} more" if len(paths) > 10 else "")


@contextlib.contextmanager
def file_bytes(
    sealed: SealedModel, path: str, *, copies: int = 1
) -> Iterator[tuple[bytes, memoryview]]:
    """Decrypt a file into ``bytes``, which are wiped at the end; memory for copies is checked."""
    size = sealed.manifest.file(path).size
    check_free_memory(copies * size, sealed.manifest.name)
    with private_bytes(size) as (data, room):
        sealed.read_into(path, room)
        yield data, room


def file_memory(sealed: SealedModel, path: str) -> PrivateMemory:
    """Decrypt a file into memory that is wiped when the last view of it is released.

    For an empty file the memory is one byte.

    Raises:
        KeymgmtError: there is too little memory.
        IntegrityError: damaged or forged; the memory was wiped.
    """
    size = sealed.manifest.file(path).size
    check_free_memory(size, sealed.manifest.name)
    memory = PrivateMemory(max(size, 1))
    sealed.read_into(path, memoryview(memory)[:size])
    return memory


def outside_part(
    sealed: SealedModel, model_path: str, tensor: External, label: str
) -> tuple[str, int]:
    """The place in the sealed model of a tensor that the ONNX file ``model_path`` keeps outside.

    Returns:
        The path of its file, and its length in bytes, which ``tensor`` may leave open.

    Raises:
        FormatError: it is in no file of the model, or goes beyond the end of the file.
    """
    file = outside_path(model_path, tensor.location, label)
    if file not in sealed.manifest.by_path:
        raise FormatError(f"{label} has tensors in {file}, which is no file of it", hint=CONVERT)
    size = sealed.manifest.file(file).size
    length = tensor.length or size - tensor.offset  # 0 is "all" to runtimes too
    if length <= 0 or tensor.offset + length > size:
        raise FormatError(f"{label} has tensors beyond the end of {file}")
    return file, length
