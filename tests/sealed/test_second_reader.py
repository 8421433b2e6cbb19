"""Every vector, by the reader in examples that was written from SPEC.md and has none of ours."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path

import pytest
from scripts import load_script

TREE = Path(__file__).parents[2]
VECTORS = TREE / "tests" / "vectors" / "sealed"
SITE = VECTORS / "site"
NAMES = sorted(path.parent.name for path in VECTORS.glob("*/vector.txt"))


reader = load_script(TREE / "examples/read_sealed.py")
KINDS = {
    "RollbackError": reader.OLD,
    "FormatError": reader.FORMAT,
    "IntegrityError": reader.DAMAGED,
    "UntrustedPublisher": reader.UNSIGNED,
    "CannotUnlock": reader.LOCKED,
    "ModelExpired": reader.EXPIRED,
}


def hex_kek(name):
    (jwk,) = json.loads((SITE / "keys" / f"{name}.jwks").read_text())["keys"]
    secret = next(jwk[member] for member in ("k", "d", "priv") if member in jwk)
    return f"{name}@{jwk['kid']}={base64.urlsafe_b64decode(secret + '==').hex()}"


PEMS = [str(SITE / name) for name in ("publisher.pem", "pq.pem", "pq5.pem")]
HPKE = ("p256", "p384", "x25519", "hybrid", "mlkem")
KEKS = [hex_kek(name) for name in (*"abc", *HPKE)]


def fields(name):
    lines = (VECTORS / name / "vector.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


@pytest.fixture
def model(request, tmp_path, lay_out):
    lay_out(request.param, tmp_path / "model.sealed")
    return tmp_path / "model.sealed"


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["read_sealed.py", *map(str, args)])
    reader.main()


@pytest.mark.parametrize("model", NAMES, indirect=True)
def test_opens_or_refuses(request, model, tmp_path, monkeypatch):
    name = request.node.callspec.params["model"]
    expect = fields(name)["expect"]
    out = tmp_path / "out"
    args = [model, out, "--key", *KEKS, "--publisher", *PEMS]
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
        args = [VECTORS / "group_of_three/model.sealed", tmp_path / str(number), "--key", *keks]
        if keks == KEKS:
            run(monkeypatch, *args)
            continue
        with pytest.raises(SystemExit, match=reader.LOCKED):
            run(monkeypatch, *args)
    unsigned = VECTORS / "signatures_stripped/model.sealed"
    run(monkeypatch, unsigned, tmp_path / "unsigned", "--key", *KEKS)


def test_an_old_folder_is_not_written_into(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match=r"^refused: not a new folder"):
        run(monkeypatch, VECTORS / "plain_model/model.sealed", tmp_path / "out", "--key", *KEKS)
    assert not list((tmp_path / "out").iterdir())


# --- every requirement is isolated by a vector ---------------------------------------------------

NUMBERS = sorted(
    set(re.findall(r'"(M\d+)"', Path(reader.__file__).read_text())), key=lambda n: int(n[1:])
)
SECRETS = {f"file:{name}": bytes.fromhex(key) for name, key in (kek.split("=") for kek in KEKS)}
TRUSTED = [reader.load_pem_public_key(Path(pem).read_bytes()) for pem in PEMS]
# What is refused for a demand of the reader, and not for anything in the folder.
DEMANDS = {
    "another name": ({"name": "other"}, "UntrustedPublisher"),
    "a newer release": ({"release": 2}, "RollbackError"),
    "two signatures": ({"signatures": 2}, "UntrustedPublisher"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, lay_out):
    """Every vector, laid out once."""
    root = tmp_path_factory.mktemp("vectors")
    found = {}
    for name in NAMES:
        (root / name).mkdir()
        found[name] = root / name / "m", lay_out(name, root / name / "m")["expect"], {}
    for name, (demand, expect) in DEMANDS.items():
        found[name] = root / "plain_model" / "m", expect, demand
    return found


def says(folder, demand):
    """What the reader says of a folder: the class of the error, or ok."""
    want = reader.Want(**demand)
    try:
        reader.open_model(folder, SECRETS, TRUSTED, want)
    except SystemExit as error:
        return next(kind for kind, text in KINDS.items() if f"refused: {text}" in str(error.code))
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError):
        return "FormatError"
    return "ok"


def test_the_reader_has_every_requirement_of_the_spec():
    spec = (TREE / "keymgmt/sealed/SPEC.md").read_text()
    defined = re.findall(r"\[(M\d+)\]", spec)
    assert defined == [f"M{number + 1}" for number in range(len(defined))]
    assert defined == NUMBERS


def test_the_reader_says_what_each_vector_expects(folders):
    found = {name: says(folder, demand) for name, (folder, _, demand) in folders.items()}
    assert found == {name: expect for name, (_, expect, _) in folders.items()}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_vector_notices_that_a_requirement_is_not_checked(monkeypatch, folders, number):
    must, holds = reader.must, reader.holds
    monkeypatch.setattr(reader, "must", lambda n, good, *rest: n == number or must(n, good, *rest))
    monkeypatch.setattr(reader, "holds", lambda n, good: n == number or holds(n, good))
    assert any(
        says(folder, demand) != expect
        for folder, expect, demand in folders.values()
        if expect != "ok"
    )


def test_section_13_is_what_the_reader_computes(tmp_path, monkeypatch, capsys):
    spec = (TREE / "keymgmt/sealed/SPEC.md").read_text()
    model = VECTORS / "worked_example/model.sealed"
    args = ["--key", *KEKS[:2], "--publisher", PEMS[0], "--values"]
    run(monkeypatch, model, tmp_path / "out", *args)
    listed = re.findall(r"^\w+ = [0-9a-f]*$", spec, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == listed
    files = re.findall(r"^`([\w.]+\.json)`, one line.*?```json\n(.*?)\n```", spec, re.M | re.S)
    assert len(files) == 3
    for name, text in files:
        assert (model / name).read_text() == text
