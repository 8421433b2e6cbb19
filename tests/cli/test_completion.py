"""What each shell offers, in a real one, with the script that ``keymgmt completion`` installs."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import run

Cli = Callable[..., Any]
Type = Callable[[str, str], None]


def test_the_shell_completes_providers_and_keys(cli, site):
    def complete(words: str) -> str:
        environment = os.environ | {
            "_KEYMGMT_COMPLETE": "complete_zsh",
            "_TYPER_COMPLETE_ARGS": f"keymgmt {words}",
        }
        command = [sys.executable, "-c", "from keymgmt.cli import main; main()"]
        done = run(*command, env=environment)
        return done.stdout.replace("\\", "")

    assert "local:" in complete("keys show loc")
    shown = complete("keys show local:mod")
    assert "models" in shown
    assert "publisher" not in shown


@pytest.fixture
def environment(sealed, tmp_path) -> dict[str, str]:
    """That of a shell, in a site with a sealed model and a recipient file."""
    program = Path(sys.executable).with_name("keymgmt")
    if not program.exists():
        pytest.skip("no keymgmt beside this Python")
    (sealed.parent / "devices").mkdir()
    (sealed.parent / "devices" / "line1.recipient").touch()
    return {
        "PATH": f"{program.parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "TERM": "dumb",
        "KEYMGMT_CONFIG": str(sealed.parent / "keymgmt.toml"),
    }


def install(shell: str, environment: dict[str, str]) -> None:
    command = ["keymgmt", "completion", shell, "--install"]
    subprocess.run(command, env=environment, check=True, timeout=60)


@pytest.fixture
def type_in(environment, require_tool, tmp_path) -> Iterator[Callable[[str], Type]]:
    """Start a shell with the completion installed; type into it until something is seen."""
    started = []

    def start(shell: str) -> Type:
        program = require_tool(shell, package=shell)
        install(shell, environment)
        with (tmp_path / f".{shell}rc").open("a") as file:
            file.write("\nPS1='> '\n")
        child, terminal = pty.fork()
        if not child:
            os.execve(program, [shell, "-i"], environment)
        started.append((child, terminal))
        seen = ""

        def until(expected: str) -> None:
            nonlocal seen
            while expected not in re.sub(".\b", "", seen):
                assert select.select([terminal], [], [], 30)[0], seen
                seen += os.read(terminal, 4096).decode(errors="replace")

        def type_(keys: str, expected: str) -> None:
            nonlocal seen
            seen = ""
            os.write(terminal, f"\x15{keys}".encode())
            until(expected)
            assert "local:local" not in seen
            assert "local::" not in seen

        until("> ")
        return type_

    yield start
    for child, terminal in started:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


@pytest.mark.once
def test_bash_completes_what_stands_after_a_colon_or_at_sign(type_in):
    type_ = type_in("bash")
    type_("keymgmt keys show local:mod\t", "show local:models")
    type_("keymgmt doctor lo\t\t\t", "publisher")
    sealing = "keymgmt seal model out.sealed"
    type_(f"{sealing} --to local:mod\t--release 1", "--to local:models --release 1")
    type_(f"{sealing} --to=local:models+local:mod\tx", "--to=local:models+local:models x")
    # A recipient file; a folder on the way to it is not the end of the word.
    rewrapping = "keymgmt rewrap model.sealed"
    type_(f"{rewrapping} --add @dev\tl\ty", "--add @devices/line1.recipient y")
    type_(
        f"{rewrapping} --add local:models+@devices/l\tx",
        "--add local:models+@devices/line1.recipient x",
    )
    type_(f"{rewrapping} --drop file:m\tz", "--drop file:models@1 z")
    type_("keymgmt keys create local:x --sign --kind ed\tz", "--kind ed25519 z")


@pytest.mark.once
def test_zsh_completes_at_the_first_tab_after_an_equals_sign_and_shows_apostrophes(type_in):
    type_ = type_in("zsh")
    type_("keymgmt insp\tx", "keymgmt inspect x")
    type_("keymgmt keys \t", "Sign another machine's recipient file")
    type_("keymgmt keys show local:mod\tx", "show local:models x")
    type_("keymgmt seal x y --to=local:models+local:mod\tx", "--to=local:models+local:models x")
    type_("keymgmt rewrap model.sealed --add @devices/l\tx", "@devices/line1.recipient x")
    type_("keymgmt rewrap model.sealed --drop file:m\tx", "--drop file:models@1 x")
    type_("keymgmt verify model/w\tx", "model/weights.bin x")


@pytest.mark.once
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (
            "keymgmt insp",
            ["inspect\tShow what a sealed model says of itself; it takes no key"],
        ),
        ("keymgmt keys show local:", ["local:models", "local:publisher"]),
        ("keymgmt seal x y --to=local:models+local:m", ["--to=local:models+local:models"]),
        ("keymgmt rewrap x --add @devices/", ["@devices/line1.recipient"]),
        ("keymgmt rewrap model.sealed --drop ", ["file:models@1"]),
        ("keymgmt verify model/w", ["model/weights.bin"]),
        ("keymgmt keys show local:n", []),
        ("keymgmt --config=model/n", ["--config=model/notes.txt"]),
        ("true; keymgmt completion f", ["fish"]),
    ],
)
def test_fish_completes(environment, require_tool, typed, offered):
    fish = require_tool("fish", package="fish")
    install("fish", environment)
    asked = run(fish, "-c", 'complete --do-complete "$argv"', typed, env=environment, check=True)
    lines = asked.stdout.splitlines()
    assert len(lines) == len(offered), asked
    assert all(map(str.startswith, sorted(lines), offered)), asked
