"""OpenVINO GenAI pipelines from sealed folders.

Language models are built from memory: graph, weights, tokenizer, chat template and generation
config straight from the decrypted bytes. Pipelines that take nothing but a path get one that is on
no disk (``keymgmt.mount``). Which is which, and what stays in memory: docs/genai.md.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final, TypeVar

import keymgmt
from keymgmt.errors import ConfigError, FormatError
from keymgmt_openvino._load import ask, check_options, read_file, read_weights
from keymgmt_openvino._memory import Memory, private_bytes, release
from keymgmt_openvino._model import Owner

try:
    import openvino_genai as ov_genai
except ImportError as error:
    raise ConfigError(
        f"OpenVINO GenAI is not installed ({error})", hint='pip install "keymgmt-openvino[genai]"'
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from keymgmt import Config, SealedModel

__all__ = ["LoadedPipeline", "load_adapter", "load_llm", "load_path_pipeline"]

T = TypeVar("T")

_TOKENIZER: Final = "openvino_tokenizer.xml"
_DETOKENIZER: Final = "openvino_detokenizer.xml"
_GENERATION: Final = "generation_config.json"
# Where GenAI 2026.4 looks for a chat template after the tokenizer's own, in this order (tried).
_TEMPLATES: Final = (
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "tokenizer_config.json",
)


class LoadedPipeline(Owner):
    """An ``LLMPipeline`` from a sealed folder; used like one, and closed like a loaded model.

    ``close()`` while a generation runs in another thread raises ModelInUse; the generation ends
    undisturbed, and the weights are wiped after it.
    """

    @property
    def pipeline(self) -> Any:
        """The pipeline inside. Whatever holds it delays the wipe until it is gone."""
        return self._use()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Generate, as ``LLMPipeline.__call__``."""
        return self._use()(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        """Everything else, ``generate``, ``start_chat`` and so on, is the pipeline's."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._use(), name)

    def _users(self) -> str:
        return "a generation is running, or its pipeline is held elsewhere"


def load_llm(
    path: str | os.PathLike[str],
    device: str = "CPU",
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    generation_config: Any = None,
    **pipeline_options: Any,
) -> LoadedPipeline:
    """Open a sealed folder of a language model as an ``openvino_genai.LLMPipeline``.

    Args:
        path: the sealed model: a folder as ``optimum-cli export openvino`` makes it.
        device: an OpenVINO device.
        name: the model that is expected; another one is refused.
        keys: config, or its path; else the one that ``keymgmt.load_config`` finds.
        generation_config: a ``GenerationConfig``; else that of the folder.
        **pipeline_options: as for ``LLMPipeline``, such as ``ATTENTION_BACKEND``,
            ``scheduler_config``, ``adapters`` (of ``load_adapter``) or ``draft_model``.

    Returns:
        The pipeline's owner; a context manager whose end wipes the weights.

    Raises:
        FormatError: no graph, tokenizer or detokenizer in it.
        KeymgmtError: too little memory, or OpenVINO GenAI refused the model: among other things
            a tokenizer that another version made.
        ConfigError, SealedModelError, CannotUnlock: as ``keymgmt_openvino.load``.
    """
    check_options(pipeline_options)
    memories: list[Memory] = []
    with keymgmt.open(path, name=name, keys=keys) as sealed:
        title, main = sealed.manifest.name, _check_folder(sealed)
        try:
            tokenizer = _tokenizer(sealed, memories)
            weights = read_weights(sealed, main)
            memories.append(weights)
            config = generation_config or _generation_config(sealed)
            with private_bytes(sealed.manifest.file(main).size) as (graph, room):
                sealed.read_into(main, room)
                pipeline = ask(
                    f"OpenVINO GenAI cannot build {title} for {device}",
                    ov_genai.LLMPipeline,
                    graph,
                    weights.tensor,
                    tokenizer,
                    device,
                    config,
                    **pipeline_options,
                )
        except BaseException:
            # The error's traceback holds this frame, which must not hold what it built.
            tokenizer = pipeline = None
            for memory in memories:
                release(memory)
            raise
    return LoadedPipeline(title, pipeline, memories)


def load_adapter(
    path: str | os.PathLike[str],
    file: str = "adapter_model.safetensors",
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
) -> Any:
    """Open a LoRA adapter, a .safetensors file of a sealed folder, as ``openvino_genai.Adapter``.

    Its memory is wiped when the adapter and the pipelines that use it are gone.
    """
    with keymgmt.open(path, name=name, keys=keys) as sealed:
        try:
            memory = read_file(sealed, file)
        except FileNotFoundError as error:
            raise FormatError(
                str(error),
                hint="it has " + ", ".join(entry.path for entry in sealed.manifest.files[:10]),
            ) from error
        title = sealed.manifest.name
    try:
        return ask(f"OpenVINO GenAI cannot read {file} of {title}", ov_genai.Adapter, memory.tensor)
    finally:
        release(memory)


def load_path_pipeline(
    pipeline: Callable[..., T],
    path: str | os.PathLike[str],
    device: str = "CPU",
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    **options: Any,
) -> T:
    """Build a pipeline that takes only a path: ``pipeline(directory, device, **options)``.

    The directory is ``keymgmt.mount``'s, so this process becomes non-dumpable. The files' memory
    is given back when the pipeline is gone.

    Args:
        pipeline: a class such as ``openvino_genai.TextEmbeddingPipeline``, or any callable.
        path: the sealed model.
        device: an OpenVINO device.
        name: the model that is expected; another one is refused.
        keys: config, or its path; else the one that ``keymgmt.load_config`` finds.
        **options: for the pipeline.

    Raises:
        KeymgmtError: this system cannot keep the files to this process, or the pipeline refused.
        ConfigError, SealedModelError, CannotUnlock: as ``keymgmt_openvino.load``.
    """
    check_options(options)
    what = f"{getattr(pipeline, '__name__', 'the pipeline')} cannot be built"
    with keymgmt.mount(path, name=name, keys=keys) as directory:
        return ask(what, pipeline, directory, device, **options)


def _check_folder(sealed: SealedModel) -> str:
    """The path of the main graph; FormatError where a part of a language model is missing."""
    manifest = sealed.manifest
    present = {entry.path for entry in manifest.files}
    missing = [path for path in (_TOKENIZER, _DETOKENIZER) if path not in present]
    if manifest.main is None or not manifest.main.endswith(".xml"):
        missing.insert(0, "openvino_model.xml")
    if missing or manifest.main is None:
        raise FormatError(
            f"{manifest.name} ({manifest.kind}) is no language model: "
            f"it lacks {' and '.join(missing)}",
            hint="export the folder with: optimum-cli export openvino --model MODEL FOLDER; "
            "then seal the FOLDER",
        )
    return manifest.main


def _tokenizer(sealed: SealedModel, memories: list[Memory]) -> Any:
    """Build the tokenizer; the storage of its parts is added to ``memories``."""
    manifest = sealed.manifest
    parts: list[Memory] = []
    for graph in (_TOKENIZER, _DETOKENIZER):
        parts.append(read_weights(sealed, graph))
        memories.append(parts[-1])
    with (
        private_bytes(manifest.file(_TOKENIZER).size) as (forward, forward_room),
        private_bytes(manifest.file(_DETOKENIZER).size) as (back, back_room),
    ):
        sealed.read_into(_TOKENIZER, forward_room)
        sealed.read_into(_DETOKENIZER, back_room)
        tokenizer = ask(
            f"OpenVINO GenAI cannot read the tokenizer of {manifest.name}",
            ov_genai.Tokenizer,
            forward,
            parts[0].tensor,
            back,
            parts[1].tensor,
        )
    if not tokenizer.chat_template and (template := _chat_template(sealed)):
        tokenizer.set_chat_template(template)
    return tokenizer


def _chat_template(sealed: SealedModel) -> str:
    present = {entry.path for entry in sealed.manifest.files}
    for path in _TEMPLATES:
        if path not in present:
            continue
        text = sealed.read(path).decode(errors="replace")
        found = text if path.endswith(".jinja") else _member(text, path, "chat_template")
        if isinstance(found, str) and found:
            return found
    return ""


def _member(text: str, path: str, member: str) -> object:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} in the sealed model is not JSON: {error}") from None
    return content.get(member) if isinstance(content, dict) else None


def _generation_config(sealed: SealedModel) -> Any:
    """The folder's generation config, read by GenAI itself, from a file that is in memory."""
    if _GENERATION not in {entry.path for entry in sealed.manifest.files}:
        return ov_genai.GenerationConfig()
    descriptor = os.memfd_create("keymgmt", os.MFD_CLOEXEC)
    with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor
        file.write(sealed.read(_GENERATION))
        return ask(
            f"OpenVINO GenAI cannot read {_GENERATION} of {sealed.manifest.name}",
            ov_genai.GenerationConfig,
            f"/proc/self/fd/{descriptor}",
        )
