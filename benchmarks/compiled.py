"""What keeping the compiled model gains (``load(..., cache=FOLDER)``), from path to first answer.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --models minilm --rounds 15

*plaintext*: OpenVINO's load by path, without a cache. *signed*: a sealed model, signature and
digests checked, compiled. *kept*: the same model, signature checked, the compiled graph and its
weights taken from the cache, sealed to this device. Each run is a fresh process with the page cache
warm; imports are not counted. It needs what ``first_inference.py`` needs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from first_inference import make, run
from measure import add_json, finish, interleave, machine, median, site, speedup, table

import keymgmt

KINDS = ("plaintext", "signed", "kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["minilm", "magika", "f16:512", "f32:512"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", type=Path, help="where the models are made")
    add_json(parser)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        kind, path, config, cache = options.case
        run(kind, path, config, cache if kind == "kept" else None)
        return
    rows, results = [], {}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        home = Path(folder)
        config = site(home / "site")["signed"]
        for name in options.models:
            plain, sealed = make(name, home), home / f"{name.replace(':', '-')}.sealed"
            keymgmt.seal(plain, sealed, keys=config)
            cases = {
                kind: [
                    sys.executable,
                    __file__,
                    "--case",
                    kind,
                    str(plain if kind == "plaintext" else sealed),
                    str(config),
                    str(home / "cache"),
                ]
                for kind in KINDS
            }
            interleave({"kept": cases["kept"]}, 1)  # makes it
            runs = interleave(cases, options.rounds)
            results[name] = runs
            size = sum(file.stat().st_size for file in (home / "cache").glob("*.compiled"))
            peak = {kind: median(runs[kind], "peak_mib") for kind in KINDS}
            rows.append(
                [
                    name,
                    f"{plain.with_suffix('.bin').stat().st_size / 1e6:.0f} MB",
                    f"{size / 1e6:.0f} MB",
                    *(f"{median(runs[kind]):.3f} s" for kind in KINDS),
                    *(
                        f"{speedup(runs['kept'], runs[kind]):.2f}, "
                        f"{speedup(runs['kept'], runs[kind], 'cpu'):.2f}"
                        for kind in ("signed", "plaintext")
                    ),
                    f"{peak['kept'] / peak['plaintext']:.2f}",
                ]
            )
            for file in (home / "cache").glob("*.compiled"):
                file.unlink()
            plain.with_suffix(".bin").unlink()
            for file in sorted((sealed / "payload").iterdir()):
                file.unlink()
    head = ["model", "weights", "kept file", *KINDS, "kept is x signed", "x plaintext", "peak /"]
    print(table(head, rows))
    about = machine("keymgmt", "openvino", "cryptography")
    finish(options.json, about, results)


if __name__ == "__main__":
    main()
