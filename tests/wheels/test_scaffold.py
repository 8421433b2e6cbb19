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

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the core: tox built it already, at a desk it is built here."""
    folder = os.environ.get("KEYMGMT_TEST_DIST")
    if folder is None:
        folder = str(tmp_path_factory.mktemp("dist"))
        command = ["uv", "build", "--quiet", "--wheel", "--package", "keymgmt", "--out-dir", folder]
        subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    (wheel,) = Path(folder).glob("keymgmt-[0-9]*.whl")
    return wheel


def test_a_new_backend_builds_installs_and_keeps_the_contract(core: Path, tmp_path: Path) -> None:
    def run(*command: object, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=300,
            env={**os.environ, **(env or {})},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    fresh = tmp_path / "fresh"
    run("uv", "venv", "--quiet", "--python", sys.executable, fresh)
    python = fresh / "bin" / "python"
    run("uv", "pip", "install", "--quiet", "--python", python, f"{core}[testing]")
    run(fresh / "bin" / "keymgmt", "plugin", "new", "acme-site", "new")
    run("uv", "build", "--quiet", "--out-dir", tmp_path / "built", "new")
    (wheel,) = (tmp_path / "built").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "keymgmt_acme_site/py.typed" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"keymgmt_acme_site"}
    run("uv", "pip", "install", "--quiet", "--python", python, wheel)
    # Elsewhere, so that the wheel is tested and not the tree beside it.
    (tmp_path / "new" / "keymgmt_acme_site").rename(tmp_path / "moved")
    said = run(python, "-P", "-m", "pytest", "-q", "-rs", "--import-mode=importlib", "new/tests")
    passed, skipped = map(int, re.findall(r"(\d+) passed, (\d+) skipped", said)[0])
    assert passed >= 30
    # What it cannot show is what it does not claim, and nothing else.
    reasons = set(re.findall(r"SKIPPED .*?: ((?!\d+: ).*)", said))
    assert skipped == sum(map(int, re.findall(r"SKIPPED \[(\d+)\]", said)))
    assert all("claim" in r or "expire_login" in r or "denied_factory" in r for r in reasons), said
    shown = run(fresh / "bin" / "keymgmt", "backends")
    assert "acme-site" in shown
    assert "keymgmt-acme-site" in shown
    keys = {name: {"1": secrets.token_hex(32)} for name in ("kek", "other")}
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    (tmp_path / "site.toml").write_text(
        """
        [providers.site]
        backend = "acme-site"
        distribution = "keymgmt-acme-site"
        path = "keys.json"
        """
    )
    (tmp_path / "site.toml").chmod(0o600)
    arguments = ["site:kek", "--other-key", "other", "--config", "site.toml", "--json"]
    report = json.loads(run(fresh / "bin" / "keymgmt", "plugin", "check", *arguments))
    assert report["ok"] is True
    assert report["versions"]["distribution"] == "keymgmt-acme-site"
    assert report["counts"]["passed"] >= 28
