"""The model of the demo: magika's classifier of file types (Apache-2.0, from PyPI).

Only the data files of its package are used; the package itself is never imported.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import openvino as ov

from keymgmt.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MODEL", "convert", "features", "labels", "model_directory"]

MODEL: Final = "standard_v3_3"

# From its config.min.json: the model looks at the first and the last bytes of a file.
_ENDS: Final = 1024
_BLOCK: Final = 4096
_PADDING: Final = 256


def model_directory() -> Path:
    """Where the installed package keeps the model; ConfigError if it is not installed."""
    spec = importlib.util.find_spec("magika")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the demo's model is not installed", hint='pip install "keymgmt[demo]"')
    return Path(spec.submodule_search_locations[0]) / "models" / MODEL


def convert(target: Path) -> None:
    """Write the ONNX model as OpenVINO IR to ``target`` (.xml) and the .bin beside it."""
    ov.save_model(
        ov.Core().read_model(model_directory() / "model.onnx"), target, compress_to_fp16=False
    )


def labels() -> list[str]:
    """The file types, in the order of the model's output."""
    config: dict[str, Any] = json.loads((model_directory() / "config.min.json").read_text())
    return list(config["target_labels_space"])


def features(path: Path) -> NDArray[np.int32]:
    """The model's input for one file: int32 [1, 2048], its two ends without outer white space."""
    with path.open("rb") as file:
        head = file.read(_BLOCK).lstrip()[:_ENDS]
        file.seek(max(0, path.stat().st_size - _BLOCK))
        tail = file.read(_BLOCK).rstrip()[-_ENDS:]
    row = np.full(2 * _ENDS, _PADDING, np.int32)
    row[: len(head)] = np.frombuffer(head, np.uint8)
    row[len(row) - len(tail) :] = np.frombuffer(tail, np.uint8)
    return row[np.newaxis]
