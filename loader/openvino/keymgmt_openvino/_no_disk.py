"""Refusing everything that would make OpenVINO write a model to a disk in plaintext.

A model cache can be configured in many spellings and places, and a compiled model does not tell
whether it went into a cache. So OpenVINO's own text of the options is first searched for known
names; and then a model of one node is compiled twice with the same options: if it comes from a
cache the second time, there is a cache. (Then this one node is in the cache, and nothing else.)
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
from keymgmt_openvino._ask import quoting, reason_of

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
# Variables that a release build of OpenVINO reads. The first two are in docs/debug_capabilities of
# its transformations (src/common/transformations); the others are of the HETERO plugin and of
# oneDNN ("Inspecting JIT Code").
_VARIABLES: Final = (
    "OV_ENABLE_SERIALIZE_TRACING",  # each pass's graph and weights, into the working directory
    "OV_ENABLE_VISUALIZE_TRACING",  # each pass's graph, with the values of small constants
    "OPENVINO_HETERO_VISUALIZE",  # the graph
    "ONEDNN_JIT_DUMP",  # the generated machine code
    "DNNL_JIT_DUMP",
)
_NO_CACHE: Final = (
    "OpenVINO's model cache holds the weights in plaintext, even with its encryption callbacks; "
    "leave it off; for the CPU, keymgmt_openvino.load(cache=...) keeps a sealed cache"
)


def check_environment() -> None:
    """ConfigError if an environment variable makes OpenVINO write what it compiles to a disk."""
    if names := [name for name in _VARIABLES if os.environ.get(name)]:
        raise ConfigError(
            f"{' and '.join(names)} would make OpenVINO write the model to a disk",
            hint=f"unset {' '.join(names)}",
        )


def check_options(options: Mapping[str, Any]) -> None:
    """ConfigError if an option, at any depth, would make OpenVINO write to a disk."""
    for key, value in options.items():
        if value in ("", None, False):
            continue
        if match := _WRITING.search(f"{key} {text(value)}".upper()):
            raise ConfigError(f"{match[0]} is refused for a sealed model", hint=_NO_CACHE)


def text(value: object) -> str:
    """An option in OpenVINO's own text.

    Python's ``str`` would not do: different OVAny objects have the same text, and the text of a
    ``streams.Num`` differs from process to process.
    """
    try:
        return str(ov.OVAny(value).astype(str))
    except RuntimeError:  # a type for which OpenVINO has no text, such as those of GenAI
        return repr(value)


def check_core(core: ov.Core, *devices: str) -> None:
    """ConfigError if a Core, or one of these devices in it, has the property CACHE_DIR set."""
    for device in ((), *((device,) for device in devices)):
        try:
            cache = core.get_property(*device, "CACHE_DIR")
        except RuntimeError:  # a device without this property has no cache
            continue
        if cache:
            where = f"{device[0]} in the Core" if device else "the Core"
            raise ConfigError(f"CACHE_DIR is set on {where}: {cache}", hint=_NO_CACHE)


def check_device(core: ov.Core, device: str, options: Mapping[str, Any]) -> None:
    """Refuse options that OpenVINO refuses for any model, and a model cache in any spelling.

    Raises:
        ConfigError: there is no such device, the device refuses an option, or there is a cache.
    """
    try:
        cached = _keeps_cache(core, device, options)
    except RuntimeError as error:
        reason, _ = reason_of(str(error))
        refused = ConfigError(
            f"OpenVINO refuses these options for {device}: {reason}", hint="correct ov_config"
        )
        try:
            core.compile_model(one_node(), device)
        except RuntimeError:
            devices = ", ".join(core.available_devices) or "none"
            refused = ConfigError(
                f"no device {device!r} here: {reason}", hint=f"OpenVINO sees {devices}"
            )
        raise quoting(refused, str(error)) from None
    if cached:
        raise ConfigError(
            f"the Core or the options for {device} switch a model cache on", hint=_NO_CACHE
        )


def check_pipeline(device: str, options: Mapping[str, Any]) -> None:
    """Refuse the same options for a GenAI pipeline, which has a Core of its own.

    Some options are for GenAI itself, and devices refuse them, so each option is tried alone.
    """
    check_environment()
    check_options(options)
    core = ov.Core() if options else None
    for key, value in options.items():
        try:
            cached = _keeps_cache(core, device, {key: value})
        except (RuntimeError, TypeError):  # not an option of a device, so it is not for its cache
            continue
        if cached:
            raise ConfigError(f"{key} switches a model cache on", hint=_NO_CACHE)


def _keeps_cache(core: ov.Core, device: str, options: Mapping[str, Any]) -> bool:
    """Whether a compiled model goes into a cache; RuntimeError if OpenVINO refuses the options."""
    probe = one_node()
    core.compile_model(probe, device, dict(options))
    again = core.compile_model(probe, device, dict(options))
    return bool(again.get_property("LOADED_FROM_CACHE"))


def one_node() -> ov.Model:
    """A model with a random name, so that no cache has it yet."""
    x = op.parameter([1], np.float32)
    node = op.relu(x, name=f"keymgmt-{secrets.token_hex(16)}")
    return ov.Model([op.result(node)], [x], "keymgmt-looks-for-a-cache")
