"""init, backends, doctor and the config that the command line finds."""

from __future__ import annotations

import importlib.metadata
import stat
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

import keymgmt

Cli = Callable[..., Any]


def test_init_makes_a_config_that_is_safe_from_the_start(cli, site):
    settings = tomllib.loads((site / "keymgmt.toml").read_text())
    assert settings["policy"] == {"publishers": {"publisher.pem": ["*"]}}
    assert stat.S_IMODE((site / "keys").stat().st_mode) == 0o700
    for file in (site / "keys").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    load_pem_public_key((site / "publisher.pem").read_bytes())
    with keymgmt.load_config(site / "keymgmt.toml") as config:
        assert config.policy.require_signature
        assert config.provider("local").check("models").ok


def test_init_without_a_directory_is_found_by_every_application(cli, tmp_path):
    pytest.importorskip("keymgmt_file")
    assert cli("init").code == 0
    assert keymgmt.load_config().path == tmp_path / "xdg" / "keymgmt" / "keymgmt.toml"


def test_a_command_that_is_to_be_copied_is_one_line_however_narrow_the_terminal(terminal, tmp_path):
    pytest.importorskip("keymgmt_file")
    folder = tmp_path / ("deep" * 20)
    ran = terminal("init", folder, cwd=tmp_path)
    assert ran.end() == 0, ran.seen
    assert f"export KEYMGMT_CONFIG={folder}/keymgmt.toml".encode() in ran.seen
    assert f"Back up {folder}/keys, encrypted".encode() in ran.seen


def test_init_replaces_nothing(cli, site):
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    ran = cli("init", ".")
    assert ran.code == 3
    assert "there is a config already" in ran.error
    assert ran.hint
    assert before == {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}


def test_init_goes_on_where_it_was_interrupted_with_the_same_keys(cli, site):
    (site / "keymgmt.toml").unlink()
    before = (site / "keys" / "models.jwks").read_bytes()
    assert cli("init", ".").code == 0
    assert (site / "keys" / "models.jwks").read_bytes() == before


@pytest.mark.parametrize(
    "arguments", [("--kek", "a", "--publisher", "a"), ("--kek", "../a"), ("--publisher", "A")]
)
def test_init_refuses_bad_key_names_and_makes_nothing(cli, tmp_path, arguments):
    ran = cli("init", ".", *arguments)
    assert ran.code == 3
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [("verify", "."), ("keys", "list"), ("doctor",), ("seal", "model", "y"), ("rewrap", ".")],
)
def test_the_working_directory_has_no_authority(cli, site, monkeypatch, arguments):
    """A delivered folder with a config and a module in it: nothing of it is loaded."""
    (site / "keymgmt.toml").write_text(
        '[providers.hsm]\nbackend = "pkcs11"\nmodule = "./evil.so"\ntoken = "t"\n'
    )
    monkeypatch.delenv("KEYMGMT_CONFIG")
    ran = cli(*arguments)
    assert ran.code == 3
    assert "no config file" in ran.error
    assert "hsm" not in ran.out + ran.err
    assert "./keymgmt.toml" not in ran.err


def test_a_named_config_comes_first_and_nothing_is_said(cli, site, tmp_path, monkeypatch):
    other = tmp_path / "other.toml"
    other.write_text('[providers.other]\nbackend = "file"\npath = "work/keys"\n')
    for arguments, environment in ((("--config", other), ""), ((), str(other))):
        monkeypatch.setenv("KEYMGMT_CONFIG", environment)
        ran = cli(*arguments, "keys", "list", "--json")
        assert ran.err == ""
        assert ran.json()["keys"][0]["reference"] == "other:models"


def test_backends_shows_what_is_installed_and_what_is_missing(cli):
    pytest.importorskip("keymgmt_file")
    (file,) = (row for row in cli("backends", "--json").json()["backends"] if row["name"] == "file")
    assert file["distribution"] == "keymgmt-file"
    assert file["version"] == importlib.metadata.version("keymgmt-file")
    assert file["api"] == 1
    assert {"keys", "sign"} <= set(file["abilities"])
    assert file["problem"] is None
    assert "keymgmt-file" in cli("backends").out


