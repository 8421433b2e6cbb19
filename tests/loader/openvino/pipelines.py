"""Every pipeline of OpenVINO GenAI that takes a path: sealed beside plaintext.

usage: pipelines.py CONFIG KIND=PLAIN=SEALED ...
For each prints a line of JSON: the kind, whether the answers are the same, and what the sealed one
answered, to more than one input. A program of its own, since a mount makes its process
non-dumpable.
"""

import contextlib
import gc
import hashlib
import json
import os
import sys
from pathlib import Path

import keymgmt_openvino  # noqa: F401 - before OpenVINO: no telemetry
import numpy as np
import openvino as ov
import openvino_genai as g
from keymgmt_openvino.genai import load_draft_model, load_llm, load_path_pipeline

PROMPTS = ["Hello there", "the yellow"]
GREEDY = {"max_new_tokens": 16, "do_sample": False}
RANDOM = np.random.default_rng(5)
IMAGES = [ov.Tensor(RANDOM.integers(0, 255, (1, 16, 16, 3), np.uint8)) for _ in range(2)]
TONE = 0.5 * np.sin(np.arange(16000) * (2 * np.pi * 440 / 16000))
SOUNDS = [TONE.astype(np.float32), RANDOM.standard_normal(16000).astype(np.float32)]
SPEAKER = ov.Tensor(np.full((1, 512), 0.1, np.float32))
SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "Quarterly revenue grew by ten percent.",
]


def digest(tensor):
    return hashlib.sha256(np.ascontiguousarray(tensor.data).tobytes()).hexdigest()


def llm(pipeline):
    return [pipeline.generate(prompt, **GREEDY) for prompt in PROMPTS]


def batched(directory, device):
    return g.ContinuousBatchingPipeline(directory, g.SchedulerConfig(), device)


def batches(pipeline):
    options = [g.GenerationConfig(**GREEDY) for _ in PROMPTS]
    return [each.m_generation_ids for each in pipeline.generate(PROMPTS, options)]


def assisted(directory, device):
    draft = g.draft_model(directory, device)
    return g.LLMPipeline(directory, device, draft_model=draft)


def drafts(pipeline):
    options = GREEDY | {"num_assistant_tokens": 3}
    return [pipeline.generate(prompt, **options) for prompt in PROMPTS]


def embedder(directory, device):
    config = g.TextEmbeddingPipeline.Config(
        pooling_type=g.TextEmbeddingPipeline.PoolingType.MEAN, normalize=True
    )
    return g.TextEmbeddingPipeline(directory, device, config)


def cosines(pipeline):
    one, *others = np.array(pipeline.embed_documents(SENTENCES))
    return [float(one @ other) for other in others]


def ranks(pipeline):
    return [pipeline.rerank(prompt, SENTENCES) for prompt in PROMPTS]


def transcripts(pipeline):
    options = {"max_new_tokens": 16, "language": "<|en|>", "task": "transcribe"}
    return [pipeline.generate(sound.tolist(), **options).texts for sound in SOUNDS]


def heard(pipeline):
    return [pipeline.generate(sound.tolist(), max_new_tokens=16).texts for sound in SOUNDS]


def descriptions(pipeline):
    return [pipeline.generate("hi", images=[each], **GREEDY).texts for each in IMAGES]


def pictures(pipeline):
    size = {"width": 16, "height": 16, "num_inference_steps": 2, "rng_seed": 1}
    return [digest(pipeline.generate(prompt, **size)) for prompt in PROMPTS]


def changed_pictures(pipeline):
    options = {"strength": 0.8, "num_inference_steps": 4, "rng_seed": 1}
    return [digest(pipeline.generate("a cat", each, **options)) for each in IMAGES]


def filled_pictures(pipeline):
    mask = np.zeros((1, 16, 16, 3), np.uint8)
    mask[:, :8] = 255
    options = {"strength": 0.8, "num_inference_steps": 4, "rng_seed": 1}
    return [digest(pipeline.generate("a cat", each, ov.Tensor(mask), **options)) for each in IMAGES]


def speech(pipeline):
    # Looked at before the next one is made: GenAI 2026.4 gives each in the same memory.
    return [
        [digest(each) for each in pipeline.generate(text, SPEAKER).speeches] for text in PROMPTS
    ]


KINDS = {
    "LLMPipeline": (g.LLMPipeline, llm),
    "ContinuousBatchingPipeline": (batched, batches),
    "draft_model": (assisted, drafts),
    "TextEmbeddingPipeline": (embedder, cosines),
    "TextRerankPipeline": (g.TextRerankPipeline, ranks),
    "WhisperPipeline": (g.WhisperPipeline, transcripts),
    "ASRPipeline": (g.ASRPipeline, heard),
    "VLMPipeline": (g.VLMPipeline, descriptions),
    "Text2ImagePipeline": (g.Text2ImagePipeline, pictures),
    "Image2ImagePipeline": (g.Image2ImagePipeline, changed_pictures),
    "InpaintingPipeline": (g.InpaintingPipeline, filled_pictures),
    "Text2SpeechPipeline": (g.Text2SpeechPipeline, speech),
}


def kept():
    """Descriptors of the mounts' files that are open still, and how many a program inherits."""
    descriptors = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one of the listing
            if "memfd:keymgmt" in str(link.readlink()):
                descriptors.append(int(link.name))
    return len(descriptors), sum(map(os.get_inheritable, descriptors))


def assisted_from_memory(sealed, config):
    """A language model from memory, whose draft model is mounted while it is built."""
    draft = load_draft_model(sealed, keys=config)
    with load_llm(sealed, keys=config, draft_model=draft) as pipeline:
        return drafts(pipeline)


def main(config, *models):
    for model in models:
        kind, plain, sealed = model.split("=")
        make, use = KINDS[kind]
        expected = use(make(plain, "CPU"))
        pipeline = load_path_pipeline(make, sealed, keys=config)
        inherited = kept()[1]
        said = use(pipeline)
        del pipeline
        gc.collect()
        line = {
            "kind": kind,
            "same": said == expected,
            "said": said,
            "inherited": inherited,
            "left": kept()[0],
        }
        if kind == "draft_model":
            line["same from memory"] = assisted_from_memory(sealed, config) == expected
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
