"""``keymgmt leakcheck`` passes where nothing leaks, and finds the leaks that there are."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from keymgmt_openvino_demo import leakcheck as module
from keymgmt_openvino_demo._canary import Canary
from keymgmt_openvino_demo._watch import Watch, search_folders
from programs import run_python

PLAIN = """
import sys
sys.modules["openvino_telemetry"] = None
import openvino as ov, numpy as np
options = {"CACHE_DIR": sys.argv[2]} if len(sys.argv) > 2 else {}
ov.Core().compile_model(sys.argv[1], "CPU", options)(np.ones((1, 1024), np.float32))
"""


PROGRAM = (
    "import sys; from pathlib import Path; from keymgmt_openvino_demo import leakcheck;"
    "leakcheck._SHARED = (); sys.argv[0] = 'keymgmt'; from keymgmt.cli import main; main()"
)


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs it with folders of its own, so that it does not search the whole machine's."""
    home = tmp_path / "home"
    for folder in (home, tmp_path / "tmp", tmp_path / "cwd"):
        folder.mkdir()

    def run(*arguments: object, path: str | None = None, program: str = PROGRAM):
        done = run_python(
            program,
            *arguments,
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


def test_the_loader_passes_with_throw_away_keys(check, require_tool, check_schema, check_formats):
    check_formats("keymgmt_openvino_demo")
    require_tool("strace", package="strace")
    done = check("leakcheck", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    assert check_schema(report) == "keymgmt-leakcheck/1"
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
def test_plain_openvino_with_a_cache_is_caught(traced, check, tmp_path, require_tool, check_schema):
    require_tool("strace", package="strace")
    command = [sys.executable, "-c", PLAIN, "{plain}"]
    path = None if traced else str(Path(sys.executable).parent)
    done = check("leakcheck", "--json", "--", *command, path=path)
    assert done.returncode == 0, done.stderr + done.stdout
    done = check("leakcheck", "--json", "--", *command, "model-cache", path=path)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    check_schema(report)
    (leak,) = [finding for finding in report["findings"] if finding["state"] == "leak"]
    assert "the weights in" in leak["seen"]
    assert "model-cache" in leak["seen"]
    assert leak["fix"]
    incomplete = [finding for finding in report["findings"] if "strace" in finding["seen"]]
    assert bool(incomplete) != traced


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_a_file_that_was_removed_again_is_told(seconds, check, require_tool):
    """Also where it was looked at while it was open: more may have been written then."""
    require_tool("strace", package="strace")
    program = (
        "import os, time; file = open('gone', 'w'); file.write('x'); file.flush(); "
        f"time.sleep({seconds}); file.write('y'); file.flush(); os.unlink('gone')"
    )
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
    assert canary.search(io.FileIO(tmp_path / "canary.bin"), 1 << 30) == "the weights"
    assert canary.search(io.FileIO(tmp_path / "canary.xml"), 1 << 30) == "the graph"
    for what, needle in canary.needles.items():
        padding = (16 << 20) - len(needle) // 2
        assert canary.search(io.BytesIO(bytes(padding) + needle + bytes(10)), 1 << 30) == what
    assert canary.search(io.BytesIO(np.random.default_rng(0).bytes(1 << 20)), 1 << 20) is None


def test_what_cannot_be_read_is_not_called_clean(tmp_path):
    watch = Watch(Canary().search, tmp_path)
    watch.search_file(tmp_path / "nothing")
    assert watch.unseen == {str(tmp_path / "nothing")}
    (tmp_path / "file").touch()
    watch.search_file(tmp_path / "file" / "below")
    assert [each.partition(": ")[0] for each in watch.unknown] == [str(tmp_path / "file" / "below")]
    assert not watch.written


def test_what_has_no_end_is_not_searched_for_ever(tmp_path):
    canary = Canary()
    watch = Watch(canary.search, tmp_path)
    os.mkfifo(tmp_path / "fifo")
    watch.search_file(tmp_path / "fifo")  # nobody writes to it, and it does not wait
    with Path("/dev/zero").open("rb", 0) as endless:
        assert canary.search(endless, 40 << 20) is None
    assert not watch.leaks


def test_other_file_systems_are_not_entered(tmp_path):
    watch = Watch(Canary().search, tmp_path)
    search_folders(watch, [Path("/dev")], time.time() + 3600, lambda count: None)
    assert "/dev/shm" in watch.mounts


HARDENED = """
import os, shutil, sys, time
import keymgmt
keymgmt.harden()
with open("hidden", "wb") as file:
    os.unlink("hidden")
    shutil.copyfileobj(open(sys.argv[1].replace(".xml", ".bin"), "rb"), file)
    file.flush()
    time.sleep(3)
"""


def test_a_program_that_hardens_itself_is_watched_untraced(check, require_tool):
    require_tool("strace", package="strace")
    command = ["--", sys.executable, "-c", HARDENED, "{plain}"]
    done = check("leakcheck", *command)
    assert done.returncode == 1
    assert "--no-strace" in done.stderr
    assert "verdict" not in done.stdout
    done = check("leakcheck", "--no-strace", *command)
    assert done.returncode == 1
    # Root may look; anybody else is told that nobody did.
    said = "hidden (deleted)" if os.geteuid() == 0 else "verdict: not known"
    assert said in done.stdout


def test_what_nobody_could_look_at_is_not_no_leak(check):
    """As another user than root sees a hardened program."""
    program = (
        "import sys; from keymgmt_openvino_demo import _watch, leakcheck\n"
        "def refuse(self, process): raise PermissionError\n"
        "leakcheck._SHARED, _watch.Watch._look_at = (), refuse\n"
        "sys.argv[0] = 'keymgmt'; from keymgmt.cli import main; main()"
    )
    done = check("leakcheck", "--json", program=program)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"].startswith("not known")
    assert not report["complete"]
    assert not report["leak"]


def test_core_dumps_and_swap_are_looked_at():
    assert module._core_dumps().state in ("ok", "warn")
    assert module._swap().state in ("ok", "warn")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look into a program of keymgmt exec")
@pytest.mark.parametrize("writes", [False, True])
def test_a_program_of_exec(check, require_tool, tmp_path, writes):
    """Its files are in nobody's tree; what it writes to a disk is found."""
    require_tool("strace", package="strace")
    out = tmp_path / "home" / "copy" if writes else "/dev/null"
    script = f"cat {{sealed}}/* > {out}; sleep 0.5"
    run = [sys.executable, "-m", "keymgmt.cli", "exec", "{sealed}", "--shared-tmp", "--at"]
    (tmp_path / "at").mkdir()
    options = ["--json", "--look", tmp_path / "home"]
    done = check("leakcheck", *options, "--", *run, tmp_path / "at", "--", "sh", "-c", script)
    report = json.loads(done.stdout)
    assert report["leak"] is writes, (done.stdout, done.stderr)
    assert done.returncode == int(writes), (done.stdout, done.stderr)


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # it searches all of /tmp five times, and others write there too
def test_a_leakcheck_that_is_stopped_prints_no_traceback(tmp_path, ends_quietly):
    ends_quietly("leakcheck", "--json", cwd=tmp_path)
