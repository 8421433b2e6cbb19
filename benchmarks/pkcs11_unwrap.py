"""Unwraps a second from SoftHSM: ours against raw python-pkcs11, in turns in one run.

    python benchmarks/pkcs11_unwrap.py [--seconds 20]

Makes a token in a temporary folder. Raw python-pkcs11 is what one would write by hand: a session
for each thread, the key found once, ``decrypt`` with GCMParams; on a module that was initialised
with locking, since as shipped several threads crash it. It has no time limit, no way back from a
lost session, and leaves the key in memory. Both are measured in short turns, one after the other,
so that a busy machine slows both; the figure is the median of the turns, with the quartiles.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pkcs11
from keymgmt_pkcs11 import Pkcs11Provider, Pkcs11Settings
from keymgmt_pkcs11._module import open_module

from keymgmt.backend import Dek, SecretSource

CONTEXT = bytes(32)
PIN = "1234-benchmark"
MODULE = "/usr/lib/softhsm/libsofthsm2.so"
KINDS = ("aes256", "aes256-kw", "ecdh-p256", "rsa-oaep")


def rate(make: Callable[[], Callable[[], object]], seconds: float, threads: int) -> float:
    """Calls a second while ``threads`` call for ``seconds`` what ``make`` gives to each."""
    counts = [0] * threads
    calls = [make() for _ in range(threads)]
    begin = time.perf_counter()
    end = begin + seconds

    def run(index: int) -> None:
        call = calls[index]
        while time.perf_counter() < end:
            call()
            counts[index] += 1

    workers = [threading.Thread(target=run, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - begin)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line of the table")
    parser.add_argument("--module", default=MODULE, help="SoftHSM's library")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "tokens").mkdir()
        config = directory / "softhsm2.conf"
        config.write_text(f"directories.tokendir = {name}/tokens\nobjectstore.backend = file\n")
        os.environ["SOFTHSM2_CONF"] = str(config)
        command = ["softhsm2-util", "--init-token", "--free", "--label", "bench"]
        command += ["--pin", PIN, "--so-pin", PIN]
        subprocess.run(command, check=True, capture_output=True)
        pin = directory / "pin"
        pin.touch(0o600)
        pin.write_text(PIN)
        settings = Pkcs11Settings(
            module=Path(given.module),
            token="bench",
            pin=SecretSource(file=pin),
            allow_oaep_sha1=True,
        )
        with Pkcs11Provider("bench", settings) as provider:
            measure(provider, given.seconds)


def measure(provider: Pkcs11Provider, seconds: float) -> None:
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs")
    for kind in KINDS:
        provider.create_key(kind, kind, {})
        with Dek.generate() as dek:
            wrapped = provider.wrap(kind, dek, CONTEXT)

            def ours(wrapped: object = wrapped) -> Callable[[], object]:
                return lambda: provider.unwrap(wrapped, CONTEXT).wipe()  # type: ignore[arg-type]

            cases = {"ours": ours}
            if kind == "aes256":
                cases["raw python-pkcs11"] = lambda w=wrapped: raw(provider, w)  # type: ignore[misc]
            for threads in (1, 8):
                turns: dict[str, list[float]] = {name: [] for name in cases}
                for _ in range(10):
                    for name, make in cases.items():
                        turns[name].append(rate(make, seconds / 10, threads))
                for name, rates in turns.items():
                    low, middle, high = statistics.quantiles(rates, n=4)
                    print(
                        f"{wrapped.mechanism:14} {threads} threads  {name:18} "
                        f"{middle:8.0f}/s  ({low:.0f}..{high:.0f})"
                    )


def raw(provider: Pkcs11Provider, wrapped: object) -> Callable[[], object]:
    """A session of its own and the key in it; the process is logged in already."""
    library = open_module(provider.settings.library, None).library
    session = library.get_token(token_label="bench").open()
    key = session.get_key(
        id=bytes.fromhex(wrapped.version),  # type: ignore[attr-defined]
        object_class=pkcs11.ObjectClass.SECRET_KEY,
    )
    blob = wrapped.blob  # type: ignore[attr-defined]

    def call() -> object:
        params = pkcs11.GCMParams(blob[:12], CONTEXT, 128)
        return key.decrypt(blob[12:], mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=params)

    return call


if __name__ == "__main__":
    main()
