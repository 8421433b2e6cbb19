"""Whether a sealed cache of the compiled blob would gain anything: its best case, with no sealing.

    python benchmarks/blob.py
    python benchmarks/blob.py --models minilm --rounds 15

*read*: from the XML and the weights in memory by ``read_model`` and ``compile_model`` to the first
answer. *blob*: from what ``export_model`` gave, in memory, by ``import_model`` without a copy. Each
run is a fresh process, in which the plugin is loaded too; getting the bytes there is not timed, so
that a cache that has to decrypt them, and to prove that they belong to this device, gains less.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from first_inference import make, ones
from measure import Run, interleave, machine, median, speedup, table, timed, write

# As the loader does it, so that OpenVINO reads its telemetry package as missing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def in_memory(path: Path) -> Any:
    import openvino as ov

    tensor = ov.Tensor(ov.Type.u8, ov.Shape([path.stat().st_size]))
    with path.open("rb") as file:
        file.readinto(memoryview(tensor.data))
    return tensor


def run(kind: str, path: Path) -> Run:
    import openvino as ov

    blob, graph = in_memory(path.with_suffix(f".{kind}")), path.read_text()
    kept = []

    def work() -> None:
        core = ov.Core()
        if kind == "blob":
            model = core.import_model(blob, "CPU")
        else:
            model = core.compile_model(core.read_model(graph, blob), "CPU")
        model(ones(model))
        kept.append(model)

    return timed(work)


def export(path: Path) -> None:
    import openvino as ov

    blob = ov.Core().compile_model(path, "CPU").export_model()
    path.with_suffix(".blob").write_bytes(blob.getbuffer())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["minilm", "magika", "f16:512"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", type=Path, help="where the models are made")
    parser.add_argument("--json", type=Path, default=Path("blob.json"))
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        kind, name = options.case
        print(json.dumps(run(kind, Path(name))))
        return
    rows, results = [], {}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        for name in options.models:
            path = make(name, Path(folder))
            export(path)
            cases = {
                kind: [sys.executable, __file__, "--case", kind, str(path)]
                for kind in ("bin", "blob")
            }
            runs = results[name] = interleave(cases, options.rounds)
            sizes = [path.with_suffix(f".{kind}").stat().st_size / 1e6 for kind in cases]
            rows.append(
                [
                    name,
                    *(f"{size:.0f} MB" for size in sizes),
                    *(f"{median(runs[kind]):.3f} s" for kind in cases),
                    f"{speedup(runs['blob'], runs['bin']):.2f}",
                    f"{speedup(runs['blob'], runs['bin'], 'cpu'):.2f}",
                ]
            )
    head = ["model", "weights", "blob", "read", "import", "gain", "by CPU"]
    print(table(head, rows))
    about = machine("openvino")
    write(options.json, {"machine": about, "rounds": options.rounds, "runs": results})


if __name__ == "__main__":
    main()
