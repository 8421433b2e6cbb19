"""What holds for every command: options anywhere, JSON, errors of the system, streams that end."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from programs import run_python

import keymgmt.cli as keymgmt_cli
from keymgmt._system import entry_points

Cli = Callable[..., Any]
PROGRAM = [sys.executable, "-P", "-m", "keymgmt"]


def keymgmt(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.run(command, timeout=60, check=False, **options)


@pytest.mark.parametrize(
    "place",
    [
        ("-c", "{config}", "keys", "list", "--json"),
        ("keys", "-c", "{config}", "list", "--json"),
        ("keys", "list", "--json", "-c", "{config}"),
        ("--json", "keys", "list", "--config", "{config}"),
        ("keys", "--json", "list", "--config={config}"),
        ("-c", "nowhere.toml", "keys", "list", "--json", "-c", "{config}"),
    ],
)
def test_global_options_stand_anywhere(cli, site, monkeypatch, place):
    monkeypatch.delenv("KEYMGMT_CONFIG")
    ran = cli(*(word.format(config=site / "keymgmt.toml") for word in place))
    assert ran.code == 0, ran.err
    assert ran.json()["format"] == "keymgmt-keys/1"


def test_what_stands_for_another_program_is_not_ours(cli, site):
    ran = cli("keys", "list", "--", "--json")
    assert ran.code == 3
    assert ran.out == ""


def test_log_lines_are_json(site):
    for place in (("--log-json", "seal"), ("seal", "--log-json", "-v")):
        ran = keymgmt(*place, "model", "out.sealed", "--force", cwd=site)
        lines = [json.loads(line) for line in ran.stderr.splitlines() if line.startswith("{")]
        events = {line["event"]: line for line in lines if line["logger"] == "keymgmt.audit"}
        assert events["seal"]["outcome"] == "ok"
        assert events["wrap"]["format"] == "keymgmt-log/1"
        assert events["wrap"]["level"] == "info"


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("inspect", "nothere", "--json"), 3, "ConfigError"),
        (("--json", "nosuch"), 2, "UsageError"),
        (("seal", "--json"), 2, "UsageError"),
        (("keys", "show", "local:nothing", "--json"), 3, "KeyNotFound"),
        (("verify", "model.sealed", "--name", "other", "--json"), 4, "UntrustedPublisher"),
        (("file", "lock", "--json", "nobody"), 3, "ConfigError"),
    ],
)
def test_an_error_is_one_object_on_stdout(cli, sealed, arguments, code, kind):
    ran = cli(*arguments)
    assert ran.code == code, ran.err
    said = ran.json()
    assert said["format"] == "keymgmt-error/1"
    assert (said["error"]["exit_code"], said["error"]["class"]) == (code, kind)
    assert said["error"]["message"] == ran.error


def test_why_nothing_opened_is_in_the_json(cli, sealed):
    (sealed.parent / "keys").rename(sealed.parent / "elsewhere")
    ran = cli("verify", sealed, "--json")
    (attempt,) = ran.json()["error"]["attempts"]
    assert (attempt["recipient"], attempt["error"]) == ("file:models@1", "ProviderUnavailable")
    ran = cli("keys", "list", "--json")
    assert ran.code == 6
    said = ran.json()
    assert said["failed"][0]["provider"] == "local"
    assert said["error"]["class"] == "ProviderUnavailable"


@pytest.mark.parametrize("words", [("help", "keys", "create"), ("keys", "create", "-h")])
def test_help_in_both_ways_is_the_same(cli, words):
    ran = cli(*words)
    assert ran.code == 0
    assert ran.out == cli("keys", "create", "--help").out
    assert "Usage: keymgmt keys create [OPTIONS] PROVIDER:KEY\n" in ran.out


def test_the_version_in_every_way(cli):
    said = cli("--version").out
    assert said == f"keymgmt {version('keymgmt')}\n"
    assert cli("-V").out == cli("version").out == keymgmt("--version").stdout == said


COMMANDS = {
    f"keymgmt.cli.{name}"
    for _, name, _ in pkgutil.iter_modules(keymgmt_cli.__path__)
    if not name.startswith("_")
}


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (("--version",), set()),
        (("-V",), set()),
        (("--help",), set()),
        ((), set()),
        (("seal", "--help"), {"keymgmt.cli.seal", "keymgmt.cli.inspect"}),
        (("keys", "create", "-h"), {"keymgmt.cli.keys"}),
    ],
)
def test_help_imports_no_provider_no_cryptography_and_no_other_command(arguments, ours):
    """What costs: half of the time was cryptography, pydantic and rich."""
    if arguments[:1] in (("--version",), ("-V",)):
        assert imports_nothing_heavy(arguments, {}, *COMMANDS, "typer")
    else:
        assert imports_nothing_heavy(arguments, {}, *COMMANDS - ours)
    words = " ".join(["keymgmt", *arguments[:1], ""])
    assert imports_nothing_heavy((), completing(words), *COMMANDS - ours)


def test_the_help_of_the_program_says_of_each_command_what_its_own_help_says():
    root: Any = typer.main.get_command(keymgmt_cli.app)
    listed = {name: each.help for name, each in root.commands.items()}
    assert {"init", "seal", "keys", "help"} <= listed.keys()
    own = {name: each.load().help.partition("\n\n")[0] for name, each in root.commands.items()}
    assert listed == {name: " ".join(line.split()) for name, line in own.items()}


def completing(words: str) -> dict[str, str]:
    """The environment in which zsh asks what comes next."""
    return {"_KEYMGMT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}


def imports_nothing_heavy(
    arguments: tuple[str, ...], environment: dict[str, str], *more: str
) -> str:
    """What a command prints; at its end no module is loaded that costs."""
    heavy = ("cryptography", "pydantic", "rich", "openvino", "keymgmt_", "keymgmt._crypto", *more)
    program = (
        "import sys, atexit\n"
        f"heavy = {heavy}\n"
        "atexit.register(lambda: print([n for n in sys.modules if n.startswith(heavy)]))\n"
        "from keymgmt.cli import main\nmain()\n"
    )
    done = run_python(program, *arguments, env=os.environ | environment)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    return done.stdout


def test_help_of_a_command_of_ours_asks_for_no_other_distribution():
    """What reads their metadata imports the package email."""
    assert imports_nothing_heavy(("seal", "--help"), {}, "email")


def test_completing_a_provider_reads_the_config_and_no_more(tmp_path, monkeypatch):
    config = tmp_path / "keymgmt.toml"
    config.write_text("".join(f'[providers.l{n}]\nbackend = "file"\n' for n in "ab"))
    for words in ("keymgmt doctor l", f"keymgmt -c {config} keys show l"):
        monkeypatch.setenv("KEYMGMT_CONFIG", str(config) if "-c" not in words else "nothere")
        said = imports_nothing_heavy((), completing(words))
        assert "la" in said
        assert "lb" in said


def test_what_is_installed_is_looked_for_once(cli, monkeypatch):
    """Every distribution of the environment is asked, however many commands there are."""
    asked: list[str] = []
    real = entry_points.announced
    monkeypatch.setattr(entry_points, "announced", lambda group: asked.append(group) or real(group))
    assert cli("--help").code == 0
    assert asked == ["keymgmt.commands"]


@pytest.mark.parametrize(
    ("arguments", "moments"),
    [
        (["doctor"], 6),
        (["keys", "list", "--json"], 0),
        (["--help"], 0),
        (["file", "--help"], 1),  # of another distribution
    ],
)
def test_a_command_that_is_stopped_prints_no_traceback(site, ends_quietly, arguments, moments):
    ends_quietly(*arguments, cwd=site, moments=moments)


@pytest.mark.parametrize("arguments", [["keys", "list"], ["keys", "list", "--json"]])
def test_stdout_that_cannot_be_written_is_an_error(site, arguments):
    with Path("/dev/full").open("w") as full:
        ran = keymgmt(*arguments, stdout=full, cwd=site)
    assert (ran.returncode, ran.stderr.splitlines()[0]) == (
        1,
        "error: stdout: No space left on device",
    )


def everything() -> Any:
    """Every command with the words that lead to it: of the core, and of what is installed here."""
    root: Any = typer.main.get_command(keymgmt_cli.app)
    context = typer.Context(root)
    for name in root.list_commands(context):
        yield from leaves(root.resolve_command(context, [name])[1], (name,))


def leaves(command: Any, words: tuple[str, ...] = ()) -> Any:
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, below in command.commands.items():
        yield from leaves(below, (*words, name))


@pytest.mark.once
def test_every_help_page_has_an_example_that_can_be_typed(cli, monkeypatch):
    """At 40 columns too: nothing of an option's name is cut off."""
    monkeypatch.setenv("COLUMNS", "40")
    for words, command in everything():
        page = cli(*words, "--help").out
        lines = [line for line in page.splitlines() if line.startswith("      keymgmt ")]
        examples = [shlex.split(line) for line in lines]
        assert examples, words
        for example in examples:
            assert tuple(example[1 : len(words) + 1]) == words
            # Parsed, and not run.
            command.make_context(words[-1], example[len(words) + 1 :])
        for option in command.params:
            assert all(name in page for name in option.opts if name.startswith("-"))
        assert not re.search("<[a-z]", page), page
        assert "…" not in page
