"""Real programs under ``keymgmt exec``: each answers as it does from the plain files.

One row of the table in docs/exec.md each, and by ``private_folder`` of docs/other-programs.md. They
run in the environment ``runtimes``, which has them.
"""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from programs import run

np = pytest.importorskip("numpy")
onnx = pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("gguf")
pytest.importorskip("ik_llama_cpp")
pytest.importorskip("onnxruntime")

WIDTH = 64
LLAMA = Path(__file__).parents[1] / "shared" / "llama.py"
# Without keymgmt: an import of it would fail.
WITHOUT = "import sys; sys.modules['keymgmt'] = sys.modules['openvino_telemetry'] = None\n"

PROGRAMS = {
    "llama.cpp": """
from ik_llama_cpp import IkLlama
model = IkLlama(f"{folder}/tiny.gguf", n_ctx=64, n_threads=1, flash_attn=False, verbose=False)
print(model.generate([256, 97, 98], max_tokens=8))
""",
    "onnxruntime": """
import numpy, onnxruntime
session = onnxruntime.InferenceSession(f"{folder}/net.onnx")
print(session.run(None, {"x": numpy.ones((1, 64), numpy.float32)})[0].tobytes().hex())
""",
    "OpenVINO": """
import numpy, openvino
model = openvino.Core().compile_model(f"{folder}/net.xml", "CPU")
print(model(numpy.ones((1, 64), numpy.float32))[0].tobytes().hex())
""",
    "safetensors": """
from safetensors import safe_open
with safe_open(f"{folder}/w.safetensors", "numpy") as file:
    print(file.get_tensor("w").tobytes().hex())
""",
    "tokenizers": """
from tokenizers import Tokenizer
print(Tokenizer.from_file(f"{folder}/tokenizer.json").encode("ab ba").ids)
""",
}


def write_models(folder: Path) -> None:
    subprocess.run([sys.executable, LLAMA, folder / "tiny.gguf"], check=True)
    weights = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [value("x", onnx.TensorProto.FLOAT, [1, WIDTH])],
        [value("y", onnx.TensorProto.FLOAT, [1, WIDTH])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    made.ir_version = 10
    openvino.save_model(
        openvino.convert_model(io.BytesIO(made.SerializeToString())), folder / "net.xml"
    )
    outside = {"save_as_external_data": True, "location": "net.data", "size_threshold": 0}
    onnx.save(made, folder / "net.onnx", **outside)
    safetensors_numpy.save_file({"w": weights}, folder / "w.safetensors")
    model = tokenizers.models.BPE({"a": 0, "b": 1, " ": 2, "ab": 3}, [("a", "b")])
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))


@pytest.fixture
def runtimes(new_site) -> Any:
    return new_site(write_models)


def answer(program: str, folder: str) -> list[str]:
    return [sys.executable, "-c", f"{WITHOUT}folder = sys.argv[1]\n{program}", folder]


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_answers_as_from_plain_files(needs_root, runtimes, name):
    program = PROGRAMS[name]
    line = answer(program, str(runtimes.plain))
    plain = run(*line)
    assert plain.returncode == 0, plain.stderr
    found = runtimes.run("--", *answer(program, "{sealed}"))
    assert (found.returncode, found.stdout) == (0, plain.stdout), found.stderr
    # By memfds too, but for what makes its paths canonical: tensors outside of the ONNX file.
    found = runtimes.run("--via", "memfd", "--", *answer(program, "{sealed}"))
    works = name != "onnxruntime"
    assert (found.returncode == 0 and found.stdout == plain.stdout) == works, found.stderr


@pytest.mark.parametrize("name", ["llama.cpp", "onnxruntime"])
def test_it_answers_as_from_plain_files_in_a_private_folder(needs_root, runtimes, name):
    program = f"""
import sys, keymgmt
with keymgmt.private_folder(sys.argv[1], name="m") as folder:
{textwrap.indent(PROGRAMS[name], "    ")}
"""
    found = [
        run(*line, env=runtimes.env())
        for line in (
            answer(PROGRAMS[name], str(runtimes.plain)),
            [sys.executable, "-c", program, str(runtimes.sealed)],
        )
    ]
    assert [each.returncode for each in found] == [0, 0], found[1].stderr
    assert found[0].stdout == found[1].stdout
