"""Language models from sealed folders: the same tokens, the same rules for memory."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import keymgmt_openvino  # noqa: F401 - before OpenVINO: no telemetry
import numpy as np
import openvino_genai as ov_genai
import pytest
from bits import flip_in
from keymgmt_openvino import genai
from keymgmt_openvino.genai import load_adapter, load_llm, load_path_pipeline
from programs import PEAK_KIB, run_python
from waiting import until

import keymgmt
from keymgmt._system import free_memory
from keymgmt.errors import (
    ConfigError,
    FormatError,
    IntegrityError,
    KeymgmtError,
    ModelInUse,
)

HERE = Path(__file__).parent
TINY = HERE / "tiny-llm"
PROMPTS = ["Hello there", "the yellow", "x"]
GREEDY = {"max_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module")
def sealed(seal) -> Path:
    return seal(TINY, "tiny-llm")


@pytest.fixture(scope="module")
def expected() -> list[str]:
    pipeline = ov_genai.LLMPipeline(TINY, "CPU")
    return [pipeline.generate(prompt, **GREEDY) for prompt in PROMPTS]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the plain folder, to be changed and sealed."""
    return Path(shutil.copytree(TINY, tmp_path / "llm"))


@pytest.mark.parametrize("options", [{}, {"ATTENTION_BACKEND": "SDPA"}], ids=["default", "sdpa"])
def test_greedy_tokens_are_those_of_plaintext(options, sealed, site, expected, watched):
    with load_llm(sealed, name="tiny-llm", keys=site, **options) as llm:
        assert [llm.generate(prompt, **GREEDY) for prompt in PROMPTS] == expected
        assert llm(PROMPTS[0], **GREEDY) == expected[0]
        plain = ov_genai.LLMPipeline(TINY, "CPU").get_generation_config()
        ours = llm.get_generation_config()
        assert (ours.eos_token_id, ours.stop_token_ids) == (
            plain.eos_token_id,
            plain.stop_token_ids,
        )
    assert len(watched) == 3  # tokenizer, detokenizer, weights
    until(lambda: all(memory.zeros() for memory in watched))


def test_greedy_tokens_after_a_rewrap(sealed, site, expected, tmp_path):
    copy = Path(shutil.copytree(sealed, tmp_path / "copy.sealed"))
    site.provider("local").rotate_key("models")
    keymgmt.rewrap(copy, keys=site)
    assert (copy / "keys.json").read_bytes() != (sealed / "keys.json").read_bytes()
    with load_llm(copy, keys=site) as llm:
        assert [llm.generate(prompt, **GREEDY) for prompt in PROMPTS] == expected


def test_the_manifest_says_what_it_is(sealed):
    manifest = keymgmt.inspect(sealed).manifest
    assert (manifest.kind, manifest.main) == ("openvino-genai", "openvino_model.xml")
    assert manifest.metadata == {"tokenizer": "openvino_tokenizer.xml"}


def test_tokens_are_streamed(sealed, site, expected):
    pieces = []
    with load_llm(sealed, keys=site) as llm:
        llm.generate(PROMPTS[0], streamer=lambda text: pieces.append(text), **GREEDY)
    assert "".join(pieces) == expected[0]
    assert len(pieces) > 1


def test_chat_keeps_its_history(folder, seal, site):
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    )
    answers = []
    with load_llm(seal(folder, "chatty"), keys=site) as llm:
        for pipeline in (llm, ov_genai.LLMPipeline(folder, "CPU")):
            pipeline.start_chat()
            answers.append([pipeline.generate(prompt, **GREEDY) for prompt in PROMPTS])
            pipeline.finish_chat()
        assert answers[0] == answers[1]
        assert answers[0][1] != llm.generate(PROMPTS[1], **GREEDY)


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja"},
        {"chat_template.json"},
        {"processor_config.json"},
        {"tokenizer_config.json"},
        {"chat_template.jinja", "chat_template.json", "tokenizer_config.json"},
        {"chat_template.json", "processor_config.json"},
        {"processor_config.json", "tokenizer_config.json"},
    ],
    ids=lambda files: "+".join(sorted(files)),
)
def test_the_chat_template_is_the_one_that_genai_takes(files, folder, seal, site):
    for file in files:
        template = file + ":{% for m in messages %}{{ m['content'] }}{% endfor %}"
        text = template if file.endswith(".jinja") else json.dumps({"chat_template": template})
        (folder / file).write_text(text)
    history = [{"role": "user", "content": "hi"}]
    expected = ov_genai.Tokenizer(folder).apply_chat_template(history, True)
    with load_llm(seal(folder, "templates"), keys=site) as llm:
        assert llm.get_tokenizer().apply_chat_template(history, True) == expected


