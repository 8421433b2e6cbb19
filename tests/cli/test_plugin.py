"""``keymgmt plugin check`` on the file backend, and ``keymgmt plugin new``."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import programs
import pytest

pytest.importorskip("keymgmt_file")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path) -> Run:
    def keymgmt(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "keymgmt.cli", *map(str, arguments)]
        done = programs.run(*command, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return keymgmt


@pytest.fixture
def config(tmp_path, run) -> Path:
    path = tmp_path / "site.toml"
    path.write_text('[providers.local]\nbackend = "file"\npath = "keys"\n')
    path.chmod(0o600)
    (tmp_path / "keys").mkdir(mode=0o700)
    run("-c", path, "keys", "create", "local:kek")
    return path


def test_a_good_provider_passes_and_reports(config, run, tmp_path, check_schema):
    junit, report = tmp_path / "junit.xml", tmp_path / "report.json"
    arguments = ["local", "--config", config, "--junit", junit, "--report", report]
    done = run("plugin", "check", *arguments)
    assert "keeps the contract" in done.stdout
    assert "the hook break_service was not supplied" in done.stdout
    assert "not allowed to create keys in this service" in done.stdout
    made = json.loads(report.read_text())
    assert check_schema(made) == "keymgmt-plugin-check/1"
    assert made["ok"] is True
    assert made["versions"]["distribution"] == "keymgmt-file"
    outcomes = {check["name"]: check["outcome"] for check in made["checks"]}
    assert outcomes["test_round_trip"] == "passed"
    assert outcomes["test_service_hangs"] == "skipped"
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    assert suite.get("failures") == "0"
    assert int(suite.get("tests", "0")) == len(made["checks"])
    versions = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert versions["distribution"] == "keymgmt-file"


def test_no_key_is_made_unless_allowed(config, run):
    keys = config.parent / "keys"
    before = sorted(path.name for path in keys.iterdir())
    run("plugin", "check", "file", "--config", config)
    assert sorted(path.name for path in keys.iterdir()) == before
    done = run("plugin", "check", "local:kek", "--config", config, "--create-keys", "--json")
    outcomes = {each["name"]: each["outcome"] for each in json.loads(done.stdout)["checks"]}
    assert outcomes["test_rotation"] == outcomes["test_signing"] == "passed"
    assert json.loads(done.stdout)["left"] == {}
    assert sorted(path.name for path in keys.glob("*.jwks")) == ["kek.jwks"]


def test_what_was_made_and_cannot_be_deleted_is_named(config, tmp_path):
    program = tmp_path / "cannot_delete.py"
    program.write_text(
        "from keymgmt_file import FileProvider\n"
        "from keymgmt.errors import AccessDenied\n"
        "from keymgmt.cli import main\n"
        "def refuse(self, key):\n"
        "    self.describe_key(key)\n"
        "    raise AccessDenied('the disk is sacred')\n"
        "FileProvider.delete_key = refuse\n"
        "if __name__ == '__main__': main()\n"
    )
    arguments = ("plugin", "check", "local:kek", "-c", str(config), "--create-keys", "--json")
    done = programs.run(sys.executable, "-P", program, *arguments)
    made = json.loads(done.stdout)
    assert [each for each in made["checks"] if each["outcome"] == "failed"] == []
    assert made["left"]
    (deletion,) = [each for each in made["checks"] if each["name"] == "test_deletion"]
    assert deletion["outcome"] == "skipped"
    for name, why in made["left"].items():
        assert why == "AccessDenied: the disk is sacred"
        assert f"left in the service: {name}: " in done.stderr
        assert (config.parent / "keys" / f"{name}.jwks").exists()


def test_hooks_are_run_when_given(config, run, tmp_path):
    hooks = tmp_path / "hooks.py"
    hooks.write_text(
        textwrap.dedent(
            f"""
            import os
            KEYS = {str(config.parent / "keys")!r}

            def break_service():
                os.rename(KEYS, KEYS + ".away")

            def heal_service():
                if os.path.exists(KEYS + ".away"):
                    os.rename(KEYS + ".away", KEYS)
            """
        )
    )
    done = run("plugin", "check", "local:kek", "-c", config, "--hooks", hooks, "--json")
    made = json.loads(done.stdout)
    assert made["hooks"] == ["break_service", "heal_service"]
    outcomes = {each["name"]: each["outcome"] for each in made["checks"]}
    assert outcomes["test_service_goes_and_returns"] == "passed"
    assert outcomes["test_service_hangs"] == "skipped"
    assert (config.parent / "keys").is_dir()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "defines no hook"),
        ("def break_service(): ...", "define heal_service"),
        ("1/0", "ZeroDivisionError"),
        (
            "def break_service(): 1/0\ndef heal_service(): ...",
            "the hook break_service failed: ZeroDivisionError",
        ),
    ],
)
def test_bad_hooks_are_refused(config, run, tmp_path, text, said):
    hooks = tmp_path / "hooks.py"
    hooks.write_text(text)
    done = run("plugin", "check", "local:kek", "-c", config, "--hooks", hooks, code=3)
    assert said in done.stderr


def test_an_unknown_provider_and_a_missing_key(config, run):
    done = run("plugin", "check", "loca", "-c", config, code=3)
    assert "did you mean 'local'?" in done.stderr
    done = run("plugin", "check", "local:nothing", "-c", config, code=3)
    assert "keys create local:nothing" in done.stderr
    done = run("plugin", "check", "local", "-c", config, "--report", "none/kit.json", code=3)
    assert "there is no folder none" in done.stderr
    done = run("plugin", "check", "local", "-c", config, "--report", "not there/kit.json", code=3)
    assert "mkdir -p 'not there'" in done.stderr


@pytest.mark.parametrize("on_terminal", [False, True])
def test_what_the_operator_has_to_mend_ends_it_before_the_first_check(
    config, run, tmp_path, terminal, on_terminal
):
    config.write_text(config.read_text() + 'passphrase = { prompt = "Passphrase" }\n')
    command = ("plugin", "check", "local", "-c", str(config), "--create-keys")
    said = "cannot ask for 'Passphrase': the checks make many providers"
    if on_terminal:
        ran = terminal(*command, cwd=tmp_path)
        assert ran.end() == 3
        assert said.encode() in ran.seen
    else:
        assert said in run(*command, code=3).stderr
    assert sorted(path.name for path in (tmp_path / "keys").glob("*.jwks")) == ["kek.jwks"]


def test_without_pytest_it_says_what_to_install(config):
    code = "import sys; sys.modules['pytest'] = None; from keymgmt.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, "plugin", "check", "local", "-c", str(config)]
    done = programs.run(*command)
    assert done.returncode == 3
    assert 'pip install "keymgmt[testing]"' in done.stderr


def test_new_refuses_bad_names_and_full_directories(run, tmp_path):
    for name in ("Acme", "../acme"):
        assert "not a name for a backend" in run("plugin", "new", name, code=3).stderr
    assert "exists already" in run("plugin", "new", "file", code=3).stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    assert "not empty" in run("plugin", "new", "acme", "full", code=3).stderr
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]
