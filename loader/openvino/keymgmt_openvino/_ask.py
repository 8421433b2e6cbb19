"""Calling OpenVINO, whose errors are pages of source locations, and shortening its errors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeVar

from keymgmt.errors import KeymgmtError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ask", "quoting", "reason_of"]

E = TypeVar("E", bound=KeymgmtError)
T = TypeVar("T")

# A line with the reason that is not the last line of OpenVINO's text, and the hint for it.
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
    """Call OpenVINO; an error of OpenVINO becomes a KeymgmtError of one sentence.

    The error keeps none of the arguments alive. The whole text of OpenVINO is a note of the error
    (``__notes__``).
    """
    try:
        return call(*arguments, **options)
    except RuntimeError as error:
        whole = str(error).strip()
    # Raised outside of the handler: the frames of a chained exception would hold the graph, and so
    # the weights. And an error in a variable of its own frame would be a cycle, which keeps all
    # frames until the garbage collector runs.
    del arguments, options
    raise _refusal(label, whole)


def _refusal(label: str, whole: str) -> KeymgmtError:
    reason, hint = reason_of(whole)
    return quoting(KeymgmtError(f"{label}: {reason}", hint=hint), whole)


def quoting(error: E, whole: str) -> E:
    """The same error, with the whole text of OpenVINO as a note."""
    error.add_note(f"OpenVINO said:\n{whole.strip()}")
    return error


def reason_of(whole: str) -> tuple[str, str | None]:
    """The reason in a text of OpenVINO, without source locations, and a hint if there is one."""
    for pattern, hint in _KNOWN:
        if match := pattern.search(whole):
            return match[0].strip(), hint
    lines = [line.strip() for line in whole.splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given"), None
