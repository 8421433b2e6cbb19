"""The command line starts without any backend, and survives a broken command of a stranger."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import run, run_python

Install = Callable[..., Path]
Cli = Callable[..., Any]
GROUP = "keymgmt.commands"


def keymgmt(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "keymgmt.cli", *arguments]
    return run(*command)


def test_help_imports_neither_openvino_nor_a_backend():
    program = """
import sys
from keymgmt.cli import main
sys.argv = ["keymgmt", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print([name for name in sys.modules if name.startswith(("openvino", "keymgmt_", "numpy"))])
"""
    done = run_python(program, check=True)
    assert "--config" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("option", "unneeded"),
    [
        # hashlib loads OpenSSL; typer, and the metadata of every distribution, take longer still.
        ("--version", {"typer", "hashlib", "keymgmt._system.files"}),
        ("--help", {"pydantic", "cryptography", "hashlib", "rich", "keymgmt._config.config"}),
    ],
)
def test_what_costs_time_is_not_imported_to_say_this(option, unneeded):
    program = f"""
import sys
from keymgmt.cli import main
sys.argv = ["keymgmt", {option!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(*sys.modules)
"""
    said = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60)
    assert not unneeded & set(said.splitlines()[-1].split())


def test_a_strangers_command_is_imported_when_it_runs_and_not_for_help(install, monkeypatch):
    source = (
        '"""Look after Acme HSMs.\n\nMore."""\nimport typer\nprint("imported")\n'
        "app = typer.Typer()\n@app.command()\n"
        "def go(context: typer.Context) -> None:\n    print(type(context.obj).__name__)\n"
    )
    install("acme-keymgmt", GROUP, {"acme": "acme_commands:app"}, acme_commands=source)
    listed = keymgmt("--help")
    assert "From acme-keymgmt." in listed.stdout
    assert "imported" not in listed.stdout
    monkeypatch.setenv("_KEYMGMT_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "keymgmt ac")
    completed = keymgmt()
    assert '"acme":"From acme-keymgmt."' in completed.stdout
    assert "imported" not in completed.stdout
    monkeypatch.delenv("_KEYMGMT_COMPLETE")
    ran = keymgmt("acme")
    assert (ran.returncode, ran.stdout) == (0, "imported\nState\n")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nothing_of_that_name\napp = 1", "ModuleNotFoundError: No module named"),
        ("raise RuntimeError('bad licence')", "RuntimeError: bad licence"),
        ("app = 1", "is not a typer.Typer"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_broken_command_is_explained_and_breaks_nothing_else(cli, install, source, said):
    install("acme-keymgmt", GROUP, {"acme": "acme_commands:app"}, acme_commands=source)
    assert cli("--help").code == 0
    ran = cli("acme")
    assert ran.code == 3
    assert "the command 'acme' of acme-keymgmt" in ran.error
    assert said in ran.error
    assert ran.hint
    assert "Traceback" not in ran.err


def test_a_strangers_command_has_no_option_that_installs_another_programs_completion(cli, install):
    source = "import typer\napp = typer.Typer()\n@app.command()\ndef go() -> None: ...\n"
    install("acme-keymgmt", GROUP, {"acme": "acme_commands:app"}, acme_commands=source)
    ran = cli("acme", "--help")
    assert "--config" in ran.out
    assert "completion" not in ran.out


@pytest.mark.parametrize("word", ["ame", "vertify", "Seal"])
def test_a_misspelt_command_is_answered_with_the_one_that_was_meant(cli, install, word):
    """Those of other distributions too."""
    install("acme-keymgmt", GROUP, {"acme": "acme_commands:app"}, acme_commands="")
    meant = {"ame": "acme", "vertify": "verify", "Seal": "seal"}[word]
    assert f"Did you mean {meant!r}" in cli(word).error


def test_completion_in_a_broken_command_says_nothing(install, monkeypatch):
    """What it printed would stand in the middle of what the person types."""
    install("acme-keymgmt", GROUP, {"acme": "acme_commands:app"}, acme_commands="app = 1")
    monkeypatch.setenv("_KEYMGMT_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "keymgmt acme ")
    ran = keymgmt()
    assert (ran.stdout, ran.stderr) == ("", "")


def test_a_command_provided_twice_is_refused_by_both_names(cli, install):
    source = "import typer\napp = typer.Typer()\n"
    install("acme-one", GROUP, {"acme": "acme_one:app"}, acme_one=source)
    install("acme-two", GROUP, {"acme": "acme_two:app"}, acme_two=source)
    ran = cli("acme")
    assert ran.code == 3
    assert "provided twice, by acme-one and acme-two" in ran.error


def test_a_stranger_cannot_shadow_a_command_of_ours(cli, install):
    trap = "raise RuntimeError('imported')"
    install("evil", GROUP, {"unseal": "evil_commands:app"}, evil_commands=trap)
    ran = cli("unseal", "--help")
    assert ran.code == 0
    assert "sealed model" in ran.out


def test_an_unknown_command_is_a_usage_error(cli):
    ran = cli("no-such-command")
    assert ran.code == 2
    assert "No such command" in ran.err
    assert not ran.out


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("run", "openvino"),
        ("demo", "demo"),
        ("leakcheck", "demo"),
        ("vault", "vault"),
        ("tpm", "tpm2"),
    ],
)
def test_a_command_of_ours_that_is_not_installed_is_named_with_its_extra(
    cli, monkeypatch, command, extra
):
    monkeypatch.setattr("keymgmt.cli._plugins.announced", dict)
    ran = cli(command)
    assert ran.code == 3
    assert f"the command {command!r} is not installed" in ran.error
    assert f'pip install "keymgmt[{extra}]"' in ran.hint
