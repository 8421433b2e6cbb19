"""OpenVINO's plaintext cache is refused in every spelling, device and verb, and leaves no file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.properties.device as device_properties
import pytest
from keymgmt_openvino import _no_disk, load, read
from keymgmt_openvino.genai import load_draft_model, load_llm
from openvino import opset13 as op
from programs import run

from keymgmt.errors import ConfigError

HERE = Path(__file__).parent
DEVICES = ["CPU", "AUTO", "MULTI:CPU", "HETERO:CPU", "BATCH:CPU"]
SPELLINGS = {
    "top": lambda d: {"CACHE_DIR": d},
    "lower case": lambda d: {"cache_dir": d},
    "helper": lambda d: dict([device_properties.properties({"CPU": {"CACHE_DIR": d}})]),
    "nested": lambda d: {"DEVICE_PROPERTIES": {"CPU": {"CACHE_DIR": d}}},
    "text": lambda d: {"DEVICE_PROPERTIES": f"{{CPU:{{CACHE_DIR:{d}}}}}"},
    "of one device": lambda d: {"DEVICE_PROPERTIES_CPU": {"CACHE_DIR": d}},
    "of one device, text": lambda d: {"DEVICE_PROPERTIES_CPU": f"{{CACHE_DIR:{d}}}"},
    "OVAny": lambda d: {"DEVICE_PROPERTIES": ov.OVAny({"CPU": {"CACHE_DIR": d}})},
    "OVAny nested twice": lambda d: {
        "DEVICE_PROPERTIES": ov.OVAny({"CPU": ov.OVAny({"CACHE_DIR": ov.OVAny(d)})})
    },
    "OVAny of one device": lambda d: {"DEVICE_PROPERTIES_CPU": ov.OVAny({"CACHE_DIR": d})},
    "with a mode": lambda d: {"CACHE_DIR": d, "CACHE_MODE": "OPTIMIZE_SIZE"},
}


@pytest.fixture(scope="module")
def canary(tmp_path_factory, seal) -> tuple[Path, Path, bytes]:
    """A plaintext model, its sealed copy, and bytes of its weights."""
    weights = np.random.default_rng().standard_normal((64, 64)).astype(np.float32)
    x = op.parameter([1, 64], np.float32, name="x")
    node = op.matmul(x, op.constant(weights), transpose_a=False, transpose_b=True)
    plain = tmp_path_factory.mktemp("canary") / "canary.xml"
    ov.save_model(ov.Model([op.result(node)], [x], "canary"), plain, compress_to_fp16=False)
    return plain, seal(plain, "canary"), weights.tobytes()[:64]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_where_openvino_would_write_it_is_refused_whatever_it_is_called(
    device, spelling, canary, site, tmp_path, monkeypatch
):
    """Without any rule that names an option, as if each spelling were one that nobody knows."""
    plain, sealed, weights = canary
    monkeypatch.setattr(_no_disk, "_WRITING", re.compile("(?!)"))
    of_plain, ours = tmp_path / "plain", tmp_path / "ours"
    with contextlib.suppress(RuntimeError):  # it knows no such spelling there
        ov.Core().compile_model(plain, device, SPELLINGS[spelling](str(of_plain)))
    written = files(of_plain)
    assert (spelling, device) != ("top", "CPU") or weights in written[0].read_bytes()
    with pytest.raises(ConfigError) if written else contextlib.suppress(ConfigError):
        load(sealed, device, SPELLINGS[spelling](str(ours)), keys=site).close()
    # What the look itself left, a model of one node, is all that there may be.
    assert not any(weights in path.read_bytes() for path in files(ours))


EVERYTHING = """
import json, sys
import keymgmt_openvino  # before OpenVINO: no telemetry
from pathlib import Path
here = Path(sys.argv[1])
sys.path[:0] = map(str, (here.parent, here.parents[2] / "shared"))
from test_no_cache import DEVICES, SPELLINGS
from keymgmt_openvino import load
from keymgmt_openvino.genai import load_draft_model, load_llm
from keymgmt.errors import ConfigError
verb, sealed, keys, folder = sys.argv[2:]
for spelling, options in SPELLINGS.items():
    for device in DEVICES:
        try:
            if verb == "load":
                load(sealed, device, options(folder), keys=keys).close()
            else:
                verbs = {"load_llm": load_llm, "load_draft_model": load_draft_model}
                verbs[verb](sealed, device, keys=keys, **options(folder))
            print(json.dumps([spelling, device, "loaded"]))
        except ConfigError as error:
            print(json.dumps([spelling, device, str(error)]))
