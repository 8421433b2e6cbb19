"""One model, four key services: each on its real software, driven by the command line alone.

"This device's TPM and the site's Vault together, or the HSM in the safe, or the file key": every
way in opens, and no other does.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from typing import Any

import pytest


def groups(site: Any) -> list[list[str]]:
    """Who opens the model, as ``inspect`` shows it."""
    found: list[list[str]] = json.loads(site.run("inspect", "model.sealed", "--json"))["groups"]
    return found


def test_the_tables_name_four_backends(site):
    found = [tomllib.loads(table)["providers"] for table in site.tables.values()]
    backends = {table["backend"] for tables in found for table in tables.values()}
    assert backends == {"file", "pkcs11", "tpm2", "vault"}
    keys = [[text.partition("@")[0] for text in group] for group in groups(site)]
    assert keys == [["tpm2:dev", "vault:model"], ["pkcs11:breakglass"], ["file:backup"]]


@pytest.mark.parametrize(
    "providers", ["tpm site", "hsm", "local", "local tpm", "site hsm", "local tpm site hsm"]
)
def test_every_way_in_opens(site, providers):
    target = f"plain-{providers.replace(' ', '-')}"
    site.run("unseal", "model.sealed", target, providers=providers)
    assert (site.folder / target / "weights.bin").read_bytes() == site.content


@pytest.mark.parametrize("provider", ["tpm", "site"])
def test_half_of_a_group_opens_nothing_and_says_what_is_missing(site, provider):
    said = site.run("verify", "model.sealed", providers=provider, code=4)
    assert "no recipient of resnet50 opens" in said
    for recipient in ("pkcs11:breakglass@", "file:backup@"):
        assert recipient in said


def test_doctor_finds_all_four_well(site):
    keys = ["local:backup", "tpm:dev", "site:model", "hsm:breakglass"]
    report = json.loads(site.run("doctor", *keys, "--json"))
    assert report["ok"]
    subjects = {finding["subject"] for finding in report["findings"]}
    assert {"local (file)", "tpm (tpm2)", "site (vault)", "hsm (pkcs11)"} == subjects


def test_rotation_reaches_every_service(site):
    before = groups(site)
    for key in ("local:backup", "tpm:dev", "site:model", "hsm:breakglass"):
        site.run("keys", "rotate", key)
    site.run("rewrap", "model.sealed")
    after = groups(site)
    assert len(after) == len(before)
    for old, new in zip(itertools.chain(*before), itertools.chain(*after), strict=True):
        assert new.partition("@")[0] == old.partition("@")[0]
        assert new != old
    for providers in ("tpm site", "hsm", "local"):
        site.run("verify", "model.sealed", providers=providers)