def test_a_named_chat_template_is_taken(folder, seal, site):
    named = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    expected = ov_genai.Tokenizer(folder).chat_template
    with load_llm(seal(folder, "named"), keys=site) as llm:
        assert llm.get_tokenizer().chat_template == expected == named[1]["template"]


def special_tokens(tokenizer) -> list[object]:
    names = [f"{name}_token{what}" for name in ("bos", "eos", "pad") for what in ("", "_id")]
    return [getattr(tokenizer, f"get_{name}")() for name in names]


@pytest.mark.parametrize("config", [{"bos_token_id": 5, "eos_token_id": [1, 3]}, {}, None])
@pytest.mark.parametrize("lacking", ["bos", "eos", "pad", "bos|eos|pad"])
def test_special_tokens_that_only_config_json_knows(lacking, config, folder, seal, site):
    graph = folder / "openvino_tokenizer.xml"
    graph.write_text(re.sub(rf'<({lacking})_token_id value="\d+" />', "", graph.read_text()))
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    if config is None:
        (folder / "config.json").unlink()
    elif config:
        (folder / "config.json").write_text(json.dumps(config))
    plain = ov_genai.LLMPipeline(folder, "CPU")
    with load_llm(seal(folder, "tokens"), keys=site) as llm:
        assert special_tokens(llm.get_tokenizer()) == special_tokens(plain.get_tokenizer())
        ends = [each.get_generation_config().eos_token_id for each in (llm, plain)]
        assert ends[0] == ends[1]


def test_without_memfds_a_generation_config_may_be_given(sealed, site, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refused)
    with pytest.raises(KeymgmtError, match="in memory: Operation not permitted") as caught:
        load_llm(sealed, keys=site)
    assert "generation_config=" in str(caught.value.hint)
    with load_llm(sealed, keys=site, generation_config=ov_genai.GenerationConfig()) as llm:
        assert llm.generate(PROMPTS[0], **GREEDY)


def test_the_folders_generation_config_counts(folder, seal, site):
    (folder / "generation_config.json").write_text('{"max_new_tokens": 3, "eos_token_id": 1}')
    with load_llm(seal(folder, "short"), keys=site) as llm:
        assert llm.get_generation_config().max_new_tokens == 3
    own = ov_genai.GenerationConfig(max_new_tokens=5)
    with load_llm(seal(folder, "short"), keys=site, generation_config=own) as llm:
        assert llm.get_generation_config().max_new_tokens == 5


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("openvino_tokenizer.xml", "lacks openvino_tokenizer.xml"),
        ("openvino_detokenizer.xml", "lacks openvino_detokenizer.xml"),
        ("openvino_model.xml", "lacks openvino_model.xml"),
    ],
)
def test_a_folder_that_lacks_a_part(missing, said, folder, seal, site):
    (folder / missing).unlink()
    with pytest.raises(FormatError, match=said) as caught:
        load_llm(seal(folder, "lacking"), keys=site)
    assert "optimum-cli" in str(caught.value.hint)


def test_a_graph_larger_than_the_free_memory(folder, seal, site, monkeypatch):
    graph = folder / "openvino_model.xml"
    graph.write_text(graph.read_text() + " " * (2 << 20))
    monkeypatch.setattr(free_memory, "free_memory", lambda: 1 << 20)
    with pytest.raises(KeymgmtError, match="needs 2 MiB of memory and 1 MiB are free"):
        load_llm(seal(folder, "long"), keys=site)


def test_a_model_of_another_pipeline(seal, site):
    with pytest.raises(FormatError, match="is not a language model") as caught:
        load_llm(seal(HERE / "models" / "whisper", "whisper"), keys=site)
    assert "load_path_pipeline" in str(caught.value.hint)


def test_a_held_tokenizer_is_named(sealed, site, watched):
    llm = load_llm(sealed, keys=site)
    tokenizer = llm.get_tokenizer()
    with pytest.raises(ModelInUse, match="or its pipeline or tokenizer is held elsewhere"):
        llm.close(strict=True)
    assert tokenizer.encode("Hello").input_ids.data.size
    del tokenizer
    until(lambda: all(memory.zeros() for memory in watched))


