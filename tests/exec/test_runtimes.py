"""Real programs under ``keymgmt exec``: each answers as it does from the plain files.

One row of the table in docs/exec.md each, and by ``private_folder`` of docs/other-programs.md. They
run in the environment ``runtimes``, which has them.
"""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf")
onnx = pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("ik_llama_cpp")
pytest.importorskip("onnxruntime")

WIDTH, VOCABULARY = 64, 320
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


def write_llama(path: Path) -> None:
    """A tiny random Llama with a byte-level tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(0)
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    words = [chr(byte if byte in shown else next(hidden)) for byte in range(256)] + ["ab"]
    special = [f"<|{number}|>" for number in range(len(words), VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(words + special)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * len(words) + [3] * len(special))
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    chance = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        kind = np.float16 if len(shape) > 1 else np.float32
        writer.add_tensor(f"{name}.weight", (chance.standard_normal(shape) * 0.1).astype(kind))

    tensor("token_embd", VOCABULARY, WIDTH)
    tensor("output_norm", WIDTH)
    tensor("output", VOCABULARY, WIDTH)
    for name in ("attn_norm", "ffn_norm"):
        tensor(f"blk.0.{name}", WIDTH)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        tensor(f"blk.0.{name}", WIDTH, WIDTH)
    for name in ("ffn_gate", "ffn_up"):
        tensor(f"blk.0.{name}", 2 * WIDTH, WIDTH)
    tensor("blk.0.ffn_down", WIDTH, 2 * WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_models(folder: Path) -> None:
    write_llama(folder / "tiny.gguf")
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
def runtimes(new_site: Callable[..., Any]) -> Any:
    return new_site(write_models)


def answer(program: str, folder: str) -> list[str]:
    return [sys.executable, "-c", f"{WITHOUT}folder = sys.argv[1]\n{program}", folder]


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_answers_as_from_plain_files(needs_root, runtimes, name):
    program = PROGRAMS[name]
    line = answer(program, str(runtimes.plain))
    plain = subprocess.run(line, capture_output=True, text=True, timeout=120)
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
        subprocess.run(line, capture_output=True, text=True, timeout=120, env=runtimes.env())
        for line in (
            answer(PROGRAMS[name], str(runtimes.plain)),
            [sys.executable, "-c", program, str(runtimes.sealed)],
        )
    ]
    assert [each.returncode for each in found] == [0, 0], found[1].stderr
    assert found[0].stdout == found[1].stdout
