"""From a sealed model to OpenVINO: everything that can be refused is refused before work starts.

Order: the caller's options and device; the signature and policy (``keymgmt.open``); room for the
weights; then the bytes, verified as they are decrypted; then OpenVINO.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final, TypeVar

import openvino as ov

import keymgmt
from keymgmt.errors import ConfigError, FormatError, KeymgmtError
from keymgmt.room import check_room
from keymgmt_openvino._compiled import compiled_file, keep_compiled, read_compiled
from keymgmt_openvino._memory import Memory, private_bytes, release
from keymgmt_openvino._model import LoadedModel
from keymgmt_openvino._onnx import check_self_contained

if TYPE_CHECKING:
    from keymgmt import Config, SealedModel

__all__ = ["ask", "check_core", "check_options", "load", "read", "read_file", "read_weights"]

Options = Mapping[str, Any]
T = TypeVar("T")

log = logging.getLogger("keymgmt.openvino")

_CACHING: Final = re.compile(
    "CACHE_DIR|CACHE_MODE|CACHE_ENCRYPTION_CALLBACKS|WEIGHTS_PATH"
    # For an NPU: the compiled model, its parts, and where GenAI keeps it.
    "|NPUW_CACHE_DIR|NPUW_DUMP_.*|EXPORT_BLOB|BLOB_PATH"
)
_NO_CACHE: Final = (
    "OpenVINO's model cache holds the weights in plaintext, even with its encryption callbacks; "
    "leave it off; for the CPU, keymgmt_openvino.load(cache=...) keeps a sealed one"
)


def load(
    path: str | os.PathLike[str],
    device: str = "CPU",
    ov_config: Options | None = None,
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    core: ov.Core | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Open a sealed model in memory and compile it.

    Args:
        path: the sealed model, an IR or a self-contained ONNX file inside.
        device: an OpenVINO device, such as ``CPU`` or ``AUTO``.
        ov_config: as for ``Core.compile_model``; a model cache is refused.
        name: the model that is expected; another one is refused.
        keys: config, or its path; else the one that ``keymgmt.load_config`` finds.
        core: the Core to use; else a new one. It must have no model cache set.
        cache: a folder of this user alone, to keep the compiled model in, sealed to this device;
            for the CPU. The next load takes it from there and compiles nothing.

    Returns:
        The model; a context manager whose end wipes it.

    Raises:
        ConfigError: a model cache, a device that is not there, or the config.
        SealedModelError: damaged, untrusted, too old, or not a model for OpenVINO.
        CannotUnlock: no key of this config opens it.
        KeymgmtError: too little memory, or OpenVINO refused the model.
    """
    options = dict(ov_config or {})
    check_options(options)
    if cache is not None and device != "CPU":
        raise ConfigError(
            f"a compiled model is kept for the CPU, not for {device}", hint="leave cache= out"
        )
    core = _core(core, device)
    with contextlib.ExitStack() as stack:
        with keymgmt.open(path, name=name, keys=keys) as sealed:
            title, kept = sealed.manifest.name, None
            if cache is not None:
                kept = stack.enter_context(compiled_file(sealed, cache, core, device, options))
                if memory := read_compiled(kept):
                    what = f"OpenVINO does not take back {kept.path.name}, which it made"
                    try:
                        compiled = ask(what, core.import_model, memory.tensor, device, options)
                        return LoadedModel(title, compiled, [memory])
                    except KeymgmtError as error:
                        log.warning("%s; better leave cache= out", str(error))
                        release(memory)
                        kept = None  # another one would be the same
            size = sum(entry.size for entry in sealed.manifest.files)
            model, memories = read_sealed(sealed, core)
        try:
            compiled = ask(
                f"OpenVINO cannot compile {title} for {device}",
                core.compile_model,
                model,
                device,
                options,
            )
            if kept is not None:
                keep_compiled(kept, compiled, size)
        except BaseException:
            # The error's traceback holds this frame, which must not hold the graph.
            del model
            for memory in memories:
                release(memory)
            raise
        del model  # what the compiled model does not need can be wiped already
        return LoadedModel(title, compiled, memories)


def read(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    core: ov.Core | None = None,
) -> ov.Model:
    """Open a sealed model as an ``openvino.Model``, to look at, reshape or preprocess.

    The weights are wiped when the model and all that was compiled from it are gone. What is saved
    or cached from it is plaintext, and that is the caller's doing.

    Raises:
        SealedModelError, CannotUnlock, ConfigError, KeymgmtError: as ``load``.
    """
    core = _core(core, None)
    with keymgmt.open(path, name=name, keys=keys) as sealed:
        model, memories = read_sealed(sealed, core)
    for memory in memories:
        release(memory)
    return model


