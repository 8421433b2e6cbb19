"""What ``--json`` prints is what the schemas in the package say, for every command of the core."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import keymgmt
from keymgmt.cli._state import _JsonLines

Cli = Callable[..., Any]
Check = Callable[[Any], str]
SCHEMAS = files("keymgmt") / "schemas"


def test_every_format_that_the_core_prints_has_a_schema():
    root = Path(keymgmt.__file__).parent
    printed = {
        name
        for file in [*root.rglob("cli/*.py"), *root.rglob("_verbs/*.py")]
        for name in re.findall(r'"(keymgmt-[a-z-]+/\d+)"', file.read_text("utf-8"))
    }
    printed.remove("keymgmt-journal/1")  # a file, of which no line is printed
    there = {each.name for each in SCHEMAS.iterdir()}
    assert {name.replace("/", "-") + ".json" for name in printed} == there


def test_every_command_prints_what_its_schema_says(cli, site, check_output):
    seen: set[str] = set()

    def run(*arguments: object, code: int = 0) -> None:
        ran = cli(*arguments, "--json")
        assert ran.code == code, ran.err
        seen.update(check_output(ran.out))

    run("init", "other")
    run("backends")
    run("doctor")
    run("seal", "model", "model.sealed", "--name", "m")
    run("keys", "create", "local:device", "--kind", "hpke-x25519")
    run("keys", "list")
    run("keys", "show", "local:models")
    run("keys", "rotate", "local:models")
    run("keys", "export", "local:publisher")
    run("keys", "export", "local:device", "-o", "device.recipient", "--sign", "local:publisher")
    fingerprint = cli("keys", "export", "local:device", "--json").json()["fingerprint"]
    vouch = ("--sign", "local:publisher", "--fingerprint", fingerprint)
    run("keys", "vouch", "device.recipient", *vouch, "--force")
    run("keys", "usage", ".", "local:models")
    run("keys", "retire", "local:models@1", "--tree", ".", code=3)
    run("keys", "delete", "local:device", "--force", "--yes")
    run("keys", "create", "local:old")
    run("keys", "delete", "local:old", "--tree", ".", "--yes")
    run("inspect", "model.sealed")
    run("verify", "model.sealed")
    run("verify", ".")
    run("sign", "model.sealed")
    run("sign", ".", "--if-signed-by", "publisher.pem")
    run("rewrap", "model.sealed")
    run("rewrap", ".")
    run("keys", "retire", "local:models@1", "--tree", ".")
    run("reseal", "model.sealed")
    run("reseal", ".")
    run("unseal", "model.sealed", "plain")
    run("plugin", "new", "acme")
    run("help", "seal")
    run("completion", "zsh")
    (site / "keys").rename(site / "away")
    run("verify", "model.sealed", code=6)
    run("verify", ".", code=6)
    run("keys", "list", code=6)
    assert {f"{each.name.removesuffix('-1.json')}/1" for each in SCHEMAS.iterdir()} == seen | {
        "keymgmt-log/1",
        "keymgmt-plugin-check/1",  # test_plugin.py
        "keymgmt-pull/1",  # test_registry.py
        "keymgmt-push/1",
    }


def test_log_lines_are_what_their_schema_says(check_schema):
    record = logging.LogRecord("keymgmt.audit", logging.INFO, "", 0, "%s", ("event=x",), None)
    record.audit = {"event": "wrap", "outcome": "ok"}
    assert check_schema(json.loads(_JsonLines().format(record))) == "keymgmt-log/1"
