"""A language model that is one file: GenAI's reader of GGUF, from a sealed model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keymgmt_openvino  # noqa: F401 - before OpenVINO: no telemetry
import pytest
from keymgmt_openvino import load
from keymgmt_openvino.genai import load_path_pipeline

import keymgmt
from keymgmt.errors import ConfigError, KeymgmtError

pytestmark = pytest.mark.once

LLAMA = Path(__file__).parents[2] / "shared" / "llama.py"


@pytest.fixture(scope="module")
def llama(tmp_path_factory, seal) -> tuple[Path, Path]:
    """A plaintext GGUF and its sealed copy."""
    if importlib.util.find_spec("gguf") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("install gguf")
    plain = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    subprocess.run([sys.executable, LLAMA, plain], check=True)
    return plain, seal(plain, "llama")


def test_it_answers_as_plaintext(llama, site):
    import openvino_genai

    plain, sealed = llama
    assert keymgmt.inspect(sealed).manifest.main == "tiny.gguf"
    answers = [
        pipeline.generate("hello there", max_new_tokens=24, ignore_eos=True)
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
