"""The pages of the loaders beside OpenVINO's, with the file backend."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("keymgmt_file")
# Many short processes, which a busy machine makes long.
pytestmark = [pytest.mark.once, pytest.mark.timeout(1200)]

INPUTS = "import numpy\ninputs = numpy.ones((1, 4), numpy.float32)\n"


def seal(desk: Any, program: str, name: str) -> None:
    desk.run(f"mkdir {name} && python - <<'EOF'\n{program}\nEOF")
    desk.run(f"keymgmt init && keymgmt seal {name} {name}.sealed")


def test_onnxruntime(desk):
    pytest.importorskip("keymgmt_onnxruntime")
    pytest.importorskip("onnx")
    desk.prelude = INPUTS
    program = """
from onnx import TensorProto, helper, save
ends = [helper.make_tensor_value_info(each, TensorProto.FLOAT, [1, 4]) for each in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "det", ends[:1], ends[1:])
made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
made.ir_version = 10
save(made, "det/det.onnx")
"""
    seal(desk, program, "det")
    desk.run_page("loader/onnxruntime/README.md")


def test_safetensors(desk):
    pytest.importorskip("keymgmt_safetensors")
    pytest.importorskip("safetensors")
    program = """
import numpy
from safetensors.numpy import save_file
save_file({"w": numpy.ones((2, 3), numpy.float32)}, "llm/model.safetensors")
"""
    seal(desk, program, "llm")
    desk.run_page("loader/safetensors/README.md")


def test_tokenizers(desk):
    pytest.importorskip("keymgmt_tokenizers")
    program = """
from tokenizers import Tokenizer, models
tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2, "ab": 3}, [("a", "b")]))
tokenizer.save("llm/tokenizer.json")
"""
    seal(desk, program, "llm")
    desk.run_page("loader/tokenizers/README.md")
