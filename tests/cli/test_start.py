"""The command line starts without any backend, and survives a broken command of a stranger."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Install = Callable[..., Path]


@pytest.fixture
def strangers(tmp_path: Path) -> Install:
    """Put a distribution that announces commands on a path; returns that path."""

    def install(name: str, commands: dict[str, str], **modules: str) -> Path:
        site = tmp_path / "site"
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"{key} = {value}\n" for key, value in commands.items())
        (info / "entry_points.txt").write_text(f"[keymgmt.commands]\n{lines}")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
        return site

    return install


def keymgmt(*arguments: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(site)} if site else {})
    command = [sys.executable, "-m", "keymgmt.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_help_imports_neither_openvino_nor_a_backend() -> None:
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
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert "--config" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_strangers_command_is_imported_when_it_runs_and_not_for_help(strangers: Install) -> None:
    source = (
        '"""Look after Acme HSMs.\n\nMore."""\nimport typer\nprint("imported")\n'
        "app = typer.Typer()\n@app.command()\n"
        "def go(context: typer.Context) -> None:\n    print(type(context.obj).__name__)\n"
    )
    site = strangers("acme-keymgmt", {"acme": "acme_commands:app"}, acme_commands=source)
    listed = keymgmt("--help", site=site)
    assert "Look after Acme HSMs. (acme-keymgmt)" in listed.stdout
    assert "imported" not in listed.stdout
    ran = keymgmt("acme", site=site)
    assert (ran.returncode, ran.stdout) == (0, "imported\nState\n")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nothing_of_that_name\napp = 1", "ModuleNotFoundError: No module named"),
        ("raise RuntimeError('bad licence')", "RuntimeError: bad licence"),
        ("app = 1", "is no typer.Typer"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_broken_command_is_explained_and_breaks_nothing_else(
    strangers: Install, source: str, said: str
) -> None:
    site = strangers("acme-keymgmt", {"acme": "acme_commands:app"}, acme_commands=source)
    assert keymgmt("--help", site=site).returncode == 0
    ran = keymgmt("acme", site=site)
    assert ran.returncode == 3
    assert "error: the command 'acme' of acme-keymgmt" in ran.stderr
    assert said in ran.stderr
    assert "hint: " in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_command_provided_twice_is_refused_by_both_names(strangers: Install) -> None:
    source = "import typer\napp = typer.Typer()\n"
    strangers("acme-one", {"acme": "acme_one:app"}, acme_one=source)
    site = strangers("acme-two", {"acme": "acme_two:app"}, acme_two=source)
    ran = keymgmt("acme", site=site)
    assert ran.returncode == 3
    assert "provided twice, by acme-one and acme-two" in ran.stderr


def test_an_unknown_command_is_a_usage_error() -> None:
    ran = keymgmt("no-such-command")
    assert ran.returncode == 2
    assert "No such command" in ran.stderr
    assert not ran.stdout
