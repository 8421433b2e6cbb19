"""What is to be sealed: the files of a plain model, what kind it is, and which file comes first."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keymgmt._names import is_key
from keymgmt.errors import ConfigError, FormatError
from keymgmt.sealed.paths import check_paths, path_problem

__all__ = ["Source", "find_source"]

_GENAI: Final = ("openvino_model.xml", "openvino_language_model.xml")
_TOKENIZER: Final = "openvino_tokenizer.xml"


@dataclass(frozen=True)
class Source:
    """A plain model on disk.

    Attributes:
        name: a model name made from the file's or folder's.
        kind: ``openvino-ir``, ``openvino-genai``, ``onnx`` or ``files``.
        main: the file that a loader reads first, or None.
        files: path in the model -> file on disk, sorted by path.
    """

    name: str
    kind: str
    main: str | None
    files: dict[str, Path]

    @property
    def metadata(self) -> dict[str, str]:
        """What a tool should know beside kind and main: the tokenizer of a language model."""
        has_one = self.kind == "openvino-genai" and _TOKENIZER in self.files
        return {"tokenizer": _TOKENIZER} if has_one else {}


def find_source(path: str | os.PathLike[str]) -> Source:
    """Look at an IR's ``.xml``, an ``.onnx``, or a folder.

    Raises:
        ConfigError: missing, unreadable, an .xml without its .bin, an empty folder, a link or
            device in it, or a file name that a sealed model cannot have.
    """
    source = Path(path)
    try:
        mode = source.stat().st_mode
    except OSError as error:
        raise ConfigError(f"cannot read the model {source}: {error.strerror}") from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        # Opening a fifo would wait for its other end for ever.
        raise ConfigError(f"{source} is neither a regular file nor a folder")
    if stat.S_ISDIR(mode):
        files = _scan(source)
        kind, main = _kind(list(files))
    elif source.suffix == ".xml":
        weights = source.with_suffix(".bin")
        if not weights.is_file():
            raise ConfigError(
                f"{source} has no weights: {weights.name} is not beside it",
                hint="an OpenVINO IR is a pair of .xml and .bin; seal them together",
            )
        files = {source.name: source, weights.name: weights}
        kind, main = "openvino-ir", source.name
    elif source.suffix == ".onnx":
        files, kind, main = {source.name: source}, "onnx", source.name
    else:
        raise ConfigError(
            f"{source} is neither an IR's .xml, nor an .onnx, nor a folder",
            hint="convert it to OpenVINO IR first (openvino.convert_model, openvino.save_model), "
            "or put the files in a folder and seal that",
        )
    files = dict(sorted(files.items(), key=lambda item: item[0].encode()))
    _check(source, files)
    return Source(_model_name(source.absolute()), kind, main, files)


def _scan(folder: Path) -> dict[str, Path]:
    found = {}
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        for name in [*folders, *names]:
            path = Path(parent) / name
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise ConfigError(
                    f"{path} is a symbolic link, which a sealed model does not have",
                    hint="copy the folder with its links followed: cp -rL",
                )
            if not _is_text(name):
                raise ConfigError(f"the file name {name!r} is not UTF-8", hint="rename it")
            if stat.S_ISREG(mode):
                found[path.relative_to(folder).as_posix()] = path
            elif not stat.S_ISDIR(mode):
                raise ConfigError(f"{path} is neither a regular file nor a folder")
    if not found:
        raise ConfigError(f"the folder {folder} has no files to seal")
    return found


def _is_text(name: str) -> bool:
    # Python shows bytes that are no UTF-8 as lone surrogates (PEP 383).
    return not any("\udc80" <= char <= "\udcff" for char in name)


def _refuse(error: OSError) -> None:
    raise ConfigError(f"cannot read the folder {error.filename}: {error.strerror}") from error


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


def _check(source: Path, files: dict[str, Path]) -> None:
    for path, file in files.items():
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
