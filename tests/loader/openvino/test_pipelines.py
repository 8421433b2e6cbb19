"""Each pipeline of OpenVINO GenAI from a sealed folder, by path, on a real model of its kind.

The models are tiny and random, so that only "as plaintext" says something; but all-MiniLM-L6-v2 is
a trained one. How they were made: models/README.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run

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
    subprocess.run([sys.executable, HERE / "embedder.py", minilm_directory, folder], check=True)
    return folder


@pytest.fixture(scope="module")
def answers(embedder, seal, site) -> dict[str, dict]:
    """What ``pipelines.py`` says, by kind."""
    folders = FOLDERS | {"TextEmbeddingPipeline": embedder}
    sealed = {folder: seal(folder, folder.name) for folder in set(folders.values())}
    done = run(
        *(sys.executable, HERE / "pipelines.py", site.path),
        *(f"{kind}={folder}={sealed[folder]}" for kind, folder in folders.items()),
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
