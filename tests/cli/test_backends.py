"""``keymgmt backends`` with backends of strangers that hang, crash, print or are there twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keymgmt.cli.backends

Cli = Callable[..., Any]
Install = Callable[..., Path]
GROUP = "keymgmt.backends"
ACME = """
from keymgmt.backend import KeyProvider, Settings, SupportsSigning
print("Acme HSM client 4.2")

class Acme(KeyProvider[Settings], SupportsSigning):
    backend = "acme"
    Settings = Settings
"""


def test_each_is_isolated_and_explained(cli, install, monkeypatch):
    monkeypatch.setattr(keymgmt.cli.backends, "SECONDS", 200)
    install("acme-hsm", GROUP, {"acme": "acme_hsm:Acme"}, acme_hsm=ACME)
    broken = {
        "crashes": ("import os; os._exit(139)", "ends the process (exit code 139)"),
        "exits": ("raise SystemExit(3)", "fails to import: SystemExit: 3"),
        "fails": ("import nothing_of_that_name", "ModuleNotFoundError"),
    }
    for name, (source, _) in broken.items():
        install(f"{name}-hsm", GROUP, {name: f"{name}_hsm:Acme"}, **{f"{name}_hsm": source})
    ran = cli("backends", "--json")
    assert ran.code == 0
    rows = {row["name"]: row for row in ran.json()["backends"]}
    assert rows["acme"] == {
        "name": "acme",
        "distribution": "acme-hsm",
        "version": "1.0",
        "api": 1,
        "abilities": ["sign"],
        "kinds": [],
        "problem": None,
    }
    for name, (_, said) in broken.items():
        assert said in rows[name]["problem"]


def test_one_that_hangs_is_given_up(cli, install, monkeypatch):
    monkeypatch.setattr(keymgmt.cli.backends, "SECONDS", 3)
    source = "import time; time.sleep(600)"
    install("hangs-hsm", GROUP, {"hangs": "hangs_hsm:Acme"}, hangs_hsm=source)
    (row,) = (row for row in cli("backends", "--json").json()["backends"] if row["name"] == "hangs")
    assert "does not end within 3 seconds" in row["problem"]


def test_a_name_that_two_provide_shows_both(cli, install, monkeypatch):
    monkeypatch.setattr(keymgmt.cli.backends, "SECONDS", 200)
    install("acme-hsm", GROUP, {"acme": "acme_hsm:Acme"}, acme_hsm=ACME)
    install("evil-hsm", GROUP, {"acme": "evil_hsm:Acme"}, evil_hsm=ACME)
    rows = [row for row in cli("backends", "--json").json()["backends"] if row["name"] == "acme"]
    assert {row["distribution"] for row in rows} == {"acme-hsm", "evil-hsm"}
    assert all("twice" in row["problem"] for row in rows)
    shown = cli("backends").out
    assert "evil-hsm" in shown
