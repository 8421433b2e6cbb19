"""Each pipeline of OpenVINO GenAI from a sealed folder, by path, on a real model of its kind.

The models are tiny and random, so that only "as plaintext" says something; but all-MiniLM-L6-v2 is
a trained one. How they were made: models/README.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
MODELS = HERE / "models"
FOLDERS = {
    "LLMPipeline": HERE / "tiny-llm",
    "ContinuousBatchingPipeline": HERE / "tiny-llm",
    "draft_model": HERE / "tiny-llm",
    "TextRerankPipeline": MODELS / "reranker",
    "WhisperPipeline": MODELS / "whisper",
    "ASRPipeline": MODELS / "whisper",
    "VLMPipeline": MODELS / "llava",
    "Text2ImagePipeline": MODELS / "diffusion",
    "Image2ImagePipeline": MODELS / "diffusion",
    "InpaintingPipeline": MODELS / "diffusion",
    "Text2SpeechPipeline": MODELS / "speecht5",
}


@pytest.fixture(scope="module")
def embedder(minilm_directory, tmp_path_factory) -> Path:
    """all-MiniLM-L6-v2 with its own tokenizer, as a text embedding pipeline takes it."""
    folder = tmp_path_factory.mktemp("embedder") / "embedder"
    folder.mkdir()
    script, graph = HERE / "minilm_ir.py", folder / "openvino_model.xml"
    subprocess.run([sys.executable, script, minilm_directory, graph, "hidden"], check=True)
    shutil.copy(minilm_directory / "config.json", folder)
    shutil.copy(MODELS / "minilm-tokenizer" / "openvino_tokenizer.xml", folder)
    rest = (MODELS / "minilm-tokenizer" / "openvino_tokenizer.bin.rest").read_bytes()
    words = (minilm_directory / "vocab.txt").read_bytes().rstrip(b"\n").split(b"\n")
    # The vocabulary as the graph has it: where each word begins, where it ends, and the letters.
    edges = np.array([0, *accumulate(map(len, words))], np.int32)
    vocabulary = edges[:-1].tobytes() + edges[1:].tobytes() + b"".join(words)
    (folder / "openvino_tokenizer.bin").write_bytes(rest[:345] + vocabulary + rest[345:])
    return folder


@pytest.fixture(scope="module")
def answers(embedder, seal, site) -> dict[str, dict]:
    """What ``pipelines.py`` says, by kind."""
    folders = FOLDERS | {"TextEmbeddingPipeline": embedder}
    sealed = {folder: seal(folder, folder.name) for folder in set(folders.values())}
    done = subprocess.run(
        [
            *(sys.executable, HERE / "pipelines.py", site.path),
            *(f"{kind}={folder}={sealed[folder]}" for kind, folder in folders.items()),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["kind"]: line for line in lines}


@pytest.mark.parametrize("kind", [*FOLDERS, "TextEmbeddingPipeline"])
def test_a_mounted_pipeline_answers_as_plaintext(kind, answers):
    answer = answers[kind]
    assert answer["same"]
    first, second = answer["said"]
    assert first != second  # it is the input that was answered
    assert (answer["inherited"], answer["left"]) == (0, 0)


def test_a_mounted_draft_model_serves_one_from_memory(answers):
    assert answers["draft_model"]["same from memory"]
    assert answers["draft_model"]["said"] == answers["LLMPipeline"]["said"]


def test_embeddings_are_sensible(answers):
    related, unrelated = answers["TextEmbeddingPipeline"]["said"]
    assert related == pytest.approx(0.7553, abs=2e-3)
    assert unrelated < 0.1
