"""The compiled model, kept for this device: what OpenVINO's own cache does, without the plaintext.

``export_model`` gives the compiled graph with its weights; it is sealed to this device
(``SealedModel.device_file``), and ``import_model`` takes it from memory without a copy. It is bound
to manifest.json, the processor, the device's properties, OpenVINO's version, and the options. What
is not bound to the same, or is damaged, is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import openvino as ov

from keymgmt.backend import wipe
from keymgmt.errors import KeymgmtError
from keymgmt.room import check_room
from keymgmt_openvino._memory import Memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from keymgmt import SealedModel
    from keymgmt.device_files import DeviceFile

__all__ = ["compiled_file", "keep_compiled", "read_compiled"]

log = logging.getLogger("keymgmt.openvino")

# By these oneDNN uses fewer instructions than there are; OpenVINO imports for the same ones only.
_FEWER: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def compiled_file(
    sealed: SealedModel,
    folder: str | os.PathLike[str],
    core: ov.Core,
    device: str,
    options: Mapping[str, Any],
) -> DeviceFile:
    """The file of a model that is compiled for a device with these options.

    Raises:
        ConfigError: a folder that others can use.
    """
    chosen = sorted((str(key), _text(value)) for key, value in options.items())
    bound_to = {
        "openvino": ov.get_version(),
        "processor": [platform.machine(), _processor(), *map(os.environ.get, _FEWER)],
        "device": _properties(core, device),  # its name, and what was set on the Core
        "options": chosen,
    }
    name = sealed.manifest.name
    # One for each set of options; the next release of a model replaces that of the last one.
    kind = hashlib.sha256(json.dumps([device, chosen]).encode()).hexdigest()[:16]
    return sealed.device_file(
        Path(folder), f"{name}-{kind}.compiled", json.dumps(bound_to, sort_keys=True).encode()
    )


def _text(value: object) -> str:
    # As OpenVINO reads it. Python's str gives two OVAny one text, and one streams.Num a text for
    # each process.
    return str(ov.OVAny(value).astype(str))


def read_compiled(file: DeviceFile) -> Memory | None:
    """What OpenVINO imports; None, with a warning if it is damaged, where there is none of use."""
    try:
        with file.open() or contextlib.nullcontext() as reader:
            if reader is None:
                return None
            check_room(reader.size, file.path.name)
            memory = Memory(reader.size)
            reader.read_into(memory.view())
            return memory
    except (KeymgmtError, OSError) as error:  # damaged, or too large for the memory
        log.warning("%s is of no use and is made anew: %s", file.path, type(error).__name__)
        return None


def keep_compiled(file: DeviceFile, compiled: ov.CompiledModel, size: int) -> None:
    """Seal a compiled model; a warning where that fails, as the model itself is there.

    ``size`` is that of the sealed model in bytes.
    """
    try:
        check_room(2 * size, file.path.name)  # f16 weights are f32 by now
        with compiled.export_model().getbuffer() as content:
            try:
                file.write(content)
            finally:
                wipe(content)
    except (KeymgmtError, OSError, RuntimeError, MemoryError, ValueError) as error:
        # ValueError: without memory, OpenVINO gives a closed stream.
        # Not the error itself: a log that keeps its record would keep this frame, so the model.
        log.warning("the compiled model is not kept in %s: %s", file.path, str(error))


def _properties(core: ov.Core, device: str) -> dict[str, str]:
    found = {}
    for name in core.get_property(device, "SUPPORTED_PROPERTIES"):
        try:
            found[name] = str(core.get_property(device, name))
        except (RuntimeError, TypeError):  # one that Python has no type for
            continue
    return found


def _processor() -> str:
    """What the kernel says of the first processor's instructions; empty where it says nothing."""
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123 - no file of a disk
            found = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return ""
    return found[0].partition(":")[2].strip() if found else ""
