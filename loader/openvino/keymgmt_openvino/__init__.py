"""Load sealed models into OpenVINO: decrypted in memory only, wiped when the last user is gone.

::

    from keymgmt_openvino import load

    with load("resnet50.sealed", device="CPU", name="resnet50") as model:
        result = model(inputs)
"""

import sys

# When `openvino` is imported, its telemetry writes below the home directory and resolves a host
# name. Without the package of the telemetry it does not. A package that is imported already is left
# alone.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

from keymgmt_openvino._load import load, read  # noqa: E402 - after the line above
from keymgmt_openvino._model import LoadedModel  # noqa: E402

__all__ = ["LoadedModel", "load", "read"]
