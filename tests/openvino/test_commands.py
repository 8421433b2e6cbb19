"""``keymgmt run`` and ``keymgmt demo`` as a person runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest


def keymgmt(*arguments: object, config: Path | None = None, **env: str):
    options = ["--config", config] if config else []
    return subprocess.run(
        [sys.executable, "-m", "keymgmt.cli", *map(str, [*options, *arguments])],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )


def test_demo_shows_it_all_and_leaves_nothing(tmp_path):
    done = keymgmt("demo", TMPDIR=str(tmp_path), HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for expected in (
        "manifest.json",
        "magika.bin.floe",
        "opens with file:models@1",
        "python 0.99",
        "elf 1.0000",
        "IntegrityError",
        "CannotUnlock",
        "UntrustedPublisher",
        "ConfigError",
    ):
        assert expected in shown
    assert shown.count("hint:") >= 5
    assert " NO " not in shown
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_run_with_random_inputs(magika_sealed, site):
    one, other = (keymgmt("run", magika_sealed, "--json", config=site.path) for _ in range(2))
    assert one.returncode == 0, one.stderr
    report = json.loads(one.stdout)
    assert report["model"] == "magika"
    assert report["inputs"] == {"bytes": {"type": "int32", "shape": [1, 2048], "from": "random"}}
    assert report["outputs"]["target_label"]["shape"] == [1, 214]
    assert report["seconds"].keys() == {"load", "first", "second"}
    # The same seed, so the same answer.
    assert json.loads(other.stdout)["outputs"] == report["outputs"]


@pytest.mark.parametrize("how", ["npy", "named npy", "npz"])
def test_run_with_files_answers_as_plaintext(how, magika_sealed, magika_ir, site, tmp_path):
    array = np.random.default_rng(1).integers(0, 256, (2, 2048), np.int32)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", bytes=array)
    given = {"npy": "x.npy", "named npy": "bytes={}/x.npy", "npz": "x.npz"}[how]
    given = given.format(tmp_path) if "{}" in given else str(tmp_path / given)
    output = tmp_path / "out.npz"
    done = keymgmt("run", magika_sealed, "--input", given, "--output", output, config=site.path)
    assert done.returncode == 0, done.stderr
    expected = ov.Core().compile_model(magika_ir, "CPU")(array)[0]
    assert np.load(output)["target_label"].tobytes() == expected.tobytes()
    row, column = np.unravel_index(expected.argmax(), expected.shape)
    assert f"{row},{column}: {expected.max():.6g}" in done.stdout
    assert "file" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "TPU"], 3, "no device 'TPU'"),
        (["--name", "resnet50"], 4, "resnet50"),
        (["--input", "nowhere.npy"], 3, "nowhere.npy"),
        (["--input", "text.npy"], 3, "text.npy"),
        (["--input", "nothing=good.npy"], 3, "no input 'nothing'"),
        (["--input", "good.npy", "--input", "good.npy"], 3, "given twice"),
        (["--input", "float.npy"], 3, "takes int32"),
        (["--input", "short.npy"], 3, "has the shape"),
    ],
)
def test_run_refuses(arguments, code, message, magika_sealed, site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.npy").write_text("not an array")
    np.save("good.npy", np.zeros((1, 2048), np.int32))
    np.save("float.npy", np.zeros((1, 2048), np.float32))
    np.save("short.npy", np.zeros((1, 7), np.int32))
    done = keymgmt("run", magika_sealed, *arguments, config=site.path)
    assert done.returncode == code, done.stderr
    assert "error: " in done.stderr
    assert message in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_pickled_inputs_are_not_unpickled(magika_sealed, site, tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    done = keymgmt("run", magika_sealed, "--input", tmp_path / "evil.npy", config=site.path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
