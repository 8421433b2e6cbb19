"""A question on a terminal is seen, and nothing paints over it, whatever verb asks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
Terminal = Callable[..., Any]
PASSPHRASE = "correct horse battery"
QUESTION = b"Passphrase of the models: "
MOVES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\r")


@pytest.fixture
def locked(cli: Cli, site: Path, sealed: Path) -> Path:
    """The site with its keys under a passphrase that is asked."""
    file = site / "passphrase"
    file.write_text(PASSPHRASE)
    file.chmod(0o600)
    config = site / "keymgmt.toml"
    plain = config.read_text()
    line = 'path = "keys"\npassphrase = { file = "passphrase" }'
    config.write_text(plain.replace('path = "keys"', line))
    assert cli("file", "lock").code == 0
    asked = QUESTION.decode().rstrip(": ")
    line = f'path = "keys"\npassphrase = {{ prompt = "{asked}" }}'
    config.write_text(plain.replace('path = "keys"', line))
    return site


@pytest.mark.parametrize(
    "arguments",
    [
        ("seal", "model", "more.sealed"),
        ("verify", "model.sealed"),
        ("verify", "."),
        ("unseal", "model.sealed", "plain"),
        ("sign", "model.sealed"),
        ("rewrap", "model.sealed"),
        ("rewrap", "."),
        ("reseal", "model.sealed"),
        ("doctor",),
        ("keys", "rotate", "local:models"),
    ],
    ids=" ".join,
)
def test_a_question_is_seen_and_waits(
    terminal: Terminal, locked: Path, arguments: tuple[str, ...]
) -> None:
    run = terminal(*arguments, cwd=locked)
    run.until(QUESTION)
    # A bar is painted ten times a second.
    assert MOVES.sub(b"", run.quiet(0.5)) == b""
    shown = MOVES.sub(b"", run.seen).splitlines()
    assert shown[-1].strip() == QUESTION.strip()
    run.answer(PASSPHRASE)
    code = run.end()
    assert code == 0, run.seen
    assert run.seen.count(QUESTION) == 1


def test_a_key_is_deleted_by_its_name(terminal: Terminal, cli: Cli, site: Path) -> None:
    for typed, code in (("y", 3), ("local:edg", 3), ("local:edge", 0)):
        cli("keys", "create", "local:edge")
        run = terminal("keys", "delete", "local:edge", "--force", cwd=site)
        run.until(b"Type local:edge to go on: ")
        run.answer(typed)
        assert run.end() == code, run.seen
        assert cli("keys", "show", "local:edge").code == (0 if code else 3)
