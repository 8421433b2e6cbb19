"""Homes, users and directories as containers and service managers make them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from programs import run_python

from keymgmt import load_config
from keymgmt.errors import ConfigError

SHOW = """
import os, sys
import keymgmt._providers.registry
from keymgmt import load_config
from keymgmt.errors import ConfigError
uid = UID
try:
    os.setresuid(uid, uid, uid)
    config = load_config(*sys.argv[1:])
    print("loaded", config.provider("local").name)
except ConfigError as error:
    print(error)
"""


def run(*arguments: str, uid: int, **options: object) -> str:
    done = run_python(SHOW.replace("UID", str(uid)), *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_public_key_in_the_home_of_nobody(tmp_path):
    file = write(tmp_path / "keymgmt.toml", "")
    with load_config(file) as config, pytest.raises(ConfigError, match="nosuchuser"):
        config.public_key("~nosuchuser/release.pem")


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone becomes another user")
def test_a_user_without_a_home():
    """A container that runs under a number has no entry in passwd, and may have no HOME."""
    assert "no config file" in run(uid=54321, env={}, cwd="/")


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone becomes another user")
def test_a_config_directory_that_may_not_be_entered(tmp_path):
    closed = tmp_path / "xdg" / "keymgmt"
    closed.mkdir(parents=True)
    write(closed / "keymgmt.toml", "")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    closed.chmod(0o700)
    said = run(uid=54321, env={"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "HOME": "/"}, cwd="/")
    assert "keymgmt.toml" in said
    assert "Permission denied" in said
