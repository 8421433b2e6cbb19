"""A language model that is one file: GenAI's reader of GGUF, from a sealed model."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import keymgmt_openvino  # noqa: F401 - before OpenVINO: no telemetry
import numpy as np
import pytest
from keymgmt_openvino import load
from keymgmt_openvino.genai import load_path_pipeline

import keymgmt
from keymgmt.errors import ConfigError, KeymgmtError

pytestmark = pytest.mark.once

VOCABULARY, WIDTH, LAYERS = 300, 64, 2
MERGES = ["h e", "l l", "o w"]


def letters() -> list[str]:
    """The 256 bytes as GPT-2's vocabulary spells them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


def write_llama(path: Path) -> Path:
    """A tiny random Llama with a byte-level tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(0)
    words = [*letters(), *(merge.replace(" ", "") for merge in MERGES)]
    special = [f"<|{number}|>" for number in range(len(words), VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(words + special)
    writer.add_token_merges(MERGES)
    writer.add_token_types([1] * len(words) + [3] * len(special))
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_pad_token_id(VOCABULARY - 3)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    random = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        kind = np.float16 if len(shape) > 1 else np.float32
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * 0.1).astype(kind))

    tensor("token_embd", VOCABULARY, WIDTH)
    tensor("output_norm", WIDTH)
    tensor("output", VOCABULARY, WIDTH)
    for number in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{number}.{name}", WIDTH)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{number}.{name}", WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            tensor(f"blk.{number}.{name}", 2 * WIDTH, WIDTH)
        tensor(f"blk.{number}.ffn_down", WIDTH, 2 * WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory, seal) -> tuple[Path, Path]:
    """A plaintext GGUF and its sealed copy."""
    if importlib.util.find_spec("gguf") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("install gguf")
    plain = write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    return plain, seal(plain, "llama")


def test_it_answers_as_plaintext(llama, site):
    import openvino_genai

    plain, sealed = llama
    assert keymgmt.inspect(sealed).manifest.main == "tiny.gguf"
    answers = [
        pipeline.generate("hello", max_new_tokens=8, ignore_eos=True)
        for pipeline in (
            openvino_genai.LLMPipeline(plain, "CPU"),
            load_path_pipeline(openvino_genai.LLMPipeline, sealed, keys=site, file="tiny.gguf"),
        )
    ]
    assert answers[0] == answers[1] != ""


def test_genai_is_kept_from_writing_the_converted_model(llama, site, tmp_path):
    import openvino_genai

    plain, sealed = llama
    with pytest.raises(ConfigError, match="ENABLE_SAVE_OV_MODEL is refused"):
        load_path_pipeline(
            openvino_genai.LLMPipeline,
            sealed,
            keys=site,
            file="tiny.gguf",
            enable_save_ov_model=True,
        )
    # It would have: the option is this GenAI's.
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(plain.read_bytes())
    openvino_genai.LLMPipeline(copy, "CPU", enable_save_ov_model=True)
    assert (tmp_path / "openvino_model.bin").exists()


def test_load_says_who_reads_it(llama, site):
    with pytest.raises(KeymgmtError, match=r"tiny\.gguf") as caught:
        load(llama[1], keys=site)
    assert "load_path_pipeline" in caught.value.hint
