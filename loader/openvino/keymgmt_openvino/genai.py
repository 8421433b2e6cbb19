"""OpenVINO GenAI pipelines from sealed folders.

Language models are built from memory: graph, weights, tokenizer, chat template and generation
config straight from the decrypted bytes. Pipelines that take only a path get a path that is not on
a disk (``keymgmt.mount``). docs/genai.md lists both, and what stays in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import keymgmt
from keymgmt.errors import ConfigError, FormatError, KeymgmtError
from keymgmt.loading import choose_file, file_bytes, private_bytes
from keymgmt_openvino._ask import ask
from keymgmt_openvino._memory import Memory, release
from keymgmt_openvino._model import Owner
from keymgmt_openvino._no_disk import check_pipeline
from keymgmt_openvino._read import read_file, read_weights

try:
    import openvino_genai as ov_genai
except ImportError as error:
    raise ConfigError(
        f"OpenVINO GenAI is not installed ({error})", hint='pip install "keymgmt-openvino[genai]"'
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from keymgmt import Config, SealedModel

__all__ = [
    "DraftModel",
    "LoadedPipeline",
    "load_adapter",
    "load_draft_model",
    "load_llm",
    "load_path_pipeline",
    "load_vlm",
]

T = TypeVar("T")

_TOKENIZER: Final = "openvino_tokenizer.xml"
_DETOKENIZER: Final = "openvino_detokenizer.xml"
_GRAPH: Final = "openvino_{}_model.xml"
_NAMED: Final = re.compile(r"openvino_(\w+)_model\.xml")
_IR: Final = re.compile(r"(^|/)openvino_[^/]*\.(xml|bin)$")
_GENERATION: Final = "generation_config.json"
_CONFIG: Final = "config.json"
_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
_INFO_ENDS: Final = re.compile(rb"</rt_info>\s*</net>\s*$")
# Where GenAI 2026.4 looks for a chat template after the tokenizer's own, in this order (tried).
_TEMPLATES: Final = (
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "tokenizer_config.json",
)


class LoadedPipeline(Owner):
    """A GenAI pipeline from a sealed folder; used like the pipeline, closed like a loaded model.

    It has all members of the pipeline: ``generate``, ``start_chat`` and so on. A generation that
    runs in another thread when it is closed ends normally, and the weights are wiped after it.
    """

    @property
    def pipeline(self) -> Any:
        """The pipeline inside. The weights are not wiped while something holds it."""
        return self._use()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Generate, as the pipeline's own call."""
        return self._use()(*arguments, **options)

    def _users(self) -> str:
        return "a generation is running, or its pipeline or tokenizer is held elsewhere"


def load_llm(
    path: str | os.PathLike[str],
    device: str = "CPU",
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    generation_config: Any = None,
    draft_model: Any = None,
    trust_draft_model: bool = False,
    **pipeline_options: Any,
) -> LoadedPipeline:
    """Open a sealed folder of a language model as an ``openvino_genai.LLMPipeline``.

    Args:
        path: the sealed model: a folder as ``optimum-cli export openvino`` makes it.
        device: an OpenVINO device.
        name: the model that is expected; another one is refused.
        keys: config, or its path; else the one that ``keymgmt.load_config`` finds.
        generation_config: a ``GenerationConfig``; else that of the folder.
        draft_model: for speculative decoding: what ``load_draft_model`` returns.
        trust_draft_model: accept a ready-made ``openvino_genai.draft_model`` too, whose options are
            not known: it may have a plaintext cache.
        **pipeline_options: as for ``LLMPipeline``, such as ``ATTENTION_BACKEND``,
            ``scheduler_config`` or ``adapters`` (of ``load_adapter``).

    Returns:
        The pipeline's owner; a context manager whose end wipes the weights.

    Raises:
        FormatError: it has no graph, tokenizer or detokenizer.
        KeymgmtError: too little memory, or OpenVINO GenAI refused the model, such as a tokenizer of
            another version.
        ConfigError, SealedModelError, CannotUnlock: as ``keymgmt_openvino.load``.
    """
    check_pipeline(device, pipeline_options)
    pipeline_options |= _draft(draft_model, trust_draft_model)
    with keymgmt.open(path, name=name, keys=keys) as sealed:
        return _build(
            sealed,
            {"language": _language_model(sealed)},
            generation_config,
            f"for {device}",
            lambda models, tokenizer, config: ov_genai.LLMPipeline(
                *models["language"], tokenizer, device, config, **pipeline_options
            ),
        )


