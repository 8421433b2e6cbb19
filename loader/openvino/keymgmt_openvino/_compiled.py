"""The compiled model, kept for this device as by OpenVINO's own cache, but encrypted.

``export_model`` gives the compiled graph with its weights; it is sealed to this device
(``SealedModel.device_file``), and ``import_model`` takes it from memory without a copy. It is bound
to manifest.json, the processor, the device's properties, OpenVINO's version, and the options. A
file that is bound to something else, or is damaged, is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import openvino as ov

from keymgmt.errors import ConfigError, KeymgmtError
from keymgmt.loading import check_free_memory, wipe
from keymgmt_openvino._ask import quoting, reason_of
from keymgmt_openvino._memory import filled
from keymgmt_openvino._no_disk import one_node, text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from keymgmt import SealedModel
    from keymgmt.loading import DeviceFile
    from keymgmt_openvino._memory import Memory

__all__ = ["check_exports", "compiled_file", "keep_compiled", "read_compiled"]

log = logging.getLogger("keymgmt.openvino")

_READ_ONLY: Final = (errno.EROFS, errno.EACCES, errno.EPERM)
_DEVICE: Final = re.compile(r"[\w.]+")  # each name in HETERO:GPU.1,CPU
# With these variables OpenVINO and its oneDNN use fewer of the processor's instructions; a compiled
# model can be imported only for the same instructions.
_FEWER: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OV_CPU_MAX_ISA")


def check_exports(core: ov.Core, device: str) -> None:
    """ConfigError if a device cannot export a compiled model and import it again."""
    with contextlib.suppress(RuntimeError):  # HETERO:CPU has no properties, and is tried below
        if "EXPORT_IMPORT" in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
            return
    try:
        core.import_model(core.compile_model(one_node(), device).export_model(), device)
    except RuntimeError as error:
        reason, _ = reason_of(str(error))
        refused = ConfigError(
            f"a compiled model is not kept for {device}, which does not export it: {reason}",
            hint="name the device itself, such as CPU, or leave cache= out",
        )
        raise quoting(refused, str(error)) from None


def compiled_file(
    sealed: SealedModel,
    graph: str | None,
    folder: str | os.PathLike[str],
    core: ov.Core,
    device: str,
    options: Mapping[str, Any],
) -> DeviceFile | None:
    """The file of a model, or one graph of it, that is compiled for a device with these options.

    None, with a warning, if the file cannot be written, as on a read-only disk.

    Raises:
        ConfigError: a folder that others can use.
    """
    chosen = sorted((str(key), text(value)) for key, value in options.items())
    bound_to = {
        "openvino": ov.get_version(),
        "processor": [platform.machine(), _processor(), *map(os.environ.get, _FEWER)],
        # The properties also tell what was set on the Core.
        "devices": {each: _properties(core, each) for each in _DEVICE.findall(device)},
        "options": chosen,
    }
    name = sealed.manifest.name
    # A file for each set of options; the next release of a model replaces the file of the last one.
    kind = hashlib.sha256(json.dumps([graph, device, chosen]).encode()).hexdigest()[:16]
    bound = json.dumps(bound_to, sort_keys=True).encode()
    try:
        return sealed.device_file(Path(folder), f"{name}-{kind}.compiled", bound)
    except ConfigError as error:
        why = error.__cause__
        if not (isinstance(why, OSError) and why.errno in _READ_ONLY):
            raise
        log.warning("%s; the model is compiled again", error)
        return None


def read_compiled(file: DeviceFile) -> Memory | None:
    """The compiled model for ``import_model``; None if it is missing, or damaged (a warning)."""
    try:
        with file.open() or contextlib.nullcontext() as reader:
            if reader is None:
                return None
            return filled(reader.size, file.path.name, reader.read_into)
    except (KeymgmtError, OSError) as error:  # damaged, or too large for the memory
        log.warning("%s cannot be used and is replaced: %s", file.path, type(error).__name__)
        return None


def keep_compiled(file: DeviceFile, compiled: ov.CompiledModel, size: int) -> None:
    """Seal a compiled model; a failure is only a warning, as the model is loaded already.

    ``size`` is that of the sealed model in bytes.
    """
    try:
        check_free_memory(2 * size, file.path.name)  # f16 weights are f32 by now
        with compiled.export_model().getbuffer() as content:
            try:
                file.write(content)
            finally:
                wipe(content)
    except (KeymgmtError, OSError, RuntimeError, MemoryError, ValueError, SystemError) as error:
        # Without memory, OpenVINO gives a closed stream (ValueError), or returns from a failed call
        # without an exception (SystemError).
        # Only the text is logged: a log that keeps its records would keep the error, its frames,
        # and so the model.
        log.warning("the compiled model is not kept in %s: %s", file.path, reason_of(str(error))[0])
        log.debug("the whole reason: %s", str(error))


def _properties(core: ov.Core, device: str) -> dict[str, str]:
    properties = {}
    try:
        names = core.get_property(device, "SUPPORTED_PROPERTIES")
    except RuntimeError:  # not a device, but a number in the name, as in "MULTI:GPU.1(4)"
        return {}
    for name in names:
        try:
            properties[name] = str(core.get_property(device, name))
        except (RuntimeError, TypeError):  # a property of a type that Python does not have
            continue
    return properties


def _processor() -> str:
    """The instruction sets of the first processor by the kernel; empty if it tells none."""
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123 - not a file on a disk
            lines = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return ""
    return lines[0].partition(":")[2].strip() if lines else ""
