"""Load a sealed ONNX model into ONNX Runtime, from memory.

::

    from keymgmt_onnxruntime import load

    session = load("det.sealed", name="det")
    session.run(None, {"x": inputs})
"""

import os

# ONNX Runtime's telemetry writes below the home directory when `onnxruntime` is imported, and sends
# what it wrote. It looks at this then; where it was imported before, `load` stops it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from keymgmt_onnxruntime._load import load  # after the line above

__all__ = ["load"]
