"""A new backend as ``keymgmt plugin new`` writes it: builds, installs, keeps the contract."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from programs import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> Path:
    """The wheel of the core: tox built it already, at a desk it is built here."""
    folder = os.environ.get("KEYMGMT_TEST_DIST")
    if folder is None:
        folder = str(tmp_path_factory.mktemp("dist"))
        command = ["uv", "build", "--quiet", "--wheel", "--package", "keymgmt", "--out-dir", folder]
        subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    (wheel,) = Path(folder).glob("keymgmt-[0-9]*.whl")
    return wheel


@pytest.fixture(scope="module")
def fresh(core, tmp_path_factory) -> Path:
    """An environment with the core alone."""
    fresh = tmp_path_factory.mktemp("fresh")
    _run(fresh, "uv", "venv", "--quiet", "--python", sys.executable, "--clear", fresh)
    python = fresh / "bin" / "python"
    _run(fresh, "uv", "pip", "install", "--quiet", "--python", python, f"{core}[testing]")
    return fresh


def _run(folder: Path, *command: object) -> str:
    done = run(*command, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "options"), [("acme-site", ()), ("acme-kms", ("--http",))])
def test_a_new_backend_builds_installs_and_keeps_the_contract(fresh, tmp_path, name, options):
    # In the checkout of another project, whose settings and fixtures are not for it.
    (tmp_path / "conftest.py").write_text("raise SystemExit('the conftest of another project')")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '--no-such'")
    python, package = fresh / "bin" / "python", f"keymgmt_{name.replace('-', '_')}"
    _run(tmp_path, fresh / "bin" / "keymgmt", "plugin", "new", name, "new", *options)
    _run(tmp_path, "uv", "build", "--quiet", "--out-dir", tmp_path / "built", "new")
    (wheel,) = (tmp_path / "built").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert f"{package}/py.typed" in names
    assert {each.partition("/")[0].partition("-")[0] for each in names} == {package}
    _run(tmp_path, "uv", "pip", "install", "--quiet", "--python", python, wheel)
    # Elsewhere, so that the wheel is tested and not the tree beside it.
    (tmp_path / "new" / package).rename(tmp_path / "moved")
    said = _run(tmp_path / "new", python, "-P", "-m", "pytest", "-q", "-rs")
    passed, skipped = map(int, re.findall(r"(\d+) passed, (\d+) skipped", said)[0])
    assert passed >= 30
    # What it cannot show is what it does not claim, and nothing else.
    reasons = set(re.findall(r"SKIPPED .*?: ((?!\d+: ).*)", said))
    assert skipped == sum(map(int, re.findall(r"SKIPPED \[(\d+)\]", said)))
    may_lack = ("claim",) if options else ("claim", "expire_login", "denied_factory")
    assert all(any(each in reason for each in may_lack) for reason in reasons), said
    shown = _run(tmp_path, fresh / "bin" / "keymgmt", "backends")
    assert name in shown
    assert f"keymgmt-{name}" in shown


def test_a_new_backend_is_checked_as_it_is_installed(fresh, tmp_path):
    _run(tmp_path, fresh / "bin" / "keymgmt", "plugin", "new", "acme-toy", "new")
    _run(tmp_path, "uv", "pip", "install", "-q", "--python", fresh / "bin" / "python", "./new")
    keys = {name: {"1": secrets.token_hex(32)} for name in ("kek", "other")}
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    (tmp_path / "site.toml").write_text(
        """
        [providers.site]
        backend = "acme-toy"
        distribution = "keymgmt-acme-toy"
        path = "keys.json"
        """
    )
    (tmp_path / "site.toml").chmod(0o600)
    arguments = ["site:kek", "--other-key", "other", "--config", "site.toml", "--json"]
    report = json.loads(_run(tmp_path, fresh / "bin" / "keymgmt", "plugin", "check", *arguments))
    assert report["ok"] is True
    assert report["versions"]["distribution"] == "keymgmt-acme-toy"
    assert report["counts"]["passed"] >= 28
