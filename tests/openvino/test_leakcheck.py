"""``keymgmt leakcheck`` passes where nothing leaks, and finds the leaks that there are."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from keymgmt_openvino import leakcheck as module
from keymgmt_openvino._canary import Canary
from keymgmt_openvino._watch import Watch

PLAIN = """
import sys
sys.modules["openvino_telemetry"] = None
import openvino as ov, numpy as np
options = {"CACHE_DIR": sys.argv[2]} if len(sys.argv) > 2 else {}
ov.Core().compile_model(sys.argv[1], "CPU", options)(np.ones((1, 1024), np.float32))
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs it with folders of its own, so that it does not search the whole machine's."""
    home = tmp_path / "home"
    for folder in (home, tmp_path / "tmp", tmp_path / "cwd"):
        folder.mkdir()

    def run(*arguments: object, path: str | None = None):
        program = (
            "import sys; from pathlib import Path; from keymgmt_openvino import leakcheck;"
            "leakcheck._SHARED = (); sys.argv[0] = 'keymgmt'; from keymgmt.cli import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=tmp_path / "cwd",
            env={
                **os.environ,
                "HOME": str(home),
                "TMPDIR": str(tmp_path / "tmp"),
                "PATH": path or os.environ["PATH"],
            },
        )
        assert list((tmp_path / "tmp").iterdir()) == []
        return done

    return run


def test_the_loader_passes_with_throw_away_keys(check, require_tool):
    require_tool("strace", package="strace")
    done = check("leakcheck", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert report["leak"] is False
    states = {finding["check"]: finding["state"] for finding in report["findings"]}
    assert states["files that it wrote or held open"] == "ok"
    assert states["temporary and cache folders"] == "ok"
    assert {"core dumps", "swap", "locked memory"} <= states.keys()


def test_the_loader_passes_with_the_operators_keys(check, site):
    done = check("--config", site.path, "leakcheck")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "sealed for local:models" in done.stdout
    assert "verdict: no leak found" in done.stdout


@pytest.mark.parametrize("traced", [True, False], ids=["strace", "no strace"])
def test_plain_openvino_with_a_cache_is_caught(traced, check, tmp_path, require_tool):
    require_tool("strace", package="strace")
    command = [sys.executable, "-c", PLAIN, "{plain}"]
    path = None if traced else str(Path(sys.executable).parent)
    done = check("leakcheck", "--json", "--", *command, path=path)
    assert done.returncode == 0, done.stderr + done.stdout
    done = check("leakcheck", "--json", "--", *command, "model-cache", path=path)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    (leak,) = [finding for finding in report["findings"] if finding["state"] == "leak"]
    assert "the weights in" in leak["seen"]
    assert "model-cache" in leak["seen"]
    assert leak["fix"]
    incomplete = [finding for finding in report["findings"] if "strace" in finding["seen"]]
    assert bool(incomplete) != traced


def test_a_file_that_was_removed_again_is_told(check, require_tool):
    require_tool("strace", package="strace")
    program = "import os; open('gone', 'w').write('x'); os.unlink('gone')"
    done = check("leakcheck", "--", sys.executable, "-c", program)
    assert done.returncode == 0
    assert "gone" in done.stdout
    assert "to tighten" in done.stdout


def test_a_deleted_file_that_is_still_open_is_searched(check):
    program = """
import os, shutil, sys, time
with open("hidden", "wb") as file:
    os.unlink("hidden")
    shutil.copyfileobj(open(sys.argv[1].replace(".xml", ".bin"), "rb"), file)
    file.flush()
    time.sleep(3)
"""
    done = check("leakcheck", "--", sys.executable, "-c", program, "{plain}")
    assert done.returncode == 1
    assert "hidden (deleted)" in done.stdout


def test_a_program_that_fails_is_no_pass(check):
    done = check("leakcheck", "--", sys.executable, "-c", "raise SystemExit(9)")
    assert done.returncode == 1
    assert "status 9" in done.stderr
    assert "verdict" not in done.stdout


def test_each_form_of_the_canary_is_found_across_pieces(tmp_path):
    canary = Canary()
    canary.save(tmp_path / "canary.xml")
    assert canary.search(io.FileIO(tmp_path / "canary.bin")) == "the weights"
    assert canary.search(io.FileIO(tmp_path / "canary.xml")) == "the graph"
    for what, needle in canary.needles.items():
        padding = (16 << 20) - len(needle) // 2
        assert canary.search(io.BytesIO(bytes(padding) + needle + bytes(10))) == what
    assert canary.search(io.BytesIO(np.random.default_rng(0).bytes(1 << 20))) is None


def test_what_cannot_be_read_is_not_called_clean(tmp_path):
    watch = Watch(Canary().search, tmp_path)
    watch.search_file(tmp_path / "nothing")
    assert watch.unseen == {str(tmp_path / "nothing")}
    assert not watch.written


def test_core_dumps_and_swap_are_looked_at():
    assert module._core_dumps().state in ("ok", "warn")
    assert module._swap().state in ("ok", "warn")