def test_doctor_finds_a_new_site_well_and_opens_its_model(cli, sealed):
    ran = cli("doctor", "--open", sealed, "--json")
    assert ran.code == 0
    report = ran.json()
    assert report["ok"] is True
    names = {finding["name"] for finding in report["findings"]}
    assert {"key models", "key publisher", "publisher publisher.pem", "opens"} <= names
    assert {finding["status"] for finding in report["findings"]} == {"ok"}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("keys/models.jwks", "local (file)"),
        ("publisher.pem", "policy"),
        ("model.sealed/manifest.json", "model.sealed"),
    ],
)
def test_doctor_names_what_is_wrong_and_looks_at_the_rest(cli, sealed, broken, said):
    file = sealed.parent / broken
    file.write_bytes(b"{")
    ran = cli("doctor", "--open", sealed, "--json")
    assert ran.code == 1
    findings = ran.json()["findings"]
    failed = {f["subject"].rpartition("/")[2] for f in findings if f["status"] == "failed"}
    assert said in failed
    assert "ok" in {f["status"] for f in findings}


def test_doctor_says_which_cryptographic_module_runs(cli, site):
    from cryptography.hazmat.backends.openssl.backend import backend

    def module() -> Any:
        found = cli("doctor", "--json").json()["findings"]
        return next(finding for finding in found if finding["name"] == "module")

    assert backend.openssl_version_text() in module()["detail"]
    assert "not a validated module" in module()["detail"]
    assert module()["status"] == "ok"
    text = (site / "keymgmt.toml").read_text()
    (site / "keymgmt.toml").write_text(text.replace("[seal]\n", '[seal]\nprofile = "fips"\n'))
    assert module()["status"] == "warning"
    assert "A validated module" in module()["hint"]


def test_doctor_looks_at_the_release_memory(cli, site):
    config, memory = site / "keymgmt.toml", site / "releases.json"
    config.write_text(
        config.read_text().replace("[policy]\n", '[policy]\nremember_releases = "releases.json"\n')
    )
    assert f"release memory: 0 models in {memory}" in cli("doctor").out
    memory.write_text("{")
    memory.chmod(0o600)
    ran = cli("doctor", "--json")
    found = [each for each in ran.json()["findings"] if each["name"] == "release memory"]
    assert (ran.code, len(found), found[0]["status"]) == (1, 1, "failed")
    assert "is damaged" in found[0]["detail"]


@pytest.mark.parametrize(
    ("seal", "said"),
    [
        ('to = ["lokal:models"]', "no provider named 'lokal'"),
        ('to = ["local:models+lokal:models"]', "no provider named 'lokal'"),
        ('to = ["local:publisher"]', "does not wrap"),
        ('to = ["local:models@1"]', "the newest version"),
        ('to = ["local:models+local:models"]', "the same key twice"),
        ('to = ["local"]', "not a key reference"),
        ('to = [""]', "not a key reference"),
        ('sign = "lokal:publisher"', "no provider named 'lokal'"),
        ('sign = "local"', "not a key reference"),
    ],
)
def test_doctor_fails_where_sealing_as_the_config_says_would(cli, site, seal, said):
    config = site / "keymgmt.toml"
    config.write_text(config.read_text().partition("[seal]")[0] + f"[seal]\n{seal}\n")
    ran = cli("doctor", "--json")
    failed = [each for each in ran.json()["findings"] if each["status"] == "failed"]
    assert ran.code == 1
    assert [each["name"].split()[0] for each in failed] == ["[seal]"]
    assert said in failed[0]["detail"]


def test_doctor_warns_where_unsigned_models_open(cli, site):
    (site / "keymgmt.toml").write_text(
        '[providers.local]\nbackend = "file"\npath = "keys"\n[policy]\nrequire_signature = false\n'
    )
    ran = cli("doctor")
    assert ran.code == 0
    assert "warning" in ran.out
    assert "signatures" in ran.out
