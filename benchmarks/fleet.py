"""Rotation of a fleet: models a second, and CPU for one, of the verbs that walk a tree.

    python benchmarks/fleet.py [--models 2000] [--services file vault] [--rounds 3]

Every model is one of its own, sealed and signed, with 4 KiB of weights: copies would share answers
of a key service. The cases, each in a fresh process after the key was rotated:

*seal* one after the other; *rewrap*; *again*, which finds nothing to do, and writes a journal;
*resumed*, with that journal; *dry run* after another rotation; *usage*, which asks no key service.
The key service is the file backend, or an OpenBao development server of this machine
(``keymgmt-vault-dev``), whose CPU is not in the figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import Run, add_json, finish, machine, median, table, timed

import keymgmt
from keymgmt._crypto.signatures import PublicKey

CASES = ("seal", "rewrap", "again", "resumed", "dry run", "usage")


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


def work(case: str, home: Path, count: int) -> int:
    """Do it once; of how many models."""
    tree = home / "tree"
    with keymgmt.load_config(home / "keymgmt.toml") as config:
        if case == "seal":
            plain = home / "plain"
            plain.mkdir()
            for number in range(count):
                folder = tree / f"{number % 100:02}"
                folder.mkdir(parents=True, exist_ok=True)
                (plain / "model.bin").write_bytes(os.urandom(4096))
                keymgmt.seal(plain, folder / f"m{number}.sealed", to=["site:kek"], keys=config)
            return count
        if case == "usage":
            return keymgmt.usage(tree).models
        journal = home / "journal" if case in ("again", "resumed") else None
        done = [
            (item.changed, item.skipped, item.exit_code)
            for item in keymgmt.rewrap_tree(
                tree, keys=config, dry_run=case == "dry run", resume=journal
            )
            if isinstance(item, keymgmt.Rewrapped)
        ]
    assert set(done) == {(journal is None, case == "resumed", 0)}, set(done)
    return len(done)


def one(case: str, home: Path, count: int) -> Run:
    with keymgmt.load_config(home / "keymgmt.toml") as config:
        if case in ("rewrap", "dry run"):
            config.provider("site").rotate_key("kek")
    done: list[int] = []
    run = timed(lambda: done.append(work(case, home, count)))
    assert done == [count], done
    return {**run, "per_second": count / run["seconds"], "cpu_ms": run["cpu"] / count * 1e3}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--services", nargs="+", choices=("file", "vault"), default=["file"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where the models are made")
    add_json(parser)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(one(options.case[0], Path(options.case[1]), options.models)))
        return
    rows, results = [], {}
    for kind in options.services:
        with (
            tempfile.TemporaryDirectory(dir=options.directory) as folder,
            service(kind, Path(folder)) as provider,
        ):
            make_site(Path(folder), provider)
            runs = measure(Path(folder), options.models, options.rounds)
        results[kind] = runs
        for case, each in runs.items():
            figures = [median(each, "per_second"), median(each, "cpu_ms"), median(each, "peak_mib")]
            rows.append([kind, case, *(f"{figure:,.2f}" for figure in figures)])
    print(table(["key service", "verb", "models/s", "CPU ms each", "peak MiB"], rows))
    finish(options.json, {**machine("keymgmt"), "models": options.models}, results)


def measure(home: Path, count: int, rounds: int) -> dict[str, list[Run]]:
    """The cases in their order, which each needs; once ``seal``, the others in every round."""
    runs: dict[str, list[Run]] = {}
    for number in range(rounds):
        for case in CASES[number > 0 :]:
            command = [sys.executable, __file__, "--models", str(count), "--case", case, str(home)]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            runs.setdefault(case, []).append(json.loads(output))
            print(f"{case}: {runs[case][-1]['per_second']:.0f} a second", file=sys.stderr)
    return runs


if __name__ == "__main__":
    main()
