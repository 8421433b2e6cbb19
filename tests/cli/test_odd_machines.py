"""Homes, directories and encodings as containers and service managers make them."""

from __future__ import annotations

import os
from typing import Any

import pytest
from programs import run_keymgmt, run_python

from keymgmt import load_config
from keymgmt.errors import ConfigError


def test_the_home_of_nobody(tmp_path):
    file = tmp_path / "keymgmt.toml"
    file.write_text('[providers.local]\nbackend = "file"\npath = "~nosuchuser/keys"\n')
    with load_config(file) as config, pytest.raises(ConfigError, match="nosuchuser"):
        config.provider("local")


def test_a_working_directory_that_was_removed(tmp_path):
    file = tmp_path / "keymgmt.toml"
    file.write_text('[providers.local]\nbackend = "file"\npath = "keys"\n')
    gone = tmp_path / "gone"
    gone.mkdir()
    # The imports come first: pydantic has none without a working directory on Python 3.13.
    program = (
        "import os, sys, keymgmt._providers.registry; os.rmdir(os.getcwd()); "
        "print(keymgmt.load_config(sys.argv[1]).provider('local').name)"
    )
    done = run_python(program, file, cwd=gone)
    assert done.stdout == "local\n", done.stderr


LATIN = """
import sys
import keymgmt
config = sys.argv[1]
keymgmt.seal("plain", "m.sealed", keys=config, name="m")
keymgmt.verify("m.sealed", keys=config)
with keymgmt.open("m.sealed", keys=config) as model:
    names = [entry.path for entry in model.manifest.files]
    assert names == ["poids-\\u00e9t\\u00e9.bin"], names
keymgmt.unseal("m.sealed", "again", keys=config)
"""


def test_a_file_system_encoding_other_than_utf_8(tmp_path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "plain").mkdir()
    name = "poids-\u00e9t\u00e9.bin"
    (tmp_path / "plain" / name).write_bytes(b"weights")
    there: dict[str, Any] = {"cwd": tmp_path, "env": environment, "text": False}
    assert run_keymgmt("init", "site", **there).returncode == 0
    done = run_python(LATIN, "site/keymgmt.toml", **there)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / name).read_bytes() == b"weights"
    assert (tmp_path / "m.sealed" / "payload" / f"{name}.floe").is_file()
