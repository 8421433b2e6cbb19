"""Rewrap a tree in parts on the workers of a Dask cluster.

    python dask_rotate.py SCHEDULER TREE --parts 64 --ca ca.pem --cert me.pem --key me.key

Whoever reaches a scheduler runs code on its workers, and these may use keys. So start scheduler and
workers with ``--tls-ca-file``, ``--tls-cert`` and ``--tls-key``, and a CA that signs for nobody
else. A task says which tree and which part, and nothing more. Each worker runs the command
``keymgmt`` with the config and the login of its own machine: no secret travels.

A part whose worker died is run again on another one, and what was done is found done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from distributed import Client, Future, as_completed
from distributed.security import Security


def rotate(tree: str, shard: str) -> dict[str, object]:
    """On a worker: one part; its summary."""
    command = ["keymgmt", "rewrap", tree, "--shard", shard, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        summary: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return {"shard": shard, **{name: summary[name] for name in NUMBERS}}
    except (IndexError, ValueError, KeyError):
        raise RuntimeError(f"part {shard}: exit code {done.returncode}: {done.stderr}") from None


NUMBERS = ("models", "changed", "failed", "exit_code")


def main() -> int:
    """Run all parts; the exit code is the worst of theirs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scheduler", help="its address, tls://HOST:PORT")
    parser.add_argument("tree", help="the folder, as the workers have it")
    parser.add_argument("--parts", type=int, default=64)
    for name in ("ca", "cert", "key"):
        parser.add_argument(f"--{name}", required=True, metavar="FILE")
    options = parser.parse_args()
    security = Security(
        tls_ca_file=options.ca,
        tls_client_cert=options.cert,
        tls_client_key=options.key,
        require_encryption=True,
    )
    codes = []
    with Client(options.scheduler, security=security) as client:
        parts: list[Future] = [
            client.submit(rotate, options.tree, f"{number}/{options.parts}", pure=False, retries=2)
            for number in range(1, options.parts + 1)
        ]
        for part in as_completed(parts):
            summary = part.result()
            codes.append(int(str(summary["exit_code"])))
            print(json.dumps(summary), flush=True)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
