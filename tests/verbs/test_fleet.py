"""examples/fleet: a rotation in parts, by what shares them out; and what is killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
from loopback import Authority, free_port

import keymgmt

pytest.importorskip("keymgmt_file")
pytestmark = [pytest.mark.once, pytest.mark.timeout(600)]

FLEET = Path(__file__).parents[2] / "examples" / "fleet"
MODELS = 40


@pytest.fixture
def tree(site) -> Path:
    """Models whose key has a second version; a config of the command is beside it."""
    (site.root / "tree").mkdir()
    first = site.seal(target="tree/m0.sealed")
    for number in range(1, MODELS):
        shutil.copytree(first, first.with_name(f"m{number}.sealed"))
    site.provider.rotate_key("a")
    config = site.root / "keymgmt.toml"
    config.write_text(
        f'[providers.local]\nbackend = "file"\npath = "{site.root}/keys"\n'
        '[policy]\npublishers = { "pub.pem" = ["*"] }\n'
    )
    return Path(first.parent)


@pytest.fixture
def environment(site) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "KEYMGMT_CONFIG": str(site.root / "keymgmt.toml"), "PATH": path}


def check_rotated(tree: Path) -> None:
    """Nothing was lost: every model opens by the new version alone, and nothing lies about."""
    found = keymgmt.usage(tree)
    assert [(use.version, use.opens) for use in found.keys] == [("2", MODELS)]
    assert not found.failures
    assert not list(tree.rglob(".*"))


def test_with_gnu_parallel(tree, environment, require_tool, tmp_path):
    require_tool("parallel", package="parallel")
    require_tool("jq", package="jq")
    command = ["sh", FLEET / "rotate.sh", tree, "4"]
    work = tmp_path / "work"
    work.mkdir()
    (tree / "m1.sealed" / "manifest.json").rename(tree / "m1.sealed" / "gone")

    def run(code: int) -> dict[str, int]:
        done = programs.run(*command, cwd=work, env=environment, timeout=300)
        assert done.returncode == code, done.stderr
        joined: dict[str, int] = json.loads(done.stdout)
        return joined

    assert run(1) == {
        "parts": 4,
        "models": MODELS - 1,
        "changed": MODELS - 1,
        "failed": 1,
        "exit_code": 4,
    }
    (tree / "m1.sealed" / "gone").rename(tree / "m1.sealed" / "manifest.json")
    # Only the part that failed runs again.
    again = run(0)
    assert (again["models"], again["failed"], again["exit_code"]) == (MODELS, 0, 0)
    assert again["changed"] < MODELS
    check_rotated(tree)


def test_the_indexed_job(tree, environment):
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((FLEET / "job.yaml").read_text())
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    (line,) = container["args"]
    assert f"/{spec['completions']}" in line
    for mine, theirs in (
        ("/etc/keymgmt/keymgmt.toml", environment["KEYMGMT_CONFIG"]),
        ("/srv/models", str(tree)),
        (f"/{spec['completions']}", "/3"),
    ):
        assert mine in line
        line = line.replace(mine, theirs)
    models = 0
    for index in range(3):
        done = programs.run(
            *container["command"], line, env={**environment, "JOB_COMPLETION_INDEX": str(index)}
        )
        assert done.returncode == 0, done.stderr
        models += json.loads(done.stdout.splitlines()[-1])["changed"]
    assert models == MODELS
    check_rotated(tree)


def test_the_job_is_valid():
    validate = pytest.importorskip("kubernetes_validate")
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((FLEET / "job.yaml").read_text())
    validate.validate(job, validate.latest_version(), strict=True)


@pytest.fixture
def cluster(tmp_path, environment) -> Iterator[Any]:
    """A Dask scheduler and two workers, each a process; its address, and the workers."""
    pytest.importorskip("distributed")
    authority = Authority(tmp_path / "authority")
    cert, key = authority.issue("dask", peer=True)
    secure = ["--tls-ca-file", authority.ca_file, "--tls-cert", cert, "--tls-key", key]
    address = f"tls://127.0.0.1:{free_port()}"
    own = {**environment, "DASK_TEMPORARY_DIRECTORY": str(tmp_path / "dask")}
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "distributed.cli." + words[0], *words[1:], *secure]
        started.append(subprocess.Popen(command, env=own, stderr=subprocess.DEVNULL))
        return started[-1]

    start("dask_scheduler", "--host", address, "--no-dashboard", "--no-show")
    workers = [
        start("dask_worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard")
        for _ in range(2)
    ]
    try:
        yield address, workers, (authority.ca_file, cert, key)
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.nightly
def test_with_dask_and_a_worker_that_is_killed(tree, cluster, environment):
    address, workers, (ca, cert, key) = cluster
    command = [sys.executable, FLEET / "dask_rotate.py", address, tree, "--parts", "8"]
    command += ["--ca", ca, "--cert", cert, "--key", key]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        lines = [client.stdout.readline()]
        workers[0].send_signal(signal.SIGKILL)
        lines += client.stdout.readlines()
    assert client.returncode == 0
    parts = [json.loads(line) for line in lines]
    assert sorted(part["shard"] for part in parts) == [f"{number}/8" for number in range(1, 9)]
    assert sum(part["models"] for part in parts) == MODELS
    assert sum(part["changed"] for part in parts) <= MODELS
    # What the killed worker had begun may still be at work.
    until = time.monotonic() + 60
    while list(tree.rglob(".*")) and time.monotonic() < until:
        time.sleep(0.1)
    check_rotated(tree)


@pytest.mark.nightly
def test_without_a_certificate_nobody_reaches_the_scheduler(tree, cluster, tmp_path, environment):
    address, _, (ca, _, _) = cluster
    other = Authority(tmp_path / "other", "another authority")
    cert, key = other.issue("stranger", peer=True)
    command = [sys.executable, FLEET / "dask_rotate.py", address, tree, "--parts", "2"]
    command += ["--ca", ca, "--cert", cert, "--key", key]
    environment["DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT"] = "5s"
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode != 0
    assert {use.version for use in keymgmt.usage(tree).keys} == {"1"}
