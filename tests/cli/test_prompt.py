"""A question on a terminal is seen, and nothing paints over it, whatever verb asks."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
PASSPHRASE = "correct horse battery"
QUESTION = b"Passphrase of the models: "
MOVES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """``keymgmt ARGUMENTS`` on a terminal of its own."""

    def __init__(self, *arguments: object, cwd: Path) -> None:
        command = [sys.executable, "-P", "-m", "keymgmt", *map(str, arguments)]
        self.child, self.descriptor = pty.fork()
        if not self.child:
            os.chdir(cwd)
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, command)
        self.seen = b""

    def until(self, text: bytes, seconds: float = 60) -> None:
        while text not in self.seen:
            ready, _, _ = select.select([self.descriptor], [], [], seconds)
            assert ready, self.seen
            self.seen += os.read(self.descriptor, 4096)

    def quiet(self, seconds: float) -> bytes:
        """What is still written while nobody answers."""
        more = b""
        while select.select([self.descriptor], [], [], seconds)[0]:
            more += os.read(self.descriptor, 4096)
        return more

    def answer(self, text: str) -> None:
        os.write(self.descriptor, text.encode() + b"\n")

    def end(self) -> int:
        # Linux ends the reading of a terminal whose last writer is gone with EIO.
        with contextlib.suppress(OSError):
            while part := os.read(self.descriptor, 4096):
                self.seen += part
        _, status = os.waitpid(self.child, 0)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status)


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
def test_a_question_is_seen_and_waits(locked: Path, arguments: tuple[str, ...]) -> None:
    run = Terminal(*arguments, cwd=locked)
    run.until(QUESTION)
    # A bar is painted ten times a second.
    assert MOVES.sub(b"", run.quiet(0.5)) == b""
    shown = MOVES.sub(b"", run.seen).splitlines()
    assert shown[-1].strip() == QUESTION.strip()
    run.answer(PASSPHRASE)
    code = run.end()
    assert code == 0, run.seen
    assert run.seen.count(QUESTION) == 1


def test_a_key_is_deleted_by_its_name(cli: Cli, site: Path) -> None:
    for typed, code in (("y", 3), ("local:edg", 3), ("local:edge", 0)):
        cli("keys", "create", "local:edge")
        run = Terminal("keys", "delete", "local:edge", "--force", cwd=site)
        run.until(b"Type local:edge to go on: ")
        run.answer(typed)
        assert run.end() == code, run.seen
        assert cli("keys", "show", "local:edge").code == (0 if code else 3)
