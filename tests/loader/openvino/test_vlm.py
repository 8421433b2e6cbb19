"""Vision language models from memory: the same tokens for an image, the same rules for memory."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import keymgmt_openvino  # noqa: F401 - before OpenVINO: no telemetry
import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest
from bits import flip_in
from keymgmt_openvino.genai import load_llm, load_vlm
from programs import run_python
from waiting import until

from keymgmt.errors import ConfigError, FormatError, IntegrityError, KeymgmtError, ModelInUse

LLAVA = Path(__file__).parent / "models" / "llava"
GREEDY = {"max_new_tokens": 16, "do_sample": False}
RANDOM = np.random.default_rng(5)
IMAGES = [ov.Tensor(RANDOM.integers(0, 255, (1, 16, 16, 3), np.uint8)) for _ in range(2)]


def describe(pipeline) -> list[list[str]]:
    images = ([IMAGES[0]], [IMAGES[1]], IMAGES, [])
    return [pipeline.generate("what is it", images=each, **GREEDY).texts for each in images]


@pytest.fixture(autouse=True)
def dumpable_again() -> Iterator[None]:
    """``load_vlm`` makes this process non-dumpable, which later tests do not expect."""
    yield
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)


@pytest.fixture(scope="module")
def sealed(seal) -> Path:
    return seal(LLAVA, "llava")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the plain folder, to be changed and sealed."""
    return Path(shutil.copytree(LLAVA, tmp_path / "vlm"))


@pytest.mark.parametrize("options", [{}, {"ATTENTION_BACKEND": "SDPA"}], ids=["default", "sdpa"])
def test_greedy_tokens_are_those_of_plaintext(options, sealed, site, watched):
    expected = describe(ov_genai.VLMPipeline(LLAVA, "CPU", **options))
    with load_vlm(sealed, name="llava", keys=site, **options) as vlm:
        assert describe(vlm) == expected
        # One copy of the weights: what OpenVINO reads is ours, until the end.
        large = [memory for memory in watched if memory.size > 50_000]
        assert len(large) == 3
        assert all(memory.in_use() for memory in large)
        assert len({said for (said,) in expected}) == len(expected)  # the images matter
    until(lambda: all(memory.zeros() for memory in watched))


def test_only_the_small_files_are_mounted_and_only_while_it_loads(sealed, site):
    program = """
import os, sys
from keymgmt_openvino import genai
import openvino_genai
class Pipeline(openvino_genai.VLMPipeline):
    def __init__(self, models, tokenizer, folder, *rest, **options):
        print(*sorted(path.name for path in folder.iterdir()))
        super().__init__(models, tokenizer, folder, *rest, **options)
        self.folder = folder
openvino_genai.VLMPipeline = Pipeline
before = len(os.listdir("/proc/self/fd"))
with genai.load_vlm(sys.argv[1], keys=sys.argv[2]) as vlm:
    print(vlm.folder.exists())
    print(sum("memfd:keymgmt" in line for line in open("/proc/self/maps")))
print(len(os.listdir("/proc/self/fd")) - before)
"""
    done = run_python(program, sealed, site.path)
    assert done.returncode == 0, done.stderr
    names, *rest = done.stdout.splitlines()
    plain = {path.name for path in LLAVA.iterdir()}
    assert set(names.split()) == {name for name in plain if not name.startswith("openvino_")}
    assert rest == ["False", "0", "0"]


@pytest.mark.parametrize(
    "missing",
    [
        "openvino_tokenizer.xml",
        "openvino_detokenizer.xml",
        "openvino_language_model.xml",
        "openvino_text_embeddings_model.xml",
        "openvino_vision_embeddings_model.xml",
    ],
)
def test_a_folder_that_lacks_a_part(missing, folder, seal, site):
    (folder / missing).unlink()
    with pytest.raises(FormatError, match=f"is not a vision language model: it lacks {missing}"):
        load_vlm(seal(folder, "lacking"), keys=site)


def test_each_loader_names_the_other(sealed, seal, site):
    with pytest.raises(FormatError, match="is a vision language model") as caught:
        load_llm(sealed, keys=site)
    assert "load_vlm" in str(caught.value.hint)
    tiny = seal(LLAVA.parent.parent / "tiny-llm", "tiny-llm")
    with pytest.raises(FormatError, match="is not a vision language model"):
        load_vlm(tiny, keys=site)


def test_a_cache_is_refused(sealed, site):
    with pytest.raises(ConfigError, match="CACHE_DIR"):
        load_vlm(sealed, keys=site, CACHE_DIR="cache")


@pytest.mark.parametrize(
    "broken", ["preprocessor_config.json", "openvino_vision_embeddings_model.xml"]
)
def test_what_genai_refuses_leaves_zeros(broken, folder, seal, site, watched):
    (folder / broken).write_text("{not json, nor xml")
    with pytest.raises(KeymgmtError, match="OpenVINO GenAI cannot build broken"):
        load_vlm(seal(folder, "broken"), keys=site)
    gc.collect()
    assert len(watched) == 5
    until(lambda: all(memory.zeros() for memory in watched))


def test_damaged_weights_leave_zeros(sealed, site, watched, tmp_path):
    damaged = Path(shutil.copytree(sealed, tmp_path / "damaged.sealed"))
    payload = damaged / "payload" / "openvino_vision_embeddings_model.bin.floe"
    flip_in(payload, 5000)
    with pytest.raises(IntegrityError, match=r"openvino_vision_embeddings_model\.bin"):
        load_vlm(damaged, keys=site)
    gc.collect()
    until(lambda: all(memory.zeros() for memory in watched))


def test_closing_while_it_generates(sealed, site, watched):
    started, go_on, said = threading.Event(), threading.Event(), []

    def slowly(_: str) -> None:
        started.set()
        go_on.wait(30)

    options = {"images": IMAGES[:1], "max_new_tokens": 40, "do_sample": False, "ignore_eos": True}
    reference = ov_genai.VLMPipeline(LLAVA, "CPU").generate("hi", **options).texts
    vlm = load_vlm(sealed, keys=site)
    thread = threading.Thread(
        target=lambda: said.append(vlm.generate("hi", streamer=slowly, **options).texts)
    )
    thread.start()
    assert started.wait(30)
    with pytest.raises(ModelInUse, match="a generation is running"):
        vlm.close(strict=True)
    assert not watched[-1].zeros()
    go_on.set()
    thread.join(60)
    assert said == [reference]
    until(lambda: all(memory.zeros() for memory in watched))
    vlm.close()


def test_a_system_that_cannot_keep_the_small_files_is_refused(sealed, site, watched, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refused)
    with pytest.raises(KeymgmtError, match="memfd: Operation not permitted"):
        load_vlm(sealed, keys=site)
    assert watched == []