def load_vlm(
    path: str | os.PathLike[str],
    device: str = "CPU",
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    generation_config: Any = None,
    **pipeline_options: Any,
) -> LoadedPipeline:
    """Open a sealed folder of a vision language model as an ``openvino_genai.VLMPipeline``.

    Graphs, weights and tokenizer come from memory. GenAI reads the small files, such as
    ``config.json`` and ``preprocessor_config.json``, by path and while it builds: they are mounted
    (``keymgmt.mount``), so this process becomes non-dumpable.

    Arguments and result are those of ``load_llm``; the options are of ``VLMPipeline``.

    Raises:
        FormatError: it has no tokenizer, or no graph for language, text embeddings or images.
        KeymgmtError: as ``load_llm``, or this system cannot keep the small files to this process.
        ConfigError, SealedModelError, CannotUnlock: as ``keymgmt_openvino.load``.
    """
    check_pipeline(device, pipeline_options)
    keymgmt.harden()  # before there is a key to read
    with keymgmt.open(path, name=name, keys=keys) as sealed:
        graphs = _vision_graphs(sealed)
        with keymgmt.mount(sealed, only=lambda file: not _IR.search(file)) as folder:
            return _build(
                sealed,
                graphs,
                generation_config,
                f"for {device}",
                lambda models, tokenizer, config: ov_genai.VLMPipeline(
                    models, tokenizer, folder, device, config, **pipeline_options
                ),
            )


@dataclass(frozen=True)
class DraftModel:
    """A draft model from a sealed folder, for ``load_llm(draft_model=)``."""

    inner: Any


def load_draft_model(
    path: str | os.PathLike[str],
    device: str = "CPU",
    *,
    name: str | None = None,
    keys: str | os.PathLike[str] | Config | None = None,
    **options: Any,
) -> DraftModel:
    """Open a sealed folder as an ``openvino_genai.draft_model``; as ``load_path_pipeline``."""
    draft = load_path_pipeline(ov_genai.draft_model, path, device, name=name, keys=keys, **options)
    return DraftModel(draft)


def _draft(model: Any, trusted: bool) -> dict[str, Any]:
    if model is None:
        return {}
    if isinstance(model, DraftModel):
        return {"draft_model": model.inner}
    if trusted:
        return {"draft_model": model}
    raise ConfigError(
        "a ready-made draft_model does not tell whether it has a plaintext cache",
        hint="make it with keymgmt_openvino.genai.load_draft_model, or say trust_draft_model=True",
    )


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
        choose_file(sealed, file, (), label="adapter", hint="name it with file=")
        memory = read_file(sealed, file)
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
    file: str = "",
    **options: Any,
) -> T:
    """Build a pipeline that takes only a path: ``pipeline(directory, device, **options)``.

    The directory comes from ``keymgmt.mount``, so this process becomes non-dumpable. The memory of
    the files is freed when the pipeline is gone.

    Args:
        pipeline: a class such as ``openvino_genai.TextEmbeddingPipeline``, or any callable.
        path: the sealed model.
        device: an OpenVINO device.
        name: the model that is expected; another one is refused.
        keys: config, or its path; else the one that ``keymgmt.load_config`` finds.
        file: the file to name in place of the directory, for a pipeline in one file (GGUF).
        **options: for the pipeline.

    Raises:
        KeymgmtError: this system cannot keep the files to this process, or the pipeline refused.
        ConfigError, SealedModelError, CannotUnlock: as ``keymgmt_openvino.load``.
    """
    check_pipeline(device, options)
    label = f"{getattr(pipeline, '__name__', 'the pipeline')} cannot be built"
    with keymgmt.mount(path, name=name, keys=keys) as directory:
        return ask(label, pipeline, directory / file, device, **options)


def _build(
    sealed: SealedModel,
    graphs: Mapping[str, str],
    generation_config: Any,
    where: str,
    make: Callable[[dict[str, tuple[bytes, Any]], Any, Any], Any],
) -> LoadedPipeline:
    """Decrypt the graphs (name -> path) and hand them to ``make``."""
    title = sealed.manifest.name
    memories: list[Memory] = []
    models: dict[str, tuple[bytes, Any]] = {}
    tokenizer = pipeline = None
    try:
        with contextlib.ExitStack() as stack:
            tokenizer = _tokenizer(sealed, memories)
            for graph, path in graphs.items():
                memories.append(read_weights(sealed, path))
                content, _ = stack.enter_context(file_bytes(sealed, path))
                models[graph] = content, memories[-1].tensor
            config = generation_config or _generation_config(sealed)
            label = f"OpenVINO GenAI cannot build {title} {where}"
            pipeline = ask(label, make, models, tokenizer, config)
            models.clear()
        return LoadedPipeline(title, pipeline, memories)
    except BaseException:
        # The traceback of the error holds this frame, which must not hold pipeline and graphs.
        tokenizer = pipeline = None
        models.clear()
        for memory in memories:
            release(memory)
        raise