def test_a_tokenizer_of_another_version(folder, seal, site, watched):
    tokenizer = folder / "openvino_tokenizer.xml"
    tokenizer.write_text(
        tokenizer.read_text().replace('"BPETokenizer"', '"BPETokenizerOfNextYear"')
    )
    with pytest.raises(KeymgmtError, match="cannot read the tokenizer of newer"):
        load_llm(seal(folder, "newer"), keys=site)
    gc.collect()
    until(lambda: all(memory.zeros() for memory in watched))


@pytest.mark.parametrize("options", [{}, {"generation_config": "x"}], ids=["graph", "option"])
def test_what_genai_refuses_leaves_zeros(options, folder, seal, site, watched):
    if not options:
        graph = folder / "openvino_model.xml"
        graph.write_text(graph.read_text().replace('type="Gather"', 'type="GatherOfNextYear"'))
    with pytest.raises((KeymgmtError, TypeError)) as caught:
        load_llm(seal(folder, "refused"), keys=site, **options)
    assert len(watched) == 3
    del caught  # a TypeError's frames hold the weights
    gc.collect()
    until(lambda: all(memory.zeros() for memory in watched))


def test_configs_that_are_no_json(folder, seal, site):
    (folder / "tokenizer_config.json").write_text("{not json")
    with pytest.raises(FormatError, match=r"tokenizer_config\.json"):
        load_llm(seal(folder, "broken"), keys=site)


def test_broken_weights_leave_zeros(sealed, site, watched, tmp_path):
    damaged = Path(shutil.copytree(sealed, tmp_path / "damaged.sealed"))
    payload = damaged / "payload" / "openvino_model.bin.floe"
    flip_in(payload, 5000)
    with pytest.raises(IntegrityError, match=r"openvino_model\.bin"):
        load_llm(damaged, keys=site)
    gc.collect()
    until(lambda: all(memory.zeros() for memory in watched))


def test_a_cache_is_refused(sealed, site):
    with pytest.raises(ConfigError, match="CACHE_DIR"):
        load_path_pipeline(ov_genai.LLMPipeline, sealed, keys=site, CACHE_DIR="cache")


