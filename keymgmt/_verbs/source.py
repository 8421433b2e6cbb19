"""The plain model to seal: its files, its kind, and the file that a loader reads first."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keymgmt._providers.names import is_key
from keymgmt._system.files import from_system, to_system
from keymgmt._verbs.onnx import CONVERT, external_files
from keymgmt._verbs.plain_files import PlainFile, doubtful, list_files
from keymgmt.errors import ConfigError, FormatError
from keymgmt.sealed.paths import check_paths, path_problem

__all__ = ["GRAPHS", "Source", "find_source", "why_not_loaded"]

log = logging.getLogger("keymgmt")

# Endings that OpenVINO's Core.read_model knows.
GRAPHS: Final = (".xml", ".onnx", ".tflite", ".pdmodel", ".pb", ".gguf")

_GENAI: Final = ("openvino_model.xml", "openvino_language_model.xml")
_TOKENIZER: Final = "openvino_tokenizer.xml"
_PIPELINE: Final = {_TOKENIZER, "model_index.json"}  # of GenAI folders, which it opens by path
_SAVED_MODEL: Final = "saved_model.pb"  # is of a folder
_OF_OTHERS: Final = (".safetensors", "tokenizer.json")  # of keymgmt_safetensors, keymgmt_tokenizers
_KINDS: Final = {".xml": "openvino-ir", ".onnx": "onnx"}


@dataclass(frozen=True)
class Source:
    """A plain model on disk, and the facts about it that may surprise the person who seals it.

    Attributes:
        path: where it is.
        name: a model name, derived from the name of the file or folder.
        kind: ``openvino-ir``, ``openvino-genai``, ``onnx`` or ``files``.
        main: the file that a loader reads first, or None.
        files: path in the model -> the plain file, sorted by path.
        beside: paths that a model that is one file names, and are sealed with it; a link with its
            target.
        doubtful: files and folders that look like secrets or leftovers, and are sealed.
        left_out: what the ignore file leaves out.
        empty: folders without a file, which a sealed model does not have.
    """

    path: Path
    name: str
    kind: str
    main: str | None
    files: dict[str, PlainFile]
    beside: tuple[str, ...]
    doubtful: tuple[str, ...]
    left_out: tuple[str, ...]
    empty: tuple[str, ...]

    def __fspath__(self) -> str:
        """Its path, so that functions that take a path also take a ``Source``."""
        return os.fspath(self.path)

    @property
    def metadata(self) -> dict[str, str]:
        """Facts for tools besides kind and main: the tokenizer of a language model."""
        has_one = self.kind == "openvino-genai" and _TOKENIZER in self.files
        return {"tokenizer": _TOKENIZER} if has_one else {}


def find_source(path: str | os.PathLike[str]) -> Source:
    """Look at a folder, or a graph that OpenVINO reads (``GRAPHS``) with what belongs to it.

    A ``Source`` is returned as it is. Reasons why an .onnx file cannot be loaded later are logged
    as warnings.

    Raises:
        ConfigError: missing, unreadable, a graph without its weights, a folder that is empty or
            sealed already, a link or device in it, or a file name that a sealed model cannot have.

    Files that match a line of ``.keymgmtignore`` in the folder are left out, and that file too. A
    line is a shell pattern (fnmatch) for a name at any depth or, with a slash, for a path from the
    folder.
    """
    if isinstance(path, Source):
        return path
    source = Path(path)
    try:
        mode = source.stat().st_mode
    except OSError as error:
        raise ConfigError(f"cannot read the model {source}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"cannot read the model {source}: its name has a NUL") from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        # Opening a fifo would wait for its other end for ever.
        raise ConfigError(f"{source} is neither a regular file nor a folder")
    beside: list[str] = []
    targets: list[str] = []
    left_out: list[str] = []
    empty: list[str] = []
    if stat.S_ISDIR(mode):
        files, left_out, empty = list_files(source)
        kind, main = _kind(list(files))
    else:
        kind, main = _KINDS.get(source.suffix.lower(), "files"), from_system(source.name)
        found = _beside(source, main)
        files = {path: PlainFile.of(file, file.stat()) for path, file in found.items()}
        for path in sorted(found.keys() - {main}):
            target = found[path].resolve() if found[path].is_symlink() else None
            beside.append(f"{path}, a link to {target}" if target else path)
            targets += [from_system(target.as_posix())] if target else []
    files = dict(sorted(files.items(), key=lambda item: item[0].encode()))
    _check(source, files)
    for path, file in files.items():
        if path.lower().endswith(".onnx"):
            _look_through(path, file, files)
    return Source(
        source,
        _model_name(source.absolute()),
        kind,
        main,
        files,
        tuple(beside),
        doubtful([*files, *targets]),
        tuple(sorted(left_out)),
        tuple(sorted(empty)),
    )


def _beside(source: Path, name: str) -> dict[str, Path]:
    """A model that is one file, with the files that it needs: path in the sealed model -> file."""
    suffix = source.suffix.lower()
    found = {name: source}
    if suffix == ".xml":
        weights = source.with_suffix(".BIN" if source.suffix.isupper() else ".bin")
        if not weights.is_file():
            weights = source.with_suffix(".bin")
        if weights.is_file():
            found[from_system(weights.name)] = weights
        elif not _has_no_constants(source):
            raise ConfigError(
                f"{source} has no weights: {weights.name} is not beside it",
                hint="an OpenVINO IR is a pair of .xml and .bin; seal them together",
            )
    elif suffix == ".onnx":
        file = PlainFile.of(source, source.stat())
        # What is wrong in it is said of all files alike, by _look_through.
        with file.open() as descriptor, contextlib.suppress(FormatError):
            for path in external_files(descriptor, name, name):
                found[path] = source.parent / to_system(path)
        if missing := [path for path, file in found.items() if not file.is_file()]:
            raise ConfigError(
                f"{source} has tensors in {min(missing)}, which is not beside it",
                hint="fetch all files of the model, and seal them together",
            )
    elif suffix == ".pdmodel":
        weights = source.with_suffix(".pdiparams")
        if weights.is_file():
            found[from_system(weights.name)] = weights
    elif suffix not in (*GRAPHS, ".safetensors") or source.name == _SAVED_MODEL:
        raise ConfigError(
            f"{source} is neither an IR's .xml, nor an .onnx, .gguf or .safetensors, nor a folder",
            hint="put it in a folder, with what belongs to it, and seal that; for OpenVINO convert "
            "it first (openvino.convert_model, openvino.save_model with compress_to_fp16=False)",
        )
    return found


def _has_no_constants(graph: Path) -> bool:
    """Whether an .xml is an IR whose .bin would be empty, so that it may be missing."""
    try:
        content = graph.read_bytes()
    except OSError:  # which is said where it is opened to be sealed
        return False
    return b"<layer " in content and b'type="Const"' not in content


def _look_through(path: str, file: PlainFile, files: dict[str, PlainFile]) -> None:
    """Warn of everything in an ONNX file that would prevent loading it later."""
    try:
        with file.open() as descriptor:
            missing = external_files(descriptor, path, path) - files.keys()
    except FormatError as error:
        log.warning("%s; it is sealed, and keymgmt_openvino.load will refuse it", error)
    else:
        if missing:
            log.warning(
                "%s has tensors in %s, which is not in the folder; it is sealed, and "
                "keymgmt_openvino.load will refuse it",
                path,
                min(missing),
            )


def why_not_loaded(kind: str, main: str | None, paths: Collection[str]) -> str | None:
    """Why ``keymgmt_openvino.load`` refuses a model whatever its files contain, and the way out.

    None also for a model that another loader of ours reads.
    """
    graphs = [path for path in paths if path.lower().endswith(GRAPHS)]
    if main is not None or kind != "files" or len(graphs) == 1 or _PIPELINE & set(paths):
        return None
    if not graphs and any(path.lower().endswith(_OF_OTHERS) for path in paths):
        return None
    if graphs:
        return f"it has {len(graphs)} graphs: load(..., file={graphs[0]!r}) says which"
    return (
        "OpenVINO reads none of its files by its name, so keymgmt_openvino.load will refuse it: "
        f"{CONVERT}. Programs that open it by path get it with keymgmt.mount"
    )


def _kind(paths: list[str]) -> tuple[str, str | None]:
    present = set(paths)
    for main in _GENAI:
        if main in present and (_TOKENIZER in present or "config.json" in present):
            return "openvino-genai", main
    models = [p for p in paths if p.endswith(".xml") and f"{p[:-4]}.bin" in present]
    if len(models) == 1:
        return "openvino-ir", models[0]
    onnx = [p for p in paths if p.endswith(".onnx")]
    if not models and len(onnx) == 1:
        return "onnx", onnx[0]
    return "files", None


def _check(source: Path, files: dict[str, PlainFile]) -> None:
    for path, plain in files.items():
        file = plain.path
        if problem := path_problem(path):
            raise ConfigError(f"{file} cannot be in a sealed model: {problem}", hint="rename it")
        if not os.access(file, os.R_OK):
            raise ConfigError(f"cannot read {file}: permission denied")
    try:
        check_paths(files)
    except FormatError as error:
        raise ConfigError(f"{source} cannot be sealed: {error}", hint="rename a file") from error


def _model_name(path: Path) -> str:
    stem = path.stem if path.is_file() else path.name
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9._-]+|\.{2,}", "-", plain)[:64].strip("._-")
    return name if is_key(name) else "model"
