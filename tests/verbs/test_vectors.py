"""Every vector, every way there is to open it: all must say the same."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import keymgmt
from keymgmt import Config, errors

VECTORS = Path(__file__).parent.parent / "vectors" / "sealed"
NAMES = sorted(path.parent.name for path in VECTORS.glob("*/vector.txt"))
EXIT = {"ok": 0, "FormatError": 4, "IntegrityError": 4, "UntrustedPublisher": 4, "CannotUnlock": 4}


def header(name: str) -> dict[str, str]:
    lines = (VECTORS / name / "vector.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Path:
    """The vectors' site; git keeps no private modes, so they are set here."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(VECTORS / "site", root, dirs_exist_ok=True)
    (root / "keys").chmod(0o700)
    for file in (root / "keys").iterdir():
        file.chmod(0o600)
    (root / "keymgmt.toml").chmod(0o644)
    return root / "keymgmt.toml"


@pytest.fixture(scope="session")
def config(config_file) -> Config:
    return keymgmt.load_config(config_file)


@pytest.fixture
def model(request, tmp_path) -> Path:
    """A copy of the vector, with what git cannot hold made in it."""
    source = VECTORS / request.param / "model.sealed"
    path = tmp_path / "model.sealed"
    shutil.copytree(source, path) if source.exists() else path.mkdir()
    (path / "payload").mkdir(exist_ok=True)
    make, _, rest = header(request.param).get("make", "").partition(" ")
    if make:
        _make(path, make, *rest.split())
    return path


def _make(path: Path, what: str, name: str, size: str = "0") -> None:
    target = path / name
    if what == "mkdir":
        target.mkdir()
        return
    kept = target.rename(path.parent / "kept")
    if what == "link":
        target.symlink_to(kept)
    elif what == "fifo":
        os.mkfifo(target)
    elif what == "folder":
        target.mkdir()
    elif what == "zero":
        target.symlink_to("/dev/zero")
    elif what == "socket":
        # A path of a socket has at most 107 bytes.
        here = Path.cwd()
        os.chdir(target.parent)
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(target.name)
        finally:
            os.chdir(here)
    elif what == "large":
        with target.open("wb") as file:
            file.truncate(int(size))


def whole(path: Path, config: Config) -> None:
    with keymgmt.open(path, keys=config) as opened:
        for entry in opened.manifest.files:
            opened.read(entry.path)


def random_access(path: Path, config: Config) -> None:
    """From the end to the start, in odd pieces."""
    with keymgmt.open(path, keys=config) as opened:
        for entry in opened.manifest.files:
            with opened.open(entry.path) as file:
                expected = opened.read(entry.path)
                for start in range(max(entry.size - 1, 0), -1, -1999):
                    file.seek(start)
                    assert file.read(777) == expected[start : start + 777]


def verified(path: Path, config: Config) -> None:
    keymgmt.verify(path, keys=config)


def unsealed(path: Path, config: Config) -> None:
    out = path.parent / "out"
    try:
        keymgmt.unseal(path, out, keys=config)
    except errors.KeymgmtError:
        assert not out.exists()
        raise
    with keymgmt.open(path, keys=config) as opened:
        for entry in opened.manifest.files:
            assert (out / entry.path).read_bytes() == opened.read(entry.path)


def signature_only(path: Path, config: Config) -> None:
    keymgmt.verify(path, keys=config, signature_only=True)


def check(expect: str, way, path: Path, config: Config) -> None:
    if expect == "ok":
        way(path, config)
        return
    with pytest.raises(getattr(errors, expect)) as caught:
        way(path, config)
    assert type(caught.value).__name__ == expect
    assert str(caught.value)


WAYS = {way.__name__: way for way in (whole, random_access, verified, unsealed)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", NAMES, indirect=True)
def test_library(request, model, config, way):
    name = request.node.callspec.params["model"]
    check(header(name)["expect"], WAYS[way], model, config)


@pytest.mark.parametrize("model", NAMES, indirect=True)
def test_signature_only(request, model, config):
    fields = header(request.node.callspec.params["model"])
    check(fields.get("signature-only", fields["expect"]), signature_only, model, config)


@pytest.mark.parametrize("model", NAMES, indirect=True)
def test_inspect_never_raises_anything_else(model):
    with contextlib.suppress(errors.SealedModelError):
        assert keymgmt.inspect(model).manifest.name


RUNNER = """
import json, sys, io, contextlib
from keymgmt.cli import main
for line in sys.stdin:
    name, *arguments = json.loads(line)
    sys.argv = ["keymgmt", *arguments]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([name, code, out.getvalue(), err.getvalue()]), flush=True)
"""


def test_command_line(tmp_path, config_file):
    """`verify` of every vector in one process: the exit code says whose fault it is."""
    calls = []
    for name in NAMES:
        if "make" in header(name):
            continue
        path = VECTORS / name / "model.sealed"
        calls.append(json.dumps([name, "--config", str(config_file), "verify", str(path)]))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input="\n".join(calls),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(calls)
    for name, code, _, err in answers:
        expect = header(name)["expect"]
        assert code == EXIT[expect], (name, err)
        assert ("error:" in err) == (expect != "ok"), (name, err)
        assert "Traceback" not in err


def test_there_are_enough():
    failing = [name for name in NAMES if header(name)["expect"] != "ok"]
    assert len(NAMES) >= 60
    assert len(failing) >= 45
