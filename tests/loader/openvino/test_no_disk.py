"""What a GenAI pipeline leaves on disks and opens there: each search with a control that finds."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import keymgmt_openvino  # noqa: F401 - before OpenVINO: no telemetry
import numpy as np
import pytest
from programs import run

HERE = Path(__file__).parent
WHISPER = HERE / "models" / "whisper"
PATTERN = 64  # bytes

# Prints which of its own open files hold the canary, once it is in use, and waits there.
CHILD = """
import os, shutil, stat, sys, tempfile
from keymgmt_openvino.genai import load_path_pipeline
import openvino_genai
how, plain, sealed, config, canary = sys.argv[1:]
if how == "mounted":
    pipeline = load_path_pipeline(openvino_genai.WhisperPipeline, sealed, keys=config)
else:
    copy = shutil.copytree(plain, tempfile.mkdtemp() + "/copy")
    pipeline = openvino_genai.WhisperPipeline(copy, "CPU")
pipeline.generate([0.0] * 16000, max_new_tokens=4)
held = []
for name in os.listdir("/proc/self/fd"):
    try:
        file = os.readlink(f"/proc/self/fd/{name}")
        if file.startswith("/memfd:") or not stat.S_ISREG(os.stat(int(name)).st_mode):
            continue
    except OSError:
        continue
    with open(f"/proc/self/fd/{name}", "rb") as opened:
        if bytes.fromhex(canary) in opened.read():
            held.append(file)
print("held", *held, flush=True)
sys.stdin.readline()
del pipeline
"""


@pytest.fixture(scope="module")
def canary(tmp_path_factory, seal) -> tuple[Path, Path, bytes]:
    """The Whisper model with a pattern of this run in its weights: plain, sealed, the pattern."""
    plain = Path(shutil.copytree(WHISPER, tmp_path_factory.mktemp("canary") / "whisper"))
    weights = plain / "openvino_encoder_model.bin"
    content = bytearray(weights.read_bytes())
    pattern = np.random.default_rng().standard_normal(PATTERN // 4).astype(np.float32).tobytes()
    content[100_000 : 100_000 + PATTERN] = pattern
    weights.write_bytes(content)
    return plain, seal(plain, "canary"), pattern


def files_with(pattern: bytes, folders: list[Path], since: float) -> list[Path]:
    """Files that changed since, and hold the pattern."""
    found = []
    for folder in folders:
        # Unlike Path.rglob, os.walk goes on where another test removed a folder meanwhile.
        names = ((parent, name) for parent, _, files in os.walk(folder) for name in files)
        for path in (Path(parent) / name for parent, name in names):
            try:
                # Links into /proc are the mount's, and lead to no disk.
                info = path.lstat()
                # Larger ones are other tests', of holes: this model is of a few hundred KiB.
                file = stat.S_ISREG(info.st_mode) and info.st_size < 1 << 30
                if file and info.st_ctime >= since and pattern in path.read_bytes():
                    found.append(path)
            except OSError:  # another program's, and gone
                continue
    return found


@pytest.mark.once
@pytest.mark.parametrize(("how", "found"), [("mounted", False), ("copied", True)])
def test_a_mounted_pipeline_leaves_nothing_of_its_weights(how, found, canary, site, tmp_path):
    plain, sealed, pattern = canary
    home, temp, here = (tmp_path / name for name in ("home", "temp", "here"))
    for folder in (home, temp, here):
        folder.mkdir()
    places = [home, temp, here, *map(Path, ("/dev/shm", "/tmp", "/var/tmp"))]
    time.sleep(0.05)  # the plain model's files are older than this, by the kernel's coarse clock
    since = time.time()
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, how, plain, sealed, site.path, pattern.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=here,
        env={**os.environ, "HOME": str(home), "TMPDIR": str(temp), "XDG_CACHE_HOME": str(home)},
    ) as process:
        said = process.stdout.readline().split()
        in_use = files_with(pattern, places, since)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(60) == 0
    assert said[0] == "held"
    assert bool(said[1:]) == found
    assert bool(in_use) == found
    assert bool(files_with(pattern, places, since)) == found


OPENER = """
import sys
import keymgmt, keymgmt._mount.mount
from keymgmt_openvino import genai
how, sealed, config = sys.argv[1:]
keymgmt.harden = keymgmt._mount.mount.harden = lambda: None  # a traced process would be refused
history = [{"role": "user", "content": "hi"}]
try:
    with getattr(genai, how)(sealed, keys=config) as pipeline:
        print(pipeline.get_tokenizer().apply_chat_template(history, True))
except (keymgmt.errors.KeymgmtError, RuntimeError) as error:
    print(error)
"""


@pytest.mark.once
@pytest.mark.parametrize("how", ["load_llm", "load_vlm"])
def test_no_file_that_a_template_or_config_names_is_opened(how, seal, site, tmp_path, require_tool):
    strace = require_tool("strace", package="strace")
    secret = tmp_path / "outside.txt"
    secret.write_text("not for models")
    folder = tmp_path / "model"
    shutil.copytree(HERE / ("tiny-llm" if how == "load_llm" else "models/llava"), folder)
    (folder / "chat_template.jinja").write_text(
        f"{{% import '{secret}' as x %}}{{% include '{secret}' %}}{{% extends '../outside.txt' %}}"
    )
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text())
        for member in ("_name_or_path", "tokenizer_file", "vocab_file", "chat_template_file"):
            content[member] = str(secret)
        content["auto_map"] = {"AutoConfig": f"{secret}--x.y"}
        file.write_text(json.dumps(content))
    sealed = seal(folder, "hostile")
    trace = tmp_path / "trace"
    done = run(
        *(strace, "-f", "-qq", "-o", trace, "-e", "trace=open,openat,openat2"),
        *(sys.executable, "-c", OPENER, how, sealed, site.path),
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    opened = trace.read_text()
    assert "outside" not in opened
    assert "not for models" not in done.stdout
    # It was looked at, and down to what GenAI itself opens.
    assert "manifest.json" in opened
    assert "libopenvino_tokenizers" in opened
    assert ("preprocessor_config.json" in opened) == (how == "load_vlm")
