"""Calls of OpenVINO, whose errors are pages of source locations, as errors of ours."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeVar

from keymgmt.errors import KeymgmtError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ask", "news", "quoting"]

E = TypeVar("E", bound=KeymgmtError)
T = TypeVar("T")

# The line that says what is wrong, where it is not the last one, and the way out.
_KNOWN: Final = (
    (
        re.compile(
            r"No conversion rule found for operations: .+|Cannot create \S+ layer .+"
            r"|OpenVINO does not support the following ONNX operations: .+"  # 2025.4
        ),
        (
            "this OpenVINO has no such operation: give a Core that has its extension "
            "(Core.add_extension) as core=, or install the OpenVINO that the model was made with"
        ),
    ),
    (
        re.compile(r"Unable to read the model: .+\.gguf.*", re.IGNORECASE),
        (
            "OpenVINO GenAI reads GGUF: keymgmt_openvino.genai.load_path_pipeline("
            "openvino_genai.LLMPipeline, path, file=...)"
        ),
    ),
    (
        re.compile(r"Unable to read the model\..*"),
        (
            "the file is damaged, or made by a newer OpenVINO: read it with Core.read_model where "
            "it was made, and seal it again"
        ),
    ),
)


def ask(label: str, call: Callable[..., T], *arguments: object, **options: object) -> T:
    """Call OpenVINO; its refusal is one sentence, and keeps nothing of the arguments alive.

    The whole of what OpenVINO said is a note of the error (``__notes__``).
    """
    try:
        return call(*arguments, **options)
    except RuntimeError as error:
        whole = str(error).strip()
    # Outside of the handler: a chained exception's frames would hold the graph, so the weights; and
    # an error that its own frame names would hold all frames until the collector comes by.
    del arguments, options
    raise _refusal(label, whole)


def _refusal(label: str, whole: str) -> KeymgmtError:
    said, hint = news(whole)
    return quoting(KeymgmtError(f"{label}: {said}", hint=hint), whole)


def quoting(error: E, whole: str) -> E:
    """The same error, and as a note of it the whole of what OpenVINO said."""
    error.add_note(f"OpenVINO said:\n{whole.strip()}")
    return error


def news(whole: str) -> tuple[str, str | None]:
    """What an error of OpenVINO says after the places in its source, and the way out if known."""
    for pattern, hint in _KNOWN:
        if found := pattern.search(whole):
            return found[0].strip(), hint
    lines = [line.strip() for line in whole.splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given"), None