"""


@pytest.mark.once
@pytest.mark.parametrize("verb", ["load", "load_llm", "load_draft_model"])
def test_no_file_is_made_anywhere(verb, canary, seal, site, tmp_path, require_tool):
    strace = require_tool("strace", package="strace")
    sealed = canary[1] if verb == "load" else seal(HERE / "tiny-llm", "tiny-llm")
    trace, folder = tmp_path / "trace", tmp_path / "cache"
    done = run(
        *(strace, "-f", "-qq", "-o", trace, "-e", "trace=open,openat,openat2,creat,mkdir"),
        *(sys.executable, "-B", "-c", EVERYTHING),
        *(__file__, verb, sealed, site.path, folder),
        timeout=280,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(SPELLINGS) * len(DEVICES)
    assert all("is refused for a sealed model" in answer[2] for answer in answers), answers
    writing = [
        line
        for line in trace.read_text().splitlines()
        if re.search(r"O_WRONLY|O_RDWR|O_CREAT|creat\(|mkdir\(", line)
        and not re.search(r'"/(dev/(null|tty|shm/.*)|proc/.*|sys/.*)"|= -1 ', line)
    ]
    assert not writing
    assert not folder.exists()


@pytest.mark.parametrize("place", [(), ("CPU",), ("AUTO",)], ids=["core", "CPU", "AUTO"])
@pytest.mark.parametrize("spelling", ["top", "with a mode"])  # a Core takes no other
def test_what_is_read_for_a_core_with_a_cache(place, spelling, canary, site, tmp_path):
    _, sealed, weights = canary
    core = ov.Core()
    core.set_property(*place, SPELLINGS[spelling](str(tmp_path / "cache")))
    device = place[0] if place else "CPU"
    for work in (
        lambda: core.compile_model(read(sealed, keys=site, core=core), device),
        lambda: load(sealed, device, keys=site, core=core).close(),
    ):
        with contextlib.suppress(ConfigError, RuntimeError):
            work()
    assert not any(weights in path.read_bytes() for path in files(tmp_path))


@pytest.mark.parametrize("variable", _no_disk._VARIABLES)
def test_a_variable_that_makes_openvino_write(variable, canary, site, monkeypatch):
    monkeypatch.setenv(variable, "1")
    for verb in (load, read, load_llm):
        with pytest.raises(ConfigError, match=f"{variable} would make OpenVINO write") as caught:
            verb(canary[1], keys=site)
        assert f"unset {variable}" in caught.value.hint


def test_the_variables_do_make_this_openvino_write(canary, tmp_path):
    """Else the list is of another OpenVINO, and this one may have other names for it."""
    program = "import sys, openvino as ov; ov.Core().compile_model(sys.argv[1], sys.argv[2])"
    made = {}
    for variable in _no_disk._VARIABLES:
        here = tmp_path / variable
        here.mkdir()
        device = "HETERO:CPU" if "HETERO" in variable else "CPU"
        subprocess.run(
            [sys.executable, "-c", program, canary[0], device],
            cwd=here,
            env={**os.environ, "CI": "true", variable: "1"},
            check=True,
            capture_output=True,
        )
        made[variable] = any(here.iterdir())
    assert made.pop("OV_ENABLE_SERIALIZE_TRACING")
    assert made.pop("OV_ENABLE_VISUALIZE_TRACING")
    assert made.pop("OPENVINO_HETERO_VISUALIZE")


def test_a_draft_model_is_sealed_or_trusted(seal, site):
    import openvino_genai

    plain, sealed = HERE / "tiny-llm", seal(HERE / "tiny-llm", "tiny-llm")
    ready = openvino_genai.draft_model(plain, "CPU")
    with pytest.raises(ConfigError, match="ready-made draft_model") as caught:
        load_llm(sealed, keys=site, draft_model=ready)
    assert "load_draft_model" in caught.value.hint
    load_llm(sealed, keys=site, draft_model=ready, trust_draft_model=True).close()
    with pytest.raises(ConfigError, match="CACHE_DIR"):
        load_draft_model(sealed, keys=site, CACHE_DIR="cache")
