"""Load a model in a fresh process, run it, close it, and print what that took as JSON.

usage: load_once.py plain MODEL.xml | sealed OUT.sealed CONFIG [BATCH]
"""

import json
import sys
import time
from pathlib import Path

sys.modules.setdefault("openvino_telemetry", None)


def main(kind, path, config=None):
    started = time.perf_counter()
    import numpy as np

    if kind == "sealed":
        from keymgmt_openvino import load

        ready = time.perf_counter()
        model = load(path, keys=config)
    else:
        import openvino as ov

        ready = time.perf_counter()
        model = ov.Core().compile_model(path, "CPU")
    loaded = time.perf_counter()
    inputs = {
        number: np.ones(
            [1 if part.is_dynamic else part.get_length() for part in port.partial_shape],
            port.element_type.to_dtype(),
        )
        for number, port in enumerate(model.inputs)
    }
    answer = model(inputs)[0]
    done = time.perf_counter()
    peak = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    if kind == "sealed":
        model.close()
    sys.stdout.write(
        json.dumps(
            {
                "import": ready - started,
                "load": loaded - ready,
                "first_inference": done - loaded,
                "total": done - ready,
                "peak_kib": int(peak.split()[1]),
                "sum": float(np.asarray(answer, np.float64).sum()),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
