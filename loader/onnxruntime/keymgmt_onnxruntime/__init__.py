"""Load a sealed ONNX model into ONNX Runtime, from memory.

from keymgmt_onnxruntime import load

session = load("det.sealed", name="det")
session.run(None, {"x": inputs})
"""

from keymgmt_onnxruntime._load import load

__all__ = ["load"]
