"""``keymgmt backends``: what is installed, what it can do, and what is wrong with it.

Each backend is imported in a process of its own, so that a backend that hangs, prints or crashes at
its import harms neither the others nor this process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Final

from keymgmt.cli import _plugins
from keymgmt.cli._options import Json
from keymgmt.console import clean, console, print_json, table
from keymgmt.errors import KeymgmtError

__all__ = ["backends"]

SECONDS: Final = 20
OURS: Final = ("file", "vault", "pkcs11", "tpm2", "aws", "broker")


def backends(as_json: Json = False) -> None:
    """Show the installed backends, what they can do, and what is wrong with them.

    Example:
        keymgmt backends
    """
    from concurrent.futures import ThreadPoolExecutor

    from rich.text import Text

    from keymgmt._providers.registry import backends as announced_backends

    found = [(name, info) for name, infos in announced_backends().items() for info in infos]
    twice = [name for name, _ in found]
    with ThreadPoolExecutor(4) as pool:
        probes = list(pool.map(lambda each: _probe(each[0], each[1].distribution), found))
    rows: list[dict[str, Any]] = []
    for (name, info), probe in zip(found, probes, strict=True):
        if twice.count(name) > 1 and not probe["problem"]:
            probe["problem"] = "provided twice: a provider's table must name its distribution"
        rows.append(
            {"name": name, "distribution": info.distribution, "version": info.version, **probe}
        )
    if as_json:
        print_json({"format": "keymgmt-backends/1", "backends": rows})
        return
    out = console()
    out.print(
        table(
            ["backend", "distribution", "version", "api", "abilities", "key kinds", ""],
            [
                (
                    row["name"],
                    row["distribution"],
                    row["version"],
                    row["api"] or "-",
                    ", ".join(row["abilities"]) or "-",
                    ", ".join(row["kinds"]) or "-",
                    row["problem"] or "ok",
                )
                for row in rows
            ],
        )
    )
    for name in OURS:
        if name not in twice:
            out.print(Text(f'{name}: not installed; pip install "keymgmt[{name}]"', style="dim"))
    for name, entries in _plugins.announced().items():
        if len(entries) > 1:
            out.print(Text(f"the command {clean(name)!r} is provided twice", style="red"))


def _probe(name: str, distribution: str) -> dict[str, Any]:
    # -P: nothing is imported from the working directory.
    command = [sys.executable, "-P", "-m", "keymgmt.cli.backends", name, distribution]
    failed: dict[str, Any] = {"api": None, "abilities": [], "kinds": []}
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return failed | {"problem": f"its import does not end within {SECONDS} seconds"}
    try:
        # The import may print; the answer is the last line.
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return failed | {"problem": f"its import ends the process (exit code {done.returncode})"}
    return failed | answer


def _describe(name: str, distribution: str) -> dict[str, Any]:
    from keymgmt._providers.anchor import SupportsAnchor
    from keymgmt._providers.contract import (
        SupportsBatchUnwrap,
        SupportsBatchWrap,
        SupportsKeyDeletion,
        SupportsKeyManagement,
        SupportsOfflineRecipients,
        SupportsSigning,
    )
    from keymgmt._providers.registry import load_backend

    try:
        kind = load_backend(name, distribution)
    except KeymgmtError as error:
        return {"problem": "; ".join(filter(None, [str(error), error.hint]))}
    abilities = {
        "keys": SupportsKeyManagement,
        "delete": SupportsKeyDeletion,
        "sign": SupportsSigning,
        "recipients": SupportsOfflineRecipients,
        "batch-unwrap": SupportsBatchUnwrap,
        "batch-wrap": SupportsBatchWrap,
        "anchor": SupportsAnchor,
    }
    return {
        "api": kind.api_version,
        "abilities": [ability for ability, base in abilities.items() if issubclass(kind, base)],
        "kinds": list(getattr(kind, "key_kinds", {})),
        "problem": None,
    }


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_describe(*sys.argv[1:3])) + "\n")
