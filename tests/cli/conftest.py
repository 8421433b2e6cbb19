"""The command line in this process: ``cli("seal", ...)``, and a site that ``init`` made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import keymgmt.cli


@dataclass
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """All of stdout, which is one JSON document."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The line ``error: ...`` without its mark."""
        return next(
            line.removeprefix("error: ")
            for line in self.err.splitlines()
            if line.startswith("error: ")
        )

    @property
    def hint(self) -> str:
        """The line ``hint: ...`` without its mark; empty if there is none."""
        lines = [line for line in self.err.splitlines() if line.startswith("hint: ")]
        return lines[-1].removeprefix("hint: ") if lines else ""


Cli = Callable[..., Ran]


@pytest.fixture(autouse=True)
def _nowhere(tmp_path, monkeypatch) -> None:
    """No config of the person who runs the tests is found."""
    monkeypatch.delenv("KEYMGMT_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def cli(capsys, monkeypatch) -> Cli:
    """Run ``keymgmt ARGUMENTS``."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["keymgmt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            keymgmt.cli.main()
        out, err = capsys.readouterr()
        code = end.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), out, err)

    return run


@pytest.fixture
def site(cli, tmp_path, monkeypatch) -> Path:
    """The working directory after ``keymgmt init .``, with a plain model in ``model/``."""
    pytest.importorskip("keymgmt_file")
    assert cli("init", ".").code == 0
    monkeypatch.setenv("KEYMGMT_CONFIG", str(tmp_path / "work" / "keymgmt.toml"))
    folder = tmp_path / "work" / "model"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 512)
    (folder / "notes.txt").write_text("hello")
    return tmp_path / "work"


@pytest.fixture
def sealed(cli, site) -> Path:
    """``model.sealed`` there, sealed and signed by the config that ``init`` made."""
    ran = cli("seal", "model", "model.sealed", "--name", "resnet50", "--release", "3")
    assert ran.code == 0, ran.err
    return site / "model.sealed"
