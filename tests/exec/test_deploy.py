"""examples/deploy: what is there is valid, and its command lines run here, on a model of ours."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from programs import run

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"


def ours(site: Any, words: list[str], program: list[str]) -> list[str]:
    """The options of a ``keymgmt exec`` line, with our model, and ``program`` behind them."""
    assert words[1:3] == ["--config", "/etc/keymgmt/keymgmt.toml"]
    assert words[3] == "exec"
    options = words[5 : words.index("--")]
    return ["m" if word == "llama" else word for word in options] + ["--", *program]


def test_the_unit(needs_root, site, require_tool, tmp_path):
    verify = require_tool("systemd-analyze", package="systemd")
    unit = (DEPLOY / "llama.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    there = unit.replace("ExecStart=keymgmt", "ExecStart=/bin/true")
    there = there.replace(":/etc/keymgmt/vault-secret", ":/etc/hostname")
    (tmp_path / "llama.service").write_text(there)
    done = run(verify, "verify", tmp_path / "llama.service")
    assert (done.returncode, done.stderr) == (0, "")
    # As the unit runs it: a user without any rights, without new privileges.
    site.own(1234)
    words = ours(site, shlex.split(line), ["cat", "{sealed}/a.txt"])
    assert site.run(*words, user=1234).stdout == "hello\n"


def test_the_image(needs_root, site):
    text = (DEPLOY / "Containerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    site.own(1000)
    serve = (DEPLOY / "serve.py").read_text()
    words = ours(site, json.loads(entry), ["/usr/bin/python3", "-c", serve, "{sealed}"])
    done = site.run(*words, user=1000, group=1000)
    assert done.stdout.splitlines() == ["a.txt 6", "empty 0", "w.bin 3000001"], done.stderr


def test_the_manifests():
    validate = pytest.importorskip("kubernetes_validate")
    yaml = pytest.importorskip("yaml")
    pods = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    assert [pod["metadata"]["name"] for pod in pods] == ["llama", "llama-init"]
    for pod in pods:
        validate.validate(pod, validate.latest_version(), strict=True)
