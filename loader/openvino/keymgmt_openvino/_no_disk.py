"""What would make OpenVINO write a model to a disk in plaintext; refused before one is opened.

A model cache can be asked for in many spellings and places, and a compiled model does not tell
whether it went into one. So OpenVINO's own text of the options is searched for the names, which
leaves nothing behind; and then a model of one node is compiled twice, as the real one would be: if
the second time it comes from a cache, there is one. (That one node is then in it, and no more.)
"""

from __future__ import annotations

import os
import re
import secrets
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import openvino as ov
from openvino import opset13 as op

from keymgmt.errors import ConfigError
from keymgmt_openvino._ask import news, quoting

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "check_core",
    "check_device",
    "check_environment",
    "check_options",
    "check_pipeline",
    "one_node",
    "text",
]

# https://docs.openvino.ai/2026/openvino-workflow/running-inference/optimize-inference/
# optimizing-latency/model-caching-overview.html; those from NPUW on are of NPUs and of GenAI, the
# last of its reader of GGUF, which writes the IR beside the file.
_WRITING: Final = re.compile(
    r"\b(CACHE_DIR|CACHE_MODE|CACHE_ENCRYPTION_CALLBACKS|WEIGHTS_PATH"
    r"|NPUW_CACHE_DIR|NPUW_DUMP_\w+|EXPORT_BLOB|BLOB_PATH|ENABLE_SAVE_OV_MODEL)\b"
)
# What a release build heeds. The first two: docs/debug_capabilities of OpenVINO's transformations
# (src/common/transformations); then the HETERO plugin, and oneDNN (Inspecting JIT Code).
_VARIABLES: Final = (
    "OV_ENABLE_SERIALIZE_TRACING",  # each pass's graph and weights, into the working directory
    "OV_ENABLE_VISUALIZE_TRACING",  # each pass's graph, with the values of small constants
    "OPENVINO_HETERO_VISUALIZE",  # the graph
    "ONEDNN_JIT_DUMP",  # the machine code made for it
    "DNNL_JIT_DUMP",
)
_NO_CACHE: Final = (
    "OpenVINO's model cache holds the weights in plaintext, even with its encryption callbacks; "
    "leave it off; for the CPU, keymgmt_openvino.load(cache=...) keeps a sealed one"
)


def check_environment() -> None:
    """ConfigError where a variable makes OpenVINO write out what it compiles."""
    if found := [name for name in _VARIABLES if os.environ.get(name)]:
        raise ConfigError(
            f"{' and '.join(found)} would make OpenVINO write the model to a disk",
            hint=f"unset {' '.join(found)}",
        )


def check_options(options: Mapping[str, Any]) -> None:
    """ConfigError where the options name what OpenVINO would write to a disk, at any depth."""
    for key, value in options.items():
        if value in ("", None, False):
            continue
        if found := _WRITING.search(f"{key} {text(value)}".upper()):
            raise ConfigError(f"{found[0]} is refused for a sealed model", hint=_NO_CACHE)


def text(value: object) -> str:
    """An option as OpenVINO reads it.

    Python's str gives two OVAny one text, and one streams.Num a text for each process.
    """
    try:
        return str(ov.OVAny(value).astype(str))
    except RuntimeError:  # of a kind that OpenVINO has no text for, such as GenAI's own
        return repr(value)


def check_core(core: ov.Core, *devices: str) -> None:
    """ConfigError where a Core says itself that it, or one of these devices, has a model cache."""
    for place in ((), *((device,) for device in devices)):
        try:
            cache = core.get_property(*place, "CACHE_DIR")
        except RuntimeError:  # a device without that property has no cache
            continue
        if cache:
            where = f"{place[0]} in the Core" if place else "the Core"
            raise ConfigError(f"CACHE_DIR is set on {where}: {cache}", hint=_NO_CACHE)


def check_device(core: ov.Core, device: str, options: Mapping[str, Any]) -> None:
    """Refuse what OpenVINO refuses for any model, and a model cache however it was asked for.

    Raises:
        ConfigError: no such device, options that it does not take, or a model cache.
    """
    try:
        cached = _keeps_cache(core, device, options)
    except RuntimeError as error:
        said, _ = news(str(error))
        refused = ConfigError(
            f"OpenVINO refuses these options for {device}: {said}", hint="correct ov_config"
        )
        try:
            core.compile_model(one_node(), device)
        except RuntimeError:
            devices = ", ".join(core.available_devices) or "none"
            refused = ConfigError(
                f"no device {device!r} here: {said}", hint=f"OpenVINO sees {devices}"
            )
        raise quoting(refused, str(error)) from None
    if cached:
        raise ConfigError(
            f"the Core or the options for {device} switch a model cache on", hint=_NO_CACHE
        )


def check_pipeline(device: str, options: Mapping[str, Any]) -> None:
    """Refuse the same among the options of a GenAI pipeline, which has a Core of its own.

    Some are for GenAI itself and no device takes them, so each is tried alone.
    """
    check_environment()
    check_options(options)
    core = ov.Core() if options else None
    for key, value in options.items():
        try:
            cached = _keeps_cache(core, device, {key: value})
        except (RuntimeError, TypeError):  # no device has such an option, so it is no cache's
            continue
        if cached:
            raise ConfigError(f"{key} switches a model cache on", hint=_NO_CACHE)


def _keeps_cache(core: ov.Core, device: str, options: Mapping[str, Any]) -> bool:
    """Whether a model compiled so goes into a cache; RuntimeError where OpenVINO refuses."""
    probe = one_node()
    core.compile_model(probe, device, dict(options))
    again = core.compile_model(probe, device, dict(options))
    return bool(again.get_property("LOADED_FROM_CACHE"))


def one_node() -> ov.Model:
    """A model that is in no cache yet."""
    x = op.parameter([1], np.float32)
    node = op.relu(x, name=f"keymgmt-{secrets.token_hex(16)}")
    return ov.Model([op.result(node)], [x], "keymgmt-looks-for-a-cache")
