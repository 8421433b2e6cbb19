"""From a sealed ONNX model to a session, with nothing on a disk."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import onnxruntime

import keymgmt
from keymgmt.errors import ConfigError, KeymgmtError
from keymgmt.loading import (
    External,
    check_free_memory,
    choose_file,
    file_bytes,
    file_memory,
    joined_bytes,
    move_external,
    outside_part,
)

if TYPE_CHECKING:
    from keymgmt import Config, SealedModel
    from keymgmt.loading import PrivateMemory

__all__ = ["load"]

# Our copy, and two of ONNX Runtime: as read, and packed for its kernels; measured with 512 MiB.
_COPIES: Final = 3
_BY_PATH: Final = "open it by path: keymgmt.private_folder, keymgmt exec (docs/exec.md)"
# Options that write compiled or optimised graphs, with their weights, have such words in the name,
# or in the value: OpenVINO's load_config has JSON as its value.
_WRITES: Final = ("cache", "dump", "ep_context", "save")

Provider = str | tuple[str, Mapping[str, Any]]


def load(
    path: str | os.PathLike[str],
    sess_options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[Provider] | None = None,
    provider_options: Sequence[Mapping[str, Any]] | None = None,
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    file: str | None = None,
) -> onnxruntime.InferenceSession:
    """Open a sealed model, and make a session of one of its ONNX files.

    ONNX Runtime copies everything that it reads. The decrypted bytes are wiped before this returns;
    the copies of the runtime are freed with the session, and not wiped.

    Args:
        path: the sealed model.
        sess_options: as for ``InferenceSession``; an option that writes to a disk is refused.
        providers: as for ``InferenceSession``; they cannot be changed later.
        provider_options: as for ``InferenceSession``; an option that writes to a disk is refused.
        name: the model that is expected; another one is refused.
        keys: a loaded config, or the path of one; else the one that ``keymgmt.load_config`` finds.
        file: the .onnx file, if the model has several.

    Raises:
        ConfigError: an option or a variable would write plaintext to a disk, or ``sess_options``
            has providers of its own.
        FormatError: there is no such file, or its tensors are outside of the model.
        SealedModelError, CannotUnlock, ConfigError: as ``keymgmt.open``.
        KeymgmtError: too little memory, or ONNX Runtime refused the model.
    """
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions() if sess_options is None else sess_options
    _check_options(options, providers or (), provider_options or ())
    with keymgmt.open(path, name=name, keys=keys) as sealed, contextlib.ExitStack() as stack:
        title = sealed.manifest.name
        hint = "seal an .onnx file, or a folder with it; other formats have their own loaders"
        chosen = choose_file(sealed, file, (".onnx",), label=".onnx file", hint=hint)
        data, room = stack.enter_context(file_bytes(sealed, chosen, copies=_COPIES))
        outside = _Outside(sealed, chosen)
        if parts := move_external(room, outside.label, outside.move):
            data = stack.enter_context(joined_bytes(parts))
            check_free_memory((_COPIES - 1) * outside.size, title)
            names = list(outside.names)
            memories = [outside.memories[outside.names[each]] for each in names]
            sizes = [len(memory) for memory in memories]
            options.add_external_initializers_from_files_in_memory(names, memories, sizes)
        try:
            session = onnxruntime.InferenceSession(data, options, providers, provider_options)
        except Exception as error:  # noqa: BLE001 - its errors have no common base class
            whole = str(error)
        else:
            # The session keeps the bytes to build itself again with other providers; they are
            # wiped, so this is switched off.
            session.disable_fallback()
            session._model_bytes = None
            return session
    why = "from memory it does not read tensors of nested graphs; " if outside.names else ""
    refusal = KeymgmtError(f"ONNX Runtime cannot read {outside.label}", hint=f"{why}{_BY_PATH}")
    refusal.add_note(f"ONNX Runtime said:\n{whole}")
    raise refusal


class _Outside:
    """The decrypted files of a sealed model in which an ONNX file keeps tensors.

    ONNX Runtime looks for a file that it does not have in memory on the disk, from the working
    directory on. So each file has a random name for ONNX Runtime, which no file on a disk has.

    Attributes:
        label: what an error calls the ONNX file.
        names: random name for ONNX Runtime -> path in the model.
        memories: path in the model -> its bytes.
        size: bytes of all moved tensors, counting each time that the model names the same bytes.
    """

    def __init__(self, sealed: SealedModel, path: str) -> None:
        self._sealed, self._path = sealed, path
        self._token = secrets.token_hex(16)
        self.label = f"{path} of {sealed.manifest.name}"
        self.names: dict[str, str] = {}
        self.memories: dict[str, PrivateMemory] = {}
        self.size = 0

    def move(self, tensor: External) -> External:
        """The new location of a tensor for ONNX Runtime, whose file is decrypted here."""
        file, length = outside_part(self._sealed, self._path, tensor, self.label)
        if file not in self.memories:
            self.memories[file] = file_memory(self._sealed, file)
        name = f"{self._token}-{list(self.memories).index(file)}"
        self.names[name] = file
        self.size += length
        return External(name, tensor.offset, length)


def _check_options(
    options: onnxruntime.SessionOptions,
    providers: Sequence[Provider],
    provider_options: Sequence[Mapping[str, Any]],
) -> None:
    """ConfigError if an option would write the model to a disk, or options cannot be read."""
    if options.has_providers():
        raise ConfigError(
            "sess_options has providers, whose options cannot be read",
            hint="give them to load: providers=, provider_options=",
        )
    wrong = ["optimized_model_filepath"] if options.optimized_model_filepath else []
    with contextlib.suppress(Exception):  # not set
        if options.get_session_config_entry("ep.context_enable") == "1":
            wrong.append("ep.context_enable")
    # Providers also read options from variables, such as ORT_TENSORRT_ENGINE_CACHE_ENABLE.
    wrong += [name for name in os.environ if name.startswith("ORT_") and _writes(name)]
    paired = [each[1] for each in providers if not isinstance(each, str)]
    for each in (*paired, *provider_options):
        wrong += [name for name, value in each.items() if _writes(f"{name} {value}")]
    if wrong:
        raise ConfigError(
            f"{wrong[0]} may write the model to a disk, in plaintext",
            hint="leave it out; refused are options and variables (ORT_...) with "
            f"{', '.join(_WRITES)} in the name, and options with one of these in the value",
        )


def _writes(text: str) -> bool:
    return any(word in text.lower() for word in _WRITES)
