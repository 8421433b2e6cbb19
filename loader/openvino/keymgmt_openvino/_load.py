"""From a sealed model to OpenVINO: everything that can be refused is refused before work starts.

Order: the environment, the caller's options and device; the signature and policy
(``keymgmt.open``); memory for the weights; then the bytes, verified as they are decrypted; then
OpenVINO.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import openvino as ov

import keymgmt
from keymgmt.errors import KeymgmtError
from keymgmt.loading import check_free_memory
from keymgmt_openvino._ask import ask
from keymgmt_openvino._compiled import check_exports, compiled_file, keep_compiled, read_compiled
from keymgmt_openvino._memory import release
from keymgmt_openvino._model import LoadedModel
from keymgmt_openvino._no_disk import check_core, check_device, check_environment, check_options
from keymgmt_openvino._read import read_sealed

if TYPE_CHECKING:
    from keymgmt import Config

__all__ = ["load", "read"]

Options = Mapping[str, Any]

log = logging.getLogger("keymgmt.openvino")


def load(
    path: str | os.PathLike[str],
    device: str = "CPU",
    ov_config: Options | None = None,
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    core: ov.Core | None = None,
    cache: str | os.PathLike[str] | None = None,
    file: str | None = None,
) -> LoadedModel:
    """Open a sealed model in memory and compile it.

    Args:
        path: the sealed model, with any file inside that ``Core.read_model`` reads. A format other
            than IR and ONNX is read through private files (``keymgmt.mount``).
        device: an OpenVINO device, such as ``CPU`` or ``AUTO``.
        ov_config: as for ``Core.compile_model``; a model cache is refused.
        name: the model that is expected; another one is refused.
        keys: config, or its path; else the one that ``keymgmt.load_config`` finds.
        core: the Core to use; else a new one. It must have no model cache set.
        cache: a folder of this user alone, in which the compiled model is kept, sealed to this
            device; for devices that can export compiled models, such as CPU and HETERO. The next
            load takes the compiled model from there.
        file: which graph, if the sealed folder has several; else its main one.

    Returns:
        The model; a context manager whose end wipes it.

    Raises:
        ConfigError: a model cache, a device that does not exist, or a fault in the config.
        SealedModelError: damaged, untrusted, too old, or not a model for OpenVINO.
        CannotUnlock: no key of this config opens it.
        KeymgmtError: too little memory, or OpenVINO refused the model.
    """
    options = dict(ov_config or {})
    check_environment()
    check_options(options)
    if core is not None:
        check_core(core, device)
    if core is not None or options or device != "CPU":
        check_device(core := core or ov.Core(), device, options)
    core = core or ov.Core()
    if cache is not None:
        check_exports(core, device)
    with contextlib.ExitStack() as stack:
        with keymgmt.open(path, name=name, keys=keys) as sealed:
            title, kept = sealed.manifest.name, None
            if cache is not None:
                kept = compiled_file(sealed, file, cache, core, device, options)
            if kept is not None:
                stack.enter_context(kept)
                if memory := read_compiled(kept):
                    label = f"OpenVINO does not take back {kept.path.name}, which it made"
                    try:
                        compiled = ask(label, core.import_model, memory.tensor, device, options)
                        return LoadedModel(title, compiled, [memory])
                    except KeymgmtError as error:
                        log.warning("%s; better leave cache= out", str(error))
                        log.debug("%s", "".join(error.__notes__))
                        release(memory)
                        kept = None  # a new export would be refused in the same way
            size = sealed.manifest.size
            _warn_if_tight(size, title)
            model, memories = read_sealed(sealed, core, file)
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
            # The traceback of the error holds this frame, which must not hold the graph.
            del model
            for memory in memories:
                release(memory)
            raise
        del model  # so that weights which the compiled model does not need are wiped now
        return LoadedModel(title, compiled, memories)


def _warn_if_tight(size: int, title: str) -> None:
    try:
        check_free_memory(2 * size, title)
    except KeymgmtError as error:  # memory for one copy is checked where the copy is made
        log.warning(
            "%s, counting the copy that OpenVINO makes of most weights at the first inference; "
            "the system may end this process then",
            str(error),
        )


def read(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    core: ov.Core | None = None,
    file: str | None = None,
) -> ov.Model:
    """Open a sealed model as an ``openvino.Model``, to examine, reshape or preprocess it.

    The weights are wiped when the model and everything that was compiled from it are gone. Files
    that the caller saves or caches from it are plaintext.

    Raises:
        SealedModelError, CannotUnlock, ConfigError, KeymgmtError: as ``load``.
    """
    check_environment()
    if core is not None:
        check_core(core, *core.available_devices)
        for device in core.available_devices:
            check_device(core, device, {})
    core = core or ov.Core()
    with keymgmt.open(path, name=name, keys=keys) as sealed:
        model, memories = read_sealed(sealed, core, file)
    for memory in memories:
        release(memory)
    return model
