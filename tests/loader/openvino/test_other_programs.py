"""Each way of docs/other-programs.md, run as it stands there, answers as from plaintext."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from programs import run_python

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "other-programs.md"
BLOCKS = dict(
    zip(
        ["onnxruntime", "model_api", "optimum", "ultralytics"],
        re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL),
        strict=True,
    )
)
BEFORE = """
import os
import keymgmt_openvino  # before OpenVINO: no telemetry
import numpy as np
random = np.random.default_rng(0)
image = (random.random((48, 192, 3)) * 255).astype("uint8")
batch = random.standard_normal((1, 3, 96, 96)).astype("float32")
"""
# What is done with each when it is there, and the same from plaintext.
SESSION = "answer = session.run(None, {session.get_inputs()[0].name: batch})[0]"
MODEL_API = "answer = [label.confidence for label in model(image).top_labels]"
GENERATE = """
import torch
answer = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
"""
PREDICT = "answer = model.predict(image, imgsz=64, verbose=False, conf=0.0)[0].boxes.data"
AFTER = {
    "onnxruntime": SESSION,
    "model_api": MODEL_API,
    "optimum": GENERATE,
    "ultralytics": PREDICT,
}
PLAIN = {
    "onnxruntime": 'import onnxruntime; session = onnxruntime.InferenceSession("plain/det.onnx")',
    "model_api": BLOCKS["model_api"]
    .replace('with keymgmt.mount("cls.sealed", name="cls") as folder:', "if True:")
    .replace('folder / "cls.xml"', '"plain/cls.xml"'),
    "optimum": "from optimum.intel import OVModelForCausalLM\n"
    'model = OVModelForCausalLM.from_pretrained("plain/llm", device="cpu")',
    "ultralytics": "from ultralytics import YOLO\n"
    'model = YOLO("plain/yolo/yolo11n_openvino_model", task="detect")',
}
YOLO = """
import os, sys
os.chdir(sys.argv[1])
from ultralytics import YOLO
YOLO("yolo11n.yaml").export(format="openvino", imgsz=64)
"""


def needs(*packages: str) -> None:
    for name in packages:
        if importlib.util.find_spec(name) is None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"install {name}")


def detector() -> Path:
    return Path(importlib.util.find_spec("rapidocr").submodule_search_locations[0]) / "models"


def prepare(kind: str, plain: Path) -> tuple[Path, str]:
    """Make the plaintext model of a block in ``plain``; what is sealed, and its name."""
    if kind == "onnxruntime":
        needs("onnxruntime", "rapidocr")
        shutil.copy(detector() / "PP-OCRv6_det_small.onnx", plain / "det.onnx")
        return plain / "det.onnx", "det"
    if kind == "model_api":
        needs("model_api", "rapidocr")
        graph = ov.convert_model(detector() / "ch_ppocr_mobile_v2.0_cls_mobile.onnx")
        graph.reshape([1, 3, 48, 192])
        ov.save_model(graph, plain / "cls.xml", compress_to_fp16=False)
        return plain / "cls.xml", "cls"
    if kind == "optimum":
        pytest.importorskip("optimum.intel", reason="tox -e other-programs has it")
        return Path(shutil.copytree(HERE / "tiny-llm", plain / "llm")), "llm"
    pytest.importorskip("ultralytics", reason="tox -e other-programs has it")
    (plain / "yolo").mkdir()
    command = [sys.executable, "-c", YOLO, plain / "yolo"]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    for file in plain.glob("yolo/*.*"):
        file.unlink()
    return plain / "yolo", "yolo"


def answer(program: str, here: Path, config: Path) -> np.ndarray:
    done = run_python(
        f"{BEFORE}{program}\nnp.save('answer.npy', np.asarray(answer))",
        cwd=here,
        env={**os.environ, "KEYMGMT_CONFIG": str(config), "HOME": str(here)},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return np.load(here / "answer.npy")


@pytest.mark.once
@pytest.mark.parametrize(
    "kind",
    [
        "onnxruntime",
        "model_api",
        # These bring PyTorch.
        pytest.param("optimum", marks=pytest.mark.nightly),
        pytest.param("ultralytics", marks=pytest.mark.nightly),
    ],
)
def test_a_library_answers_as_from_plaintext(kind, tmp_path, seal, site):
    plain = tmp_path / "plain"
    plain.mkdir()
    source, name = prepare(kind, plain)
    expected = answer(f"{PLAIN[kind]}\n{AFTER[kind]}", tmp_path, site.path)
    shutil.move(seal(source, name), tmp_path / f"{name}.sealed")
    shutil.rmtree(plain)
    found = answer(f"{BLOCKS[kind]}\n{AFTER[kind]}", tmp_path, site.path)
    assert expected.size
    assert found.tobytes() == expected.tobytes()
    assert not list(tmp_path.rglob("*.blob"))
