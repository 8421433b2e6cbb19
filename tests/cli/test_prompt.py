"""A question on a terminal is seen, and nothing paints over it, whatever verb asks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
Terminal = Callable[..., Any]
PASSPHRASE = "correct horse battery"
MAY_UNSHARE = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
QUESTION = "Passphrase of the models: "


@pytest.fixture
def locked(cli, site, sealed) -> Path:
    """The site with its keys under a passphrase that is asked."""
    file = site / "passphrase"
    file.write_text(PASSPHRASE)
    file.chmod(0o600)
    config = site / "keymgmt.toml"
    plain = config.read_text()
    line = 'path = "keys"\npassphrase = { file = "passphrase" }'
    config.write_text(plain.replace('path = "keys"', line))
    assert cli("file", "lock").code == 0
    asked = QUESTION.rstrip(": ")
    line = f'path = "keys"\npassphrase = {{ prompt = "{asked}" }}'
    config.write_text(plain.replace('path = "keys"', line))
    return site


@pytest.mark.once
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
        ("reseal", "."),
        ("sign", ".", "--if-signed-by", "publisher.pem"),
        ("doctor",),
        ("keys", "rotate", "local:models"),
        ("keys", "create", "local:more"),
        ("keys", "list"),
        ("keys", "usage", ".", "--prove"),
        ("keys", "export", "local:publisher"),
        pytest.param(
            ("exec", "model.sealed", "--", "true"),
            marks=pytest.mark.skipif(not MAY_UNSHARE, reason="no mount namespace is to be had"),
        ),
    ],
    ids=" ".join,
)
def test_a_question_is_seen_and_waits(asks, locked, arguments):
    asks(QUESTION, PASSPHRASE, *arguments, cwd=locked)


def test_a_question_that_ends_without_an_answer_is_no_fault_of_the_backend(terminal, locked):
    """Ctrl-D."""
    ran = terminal("verify", "model.sealed", cwd=locked)
    ran.until(QUESTION.encode())
    os.write(ran.descriptor, b"\x04")
    assert ran.end() == 6, ran.seen
    assert b"type it, or name a file" in ran.seen
    assert b"report" not in ran.seen


def test_whoever_gives_no_answer_is_not_asked_again_in_the_same_run(terminal, locked):
    ran = terminal("doctor", "--open", "model.sealed", cwd=locked)
    ran.until(QUESTION.encode())
    os.write(ran.descriptor, b"\x04")
    assert ran.end() == 1, ran.seen
    assert ran.seen.count(QUESTION.encode()) == 1
    assert ran.seen.count(b"no answer to") > 1


def test_a_key_is_deleted_by_its_name(terminal, cli, site):
    for typed, code in (("y", 3), ("local:edg", 3), ("local:edge", 0)):
        cli("keys", "create", "local:edge")
        run = terminal("keys", "delete", "local:edge", "--force", cwd=site)
        run.until(b"Type local:edge to go on: ")
        run.answer(typed)
        assert run.end() == code, run.seen
        assert cli("keys", "show", "local:edge").code == (0 if code else 3)
