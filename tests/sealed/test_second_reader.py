"""Every vector, by the reader in examples that was written from SPEC.md and has none of ours."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
VECTORS = TREE / "tests" / "vectors" / "sealed"
SITE = VECTORS / "site"
NAMES = sorted(path.parent.name for path in VECTORS.glob("*/vector.txt"))
# It has no HPKE, so that for it their recipients are another's.
HPKE_ONLY = ["hpke_recipients"]


def load():
    spec = importlib.util.spec_from_file_location("read_sealed", TREE / "examples/read_sealed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reader = load()
KINDS = {
    "FormatError": reader.FORMAT,
    "IntegrityError": reader.DAMAGED,
    "UntrustedPublisher": reader.UNSIGNED,
    "CannotUnlock": reader.LOCKED,
}


def hex_kek(name):
    (jwk,) = json.loads((SITE / "keys" / f"{name}.jwks").read_text())["keys"]
    return f"{name}@{jwk['kid']}={base64.urlsafe_b64decode(jwk['k'] + '=').hex()}"


PEMS = [str(SITE / name) for name in ("publisher.pem", "pq.pem")]
KEKS = [hex_kek(name) for name in "abc"]


def fields(name):
    lines = (VECTORS / name / "vector.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


def make(path, what, name, size="0"):
    target = path / name
    if what == "mkdir":
        target.mkdir()
        return
    kept = target.rename(path.parent / "kept")
    if what in ("link", "zero"):
        target.symlink_to(kept if what == "link" else "/dev/zero")
    elif what == "fifo":
        os.mkfifo(target)
    elif what == "folder":
        target.mkdir()
    elif what == "socket":
        # By a name of its own: a socket's path has at most 107 bytes.
        with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
            patch.chdir(target.parent)
            server.bind(target.name)
    elif what == "large":
        with target.open("wb") as file:
            file.truncate(int(size))


@pytest.fixture
def model(request, tmp_path):
    path = tmp_path / "model.sealed"
    path.mkdir()
    shutil.copytree(VECTORS / request.param / "model.sealed", path, dirs_exist_ok=True)
    if what := fields(request.param).get("make"):
        make(path, *what.split())
    return path


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["read_sealed.py", *map(str, args)])
    reader.main()


@pytest.mark.parametrize("model", NAMES, indirect=True)
def test_opens_or_refuses(request, model, tmp_path, monkeypatch):
    name = request.node.callspec.params["model"]
    expect = "CannotUnlock" if name in HPKE_ONLY else fields(name)["expect"]
    out = tmp_path / "out"
    args = [model, out, "--kek", *KEKS, "--publisher", *PEMS]
    if expect == "ok":
        run(monkeypatch, *args)
        files = json.loads((model / "manifest.json").read_bytes())["files"]
        written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
        assert {(out / file["path"]).stat().st_size == file["size"] for file in files} == {True}
        assert written == {file["path"] for file in files}
        return
    with pytest.raises(SystemExit, match=f"^refused: {KINDS[expect]}"):
        run(monkeypatch, *args)
    assert not out.exists()


def test_every_share_is_needed_and_a_signature_only_where_it_is_asked_for(tmp_path, monkeypatch):
    for number, keks in enumerate((KEKS, KEKS[:1], KEKS[:2])):
        args = [VECTORS / "group_of_three/model.sealed", tmp_path / str(number), "--kek", *keks]
        if keks == KEKS:
            run(monkeypatch, *args)
            continue
        with pytest.raises(SystemExit, match=reader.LOCKED):
            run(monkeypatch, *args)
    unsigned = VECTORS / "signatures_stripped/model.sealed"
    run(monkeypatch, unsigned, tmp_path / "unsigned", "--kek", *KEKS)


def test_an_old_folder_is_not_written_into(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match=r"^refused: not a new folder"):
        run(monkeypatch, VECTORS / "plain_model/model.sealed", tmp_path / "out", "--kek", *KEKS)
    assert not list((tmp_path / "out").iterdir())
