"""A second program for GGUF, in another language: node-llama-cpp, from the npm registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from programs import run

pytest.importorskip("gguf")
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

LLAMA = Path(__file__).parents[1] / "shared" / "llama.py"
VERSION = "3.22.1"
PROGRAM = """
import {getLlama} from "node-llama-cpp";
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: `${process.argv[2]}/tiny.gguf`});
const context = await model.createContext({contextSize: 64, threads: 1});
const tokens = [];
for await (const token of context.getSequence().evaluate([256, 97, 98], {temperature: 0}))
    if (tokens.push(token) === 8) break;
console.log(tokens.join(" "));
process.exit(0);
"""


def write(folder: Path) -> None:
    subprocess.run([sys.executable, LLAMA, folder / "tiny.gguf"], check=True)


def test_it_answers_as_from_the_plain_file(needs_root, new_site, require_tool):
    node, npm = require_tool("node"), require_tool("npm")
    site = new_site(write)
    packages = [f"{name}@{VERSION}" for name in ("node-llama-cpp", "@node-llama-cpp/linux-x64")]
    # Without scripts it builds nothing, and without what is optional it brings no CUDA.
    options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--prefix"]
    subprocess.run([npm, "install", *options, site.root, *packages], check=True, timeout=600)
    (site.root / "run.mjs").write_text(PROGRAM)
    line = [str(node), str(site.root / "run.mjs")]
    plain = run(*line, site.plain)
    assert plain.returncode == 0, plain.stderr
    assert len(plain.stdout.split()) == 8
    for via in ("mount", "memfd"):
        found = site.run("--via", via, "--", *line, "{sealed}")
        assert (found.returncode, found.stdout) == (0, plain.stdout), found.stderr