@pytest.mark.parametrize(
    "options",
    [
        {"CACHE_DIR": "cache"},
        {"BLOB_PATH": "model.blob", "EXPORT_BLOB": True},
        {"DEVICE_PROPERTIES": {"NPU": {"BLOB_PATH": "model.blob"}}},
        {"NPUW_CACHE_DIR": "cache"},
        {"NPUW_DUMP_SUBS": "YES"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_writes_a_model_to_a_disk_is_refused(options, sealed, site):
    with pytest.raises(ConfigError, match="is refused for a sealed model"):
        load_llm(sealed, keys=site, **options)


def test_closing_while_it_generates(sealed, site, watched):
    started, go_on, said = threading.Event(), threading.Event(), []

    def slowly(_: str) -> None:
        started.set()
        go_on.wait(30)

    options = {"max_new_tokens": 40, "do_sample": False, "ignore_eos": True}
    reference = ov_genai.LLMPipeline(TINY, "CPU").generate(PROMPTS[0], **options)
    llm = load_llm(sealed, keys=site)
    thread = threading.Thread(
        target=lambda: said.append(llm.generate(PROMPTS[0], streamer=slowly, **options))
    )
    thread.start()
    assert started.wait(30)
    with pytest.raises(ModelInUse, match="a generation is running"):
        llm.close(strict=True)
    assert not watched[-1].zeros()
    go_on.set()
    thread.join(60)
    assert said == [reference]
    until(lambda: all(memory.zeros() for memory in watched))
    llm.close()


def lora(path: Path, scale: float) -> None:
    """A LoRA adapter of rank 4 for the first layer's query and value, as safetensors."""
    random = np.random.default_rng(3)
    tensors = {}
    for target, size in (("q_proj", 64), ("v_proj", 32)):
        base = f"base_model.model.model.layers.0.self_attn.{target}"
        tensors[f"{base}.lora_A.weight"] = random.standard_normal((4, 64)).astype(np.float32)
        tensors[f"{base}.lora_B.weight"] = scale * random.standard_normal((size, 4)).astype(
            np.float32
        )
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_lora_adapter_from_memory(sealed, site, seal, tmp_path, expected, watched):
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora(folder / "adapter_model.safetensors", 3.0)
    adapters = ov_genai.AdapterConfig(ov_genai.Adapter(folder / "adapter_model.safetensors"))
    plain = ov_genai.LLMPipeline(TINY, "CPU", adapters=adapters)
    reference = [plain.generate(prompt, **GREEDY) for prompt in PROMPTS]
    adapter = load_adapter(seal(folder, "adapter"), keys=site)
    with load_llm(sealed, keys=site, adapters=ov_genai.AdapterConfig(adapter)) as llm:
        assert [llm.generate(prompt, **GREEDY) for prompt in PROMPTS] == reference
    assert reference != expected
    with pytest.raises(FormatError, match=r"nothing\.safetensors"):
        load_adapter(seal(folder, "adapter"), "nothing.safetensors", keys=site)


def test_an_adapter_that_genai_refuses_leaves_zeros(seal, site, tmp_path, watched):
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora(folder / "adapter_model.safetensors", 3.0)
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 8 + content[8:])
    with pytest.raises(KeymgmtError, match="cannot read adapter_model"):
        load_adapter(seal(folder, "adapter"), keys=site)
    gc.collect()
    assert len(watched) == 1
    until(lambda: all(memory.zeros() for memory in watched))


CYCLES = """
import ctypes, gc, os, sys
from pathlib import Path
from keymgmt_openvino.genai import load_llm
import openvino_genai as ov_genai
kind, plain, sealed, config, loads = sys.argv[1:]
options = dict(max_new_tokens=2, do_sample=False)
def cycle():
    if kind == "plain":
        ov_genai.LLMPipeline(plain, "CPU", ATTENTION_BACKEND="SDPA").generate("Hello", **options)
    else:
        with load_llm(sealed, keys=config, ATTENTION_BACKEND="SDPA") as llm:
            llm.generate("Hello", **options)
def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
for _ in range(5):
    cycle()
before, files = resident(), len(os.listdir("/proc/self/fd"))
for _ in range(int(loads)):
    cycle()
print(resident() - before, len(os.listdir("/proc/self/fd")) - files)
"""


@pytest.mark.once
def test_many_loads_grow_no_more_than_those_of_plaintext(sealed, site):
    """OpenVINO 2026.4 itself keeps something of each graph that it compiled."""
    loads = 100 if os.environ.get("KEYMGMT_TEST_NIGHTLY") else 40
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CYCLES, kind, TINY, sealed, site.path, str(loads)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in ("plain", "sealed")
    ]
    said = [child.communicate(timeout=240)[0] for child in children]
    (plain, _), (ours, files) = (map(int, line.split()) for line in said)
    assert files == 0
    assert ours < plain + (10 << 20)  # a leak of the weights alone would be 18 MB after 40 loads


LOADS_LLM = """
import sys
import keymgmt_openvino
kind, path, config = sys.argv[1:]
if kind == "plain":
    import openvino_genai
    llm = openvino_genai.LLMPipeline(path, "CPU")
else:
    from keymgmt_openvino.genai import load_llm
    llm = load_llm(path, keys=config)
said = llm.generate("Hello there", max_new_tokens=4, do_sample=False)
print(peak_kib(), repr(said))
"""


def test_peak_memory_is_that_of_a_plaintext_load(seal, site, tmp_path):
    plain = tmp_path / "large"
    script = [sys.executable, HERE / "large_llm.py"]
    subprocess.run([*script, TINY, plain, "512"], check=True, timeout=120)
    found = {}
    for kind, path in (("plain", plain), ("sealed", seal(plain, "large"))):
        done = run_python(PEAK_KIB + LOADS_LLM, kind, path, site.path)
        assert done.returncode == 0, done.stderr
        peak, said = done.stdout.split(maxsplit=1)
        found[kind] = int(peak), said
    assert found["sealed"][1] == found["plain"][1]
    assert found["plain"][0] > 512 << 10  # the weights are in it, so the ratio means something
    assert found["sealed"][0] <= 1.05 * found["plain"][0]


def test_genai_is_imported_only_when_it_is_used():
    assert genai.ov_genai is ov_genai
    program = "import sys, keymgmt_openvino; print('openvino_genai' in sys.modules)"
    done = run_python(program)
    assert done.stdout == "False\n"
