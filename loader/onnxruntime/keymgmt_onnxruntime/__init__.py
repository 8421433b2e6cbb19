"""Load a sealed ONNX model into ONNX Runtime, from memory.

::

    from keymgmt_onnxruntime import load

    session = load("det.sealed", name="det")
    session.run(None, {"x": inputs})
"""

import os

# When `onnxruntime` is imported, its telemetry writes below the home directory and sends data,
# unless this is set. If it was imported before, `load` switches the telemetry off.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from keymgmt_onnxruntime._load import load  # after the line above

__all__ = ["load"]