def _language_model(sealed: SealedModel) -> str:
    """The path of the main graph; FormatError if a part of a language model is missing."""
    main = sealed.manifest.main
    if main == _GRAPH.format("language"):
        raise FormatError(
            f"{sealed.manifest.name} is a vision language model",
            hint="open it with keymgmt_openvino.genai.load_vlm",
        )
    if main is None or not main.endswith(".xml"):
        main = "openvino_model.xml"
    _check_folder(sealed, "language model", [main])
    return main


def _vision_graphs(sealed: SealedModel) -> dict[str, str]:
    """GenAI's name -> path, for each graph of a vision language model."""
    needed = [_GRAPH.format(name) for name in ("language", "text_embeddings", "vision_embeddings")]
    _check_folder(sealed, "vision language model", needed)
    paths = sealed.manifest.by_path
    return {match[1]: path for path in paths if (match := _NAMED.fullmatch(path))}


def _check_folder(sealed: SealedModel, label: str, graphs: list[str]) -> None:
    manifest = sealed.manifest
    missing = [path for path in (*graphs, _TOKENIZER, _DETOKENIZER) if path not in manifest.by_path]
    if missing:
        raise FormatError(
            f"{manifest.name} ({manifest.kind}) is not a {label}: it lacks {' and '.join(missing)}",
            hint="optimum-cli export openvino writes these files for a language model; models of "
            "other pipelines are opened with load_path_pipeline (docs/genai.md)",
        )


def _tokenizer(sealed: SealedModel, memories: list[Memory]) -> Any:
    """Build the tokenizer; the storage of its parts is added to ``memories``."""
    manifest = sealed.manifest
    parts: list[Memory] = []
    for graph in (_TOKENIZER, _DETOKENIZER):
        parts.append(read_weights(sealed, graph))
        memories.append(parts[-1])
    size, ids = manifest.file(_TOKENIZER).size, _special_ids(sealed)
    with (
        private_bytes(size + sum(map(len, ids.values()))) as (forward, forward_room),
        private_bytes(manifest.file(_DETOKENIZER).size) as (back, back_room),
    ):
        sealed.read_into(_TOKENIZER, forward_room[:size])
        sealed.read_into(_DETOKENIZER, back_room)
        _add_ids(forward, forward_room, size, ids)
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


def _special_ids(sealed: SealedModel) -> dict[str, bytes]:
    """The special tokens of config.json, each as an element of a graph's rt_info."""
    if _CONFIG not in sealed.manifest.by_path:
        return {}
    text = sealed.read(_CONFIG).decode(errors="replace")
    ids = {name: _member(text, _CONFIG, name) for name in _IDS}
    return {
        name: f'<{name} value="{number}" />'.encode()
        for name, number in ids.items()
        if type(number) is int
    }


def _add_ids(graph: bytes, room: memoryview, size: int, ids: Mapping[str, bytes]) -> None:
    """Add the ids that the graph of ``size`` bytes lacks; spaces fill the rest of its room.

    GenAI reads the ids of config.json only if it builds a tokenizer by path. Without the end token
    a generation would not end, and chat templates need the others.
    """
    room[size:] = b" " * (len(room) - size)
    if match := _INFO_ENDS.search(graph):
        lacking = (element for name, element in ids.items() if f"<{name} ".encode() not in graph)
        tail = b"".join(lacking) + match[0].rstrip()
        room[match.start() : match.start() + len(tail)] = tail


def _chat_template(sealed: SealedModel) -> str:
    for path in _TEMPLATES:
        if path not in sealed.manifest.by_path:
            continue
        text = sealed.read(path).decode(errors="replace")
        template = text if path.endswith(".jinja") else _member(text, path, "chat_template")
        if isinstance(template, list):  # several templates, each with its name
            named = (each for each in template if isinstance(each, dict))
            template = next(
                (each.get("template") for each in named if each.get("name") == "default"), ""
            )
        if isinstance(template, str) and template:
            return template
    return ""


def _member(text: str, path: str, member: str) -> object:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} in the sealed model is not JSON: {error}") from None
    return content.get(member) if isinstance(content, dict) else None


def _generation_config(sealed: SealedModel) -> Any:
    """The folder's generation config, read by GenAI itself, from a file that is in memory."""
    if _GENERATION not in sealed.manifest.by_path:
        return ov_genai.GenerationConfig()
    try:
        descriptor = os.memfd_create("keymgmt", os.MFD_CLOEXEC)
    except OSError as error:
        raise KeymgmtError(
            f"{_GENERATION} cannot be given to OpenVINO GenAI in memory: {error.strerror}",
            hint="permit memfd_create, or give generation_config=",
        ) from error
    with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor
        file.write(sealed.read(_GENERATION))
        return ask(
            f"OpenVINO GenAI cannot read {_GENERATION} of {sealed.manifest.name}",
            ov_genai.GenerationConfig,
            f"/proc/self/fd/{descriptor}",
        )
