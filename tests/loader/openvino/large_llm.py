"""The tiny language model with MIB of f32 weights more in front of its last layer.

usage: large_llm.py TINY_DIR OUT_DIR MIB
The added layers are run at every token; their result counts so little that tokens stay the same.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as op

WIDTH = 4096


def main(tiny, out, mib):
    shutil.copytree(tiny, out)
    model = ov.Core().read_model(Path(tiny) / "openvino_model.xml")
    head = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"][-1]
    hidden = head.input_value(0)
    size = hidden.get_partial_shape()[-1].get_length()
    random = np.random.default_rng(7)

    def layer(x, rows, columns):
        values = random.random((rows, columns), np.float32) - np.float32(0.5)
        return op.matmul(x, op.constant(values / np.float32(columns)), False, True)

    x = layer(hidden, WIDTH, size)
    for _ in range((mib << 20) // (WIDTH * WIDTH * 4)):
        x = layer(x, WIDTH, WIDTH)
    x = op.multiply(layer(x, size, WIDTH), op.constant(np.float32(1e-6)))
    head.input(0).replace_source_output(op.add(hidden, x).output(0))
    model.validate_nodes_and_infer_types()
    for suffix in (".xml", ".bin"):
        (Path(out) / f"openvino_model{suffix}").unlink()
    ov.save_model(model, Path(out) / "openvino_model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
