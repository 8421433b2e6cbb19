"""A synthetic IR of a chosen size: fully connected layers, one after the other.

usage: synthetic_ir.py OUT.xml MIB [f32|f16|i8]
Input `x` (float32 [?, WIDTH]), one output of the same shape. Weights of kind f16 and i8 are stored
so and converted in the graph, as weight compression does it.
"""

import sys

import numpy as np
import openvino as ov
from openvino import opset13 as op

WIDTH = 4096
BYTES = {"f32": 4, "f16": 2, "i8": 1}


def build(mib, kind="f32"):
    random = np.random.default_rng(7)
    x = op.parameter([-1, WIDTH], np.float32, name="x")
    x.output(0).get_tensor().set_names({"x"})
    node = x
    for _ in range(max(1, (mib << 20) // (WIDTH * WIDTH * BYTES[kind]))):
        if kind == "i8":
            stored = random.integers(-127, 128, (WIDTH, WIDTH), np.int8)
            weights = op.multiply(
                op.convert(op.constant(stored), "f32"), op.constant(np.float32(1e-4))
            )
        else:
            values = (random.random((WIDTH, WIDTH), np.float32) - np.float32(0.5)) / 32
            weights = op.constant(values.astype(np.float16) if kind == "f16" else values)
            if kind == "f16":
                weights = op.convert(weights, "f32")
        node = op.matmul(node, weights, False, True)
    return ov.Model([op.result(node)], [x], "synthetic")


if __name__ == "__main__":
    ov.save_model(build(int(sys.argv[2]), *sys.argv[3:4]), sys.argv[1], compress_to_fp16=False)