def read_sealed(sealed: SealedModel, core: ov.Core) -> tuple[ov.Model, list[Memory]]:
    """Read the main graph of an open sealed model.

    Returns:
        The graph, and the storage of its weights, which the caller hands to ``release``; none
        where OpenVINO keeps copies of its own (ONNX).
    """
    manifest = sealed.manifest
    main = manifest.main or ""
    suffix = PurePosixPath(main).suffix.lower()
    if suffix not in (".xml", ".onnx"):
        raise FormatError(
            f"{manifest.name} ({manifest.kind}) has no OpenVINO IR or ONNX file to load",
            hint="convert the model with openvino.convert_model and save_model, then seal the "
            ".xml; the folder of a pipeline is opened with keymgmt_openvino.genai (docs/genai.md)",
        )
    size = manifest.file(main).size
    what = f"{main} of {manifest.name}"
    cannot = f"OpenVINO cannot read {what}"
    if suffix == ".onnx":
        # The frontend parses a copy and copies each tensor; measured with 1 GiB: four times.
        check_room(4 * size, manifest.name)
        with private_bytes(size) as (data, room):
            sealed.read_into(main, room)
            check_self_contained(room, what)
            return ask(cannot, core.read_model, data), []
    memory = read_weights(sealed, main)
    try:
        check_room(size, manifest.name)
        with private_bytes(size) as (data, room):
            sealed.read_into(main, room)
            return ask(cannot, core.read_model, data, memory.tensor), [memory]
    except BaseException:
        release(memory)
        raise


def read_weights(sealed: SealedModel, graph: str) -> Memory:
    """Decrypt the .bin beside the .xml ``graph``; an empty storage where there is none."""
    path = str(PurePosixPath(graph).with_suffix(".bin"))
    sizes = {entry.path: entry.size for entry in sealed.manifest.files}
    return read_file(sealed, path) if path in sizes else Memory(0)


def read_file(sealed: SealedModel, path: str) -> Memory:
    """Decrypt a file of an open sealed model into memory that OpenVINO owns.

    Raises:
        KeymgmtError: there is too little memory.
        IntegrityError: damaged or forged; the memory was wiped.
    """
    size = sealed.manifest.file(path).size
    check_room(size, sealed.manifest.name)
    memory = Memory(size)
    try:
        if size:
            sealed.read_into(path, memory.view())
    except BaseException:
        release(memory)
        raise
    return memory


def check_options(options: Options) -> None:
    """Refuse what would write plaintext to a disk, also inside DEVICE_PROPERTIES.

    Raises:
        ConfigError: a model cache is asked for.
    """
    for key, value in options.items():
        option = str(key).upper()
        if _CACHING.fullmatch(option) and value not in ("", None, False):
            raise ConfigError(f"{option} is refused for a sealed model", hint=_NO_CACHE)
        if isinstance(value, Mapping):
            check_options(value)


def check_core(core: ov.Core, device: str | None = None) -> None:
    """Refuse a Core with a model cache, or one that lacks the device.

    Raises:
        ConfigError: either of the two.
    """
    # To list the devices starts the drivers of all, which can take longer than loading a model.
    devices = ["CPU"] if device == "CPU" else core.available_devices
    for place in (None, *devices):
        try:
            cache = (
                core.get_property("CACHE_DIR")
                if place is None
                else core.get_property(place, "CACHE_DIR")
            )
        except RuntimeError:  # a device without that property has no cache
            continue
        if cache:
            where = "the Core" if place is None else f"{place} in the Core"
            raise ConfigError(f"CACHE_DIR is set on {where}: {cache}", hint=_NO_CACHE)
    if device is None:
        return
    # AUTO, MULTI:CPU,GPU, HETERO:GPU,CPU, BATCH:CPU(4): the names after the colon must be there.
    kind, _, listed = device.partition(":")
    wanted = [each.partition("(")[0].lstrip("-") for each in listed.split(",") if each]
    if kind not in ("AUTO", "MULTI", "HETERO", "BATCH"):
        wanted = [device]
    for each in wanted:
        if not any(known == each or known.startswith(f"{each}.") for known in devices):
            raise ConfigError(
                f"no device {each!r} here", hint=f"OpenVINO sees {', '.join(devices) or 'none'}"
            )


def _core(core: ov.Core | None, device: str | None) -> ov.Core:
    core = core or ov.Core()
    check_core(core, device)
    return core


def ask(what: str, call: Callable[..., T], *arguments: object, **options: object) -> T:
    """Call OpenVINO; its refusal is one sentence, and keeps nothing of the arguments alive."""
    try:
        return call(*arguments, **options)
    except RuntimeError as error:
        # Its messages are a page of source locations; the last line is the news.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Outside of the handler: a chained exception's frames would hold the graph, so the weights.
    del arguments, options
    raise KeymgmtError(f"{what}: {lines[-1] if lines else 'no reason given'}")
