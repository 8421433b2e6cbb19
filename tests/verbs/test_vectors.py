"""Every vector, every way there is to open it: all must say the same."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run_python

import keymgmt
from keymgmt import Config, errors

VECTORS = Path(__file__).parent.parent / "vectors" / "sealed"
ML_DSA = 3000  # bytes; a signatures.json with a signature by Ed25519 has a tenth of it
NAMES = sorted(path.parent.name for path in VECTORS.glob("*/vector.txt"))


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
def model(request, tmp_path, lay_out) -> Path:
    """A copy of the vector, with what git cannot hold made in it."""
    lay_out(request.param, tmp_path / "model.sealed")
    return tmp_path / "model.sealed"


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
    done = run_python(RUNNER, input="\n".join(calls), check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(calls)
    for name, code, _, err in answers:
        expect = header(name)["expect"]
        # Nobody can tell a mechanism that was changed from one that the provider's key lacks.
        lacks = expect == "CannotUnlock" and "mechanism" in name
        refused = 6 if lacks else 4
        assert code == (0 if expect == "ok" else refused), (name, err)
        assert ("error:" in err) == (expect != "ok"), (name, err)
        assert "Traceback" not in err


def test_there_are_enough():
    failing = [name for name in NAMES if header(name)["expect"] != "ok"]
    assert len(NAMES) >= 60
    assert len(failing) >= 45


@pytest.mark.once
def test_the_generator_makes_them(tmp_path):
    """Whoever changes the format makes the vectors anew, and sees what else changed."""
    generator = VECTORS.parent / "generate.py"
    subprocess.run([sys.executable, generator, tmp_path / "made"], check=True, timeout=120)

    def files(root: Path) -> dict[str, bytes]:
        found = (file for file in root.rglob("*") if file.is_file())
        return {str(file.relative_to(root)): file.read_bytes() for file in found}

    made, here = files(tmp_path / "made"), files(VECTORS)
    assert made.keys() == here.keys()
    differ = {name for name in made if made[name] != here[name]}
    # Private keys tell when they were made. OpenSSL's randomness is not ours to choose.
    random = {"keys.json", "signatures.json"}
    assert {Path(name).name for name in differ if not name.startswith("site/")} <= random
    texts = [here[name].decode() for name in differ if not name.startswith("site/")]
    assert all("hpke-" in text or len(text) > ML_DSA for text in texts)
