"""The same commands as for any backend, on the server that ``keymgmt vault dev`` runs."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from waiting import until

import keymgmt

PAGE = Path(__file__).parents[3] / "docs" / "backends" / "vault.md"


class Dev:
    """A running ``keymgmt vault dev`` and the config that it printed."""

    def __init__(self, directory: Path, home: Path) -> None:
        self.directory = directory
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "keymgmt.cli", "vault", "dev", "--directory", str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
            text=True,
        )
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline() for _ in range(4)]
        assert all(lines), self.process.communicate()
        self.table = "".join(lines)
        self.address = tomllib.loads(self.table)["providers"]["site"]["address"]

    def post(self, path: str, body: Any) -> Any:
        """Ask the server itself, with the token of the config and none of our code."""
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=10)
        token = (self.directory / "token").read_text()
        connection.request("POST", f"/v1/{path}", json.dumps(body), {"X-Vault-Token": token})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        assert response.status == 200, answer
        return answer["data"]


@pytest.fixture(scope="module")
def dev(bao_binary, tmp_path_factory) -> Iterator[Dev]:
    home = tmp_path_factory.mktemp("home")
    dev = Dev(home / "dev", home)
    yield dev
    dev.process.send_signal(signal.SIGTERM)
    dev.process.wait(30)


@pytest.fixture
def site(dev, tmp_path) -> Path:
    """A directory with a config that trusts the site's publisher, and a model."""
    (tmp_path / "keymgmt.toml").write_text(
        f'{dev.table}[policy]\npublishers = {{ "publisher.pem" = ["*"] }}\n'
        '[seal]\nsign = "site:publisher"\nto = ["site:model"]\n'
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(os.urandom(3 << 20))
    (tmp_path / "model" / "config.json").write_text("{}")
    run = runner(dev, tmp_path)
    run("keys", "export", "site:publisher", "-o", "publisher.pem")
    return tmp_path


def runner(dev: Dev, directory: Path) -> Callable[..., str]:
    def run(*arguments: object, code: int = 0) -> str:
        ran = programs.run_keymgmt(
            "-c", "keymgmt.toml", *arguments, cwd=directory, env=dev.environment
        )
        assert ran.returncode == code, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    return run


def same(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir())
    return names == sorted(path.name for path in right.iterdir()) and all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in names
    )


def test_the_dev_server(dev, site):
    for name in ("token", "root-token", "server.log"):
        assert (dev.directory / name).stat().st_mode & 0o777 == 0o600
    root = (dev.directory / "root-token").read_text()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert root not in process.read_text(errors="replace")
    run = runner(dev, site)
    said = run("doctor", "site:model")
    assert "round trip" in said
    run("keys", "create", "site:gone")
    run("keys", "delete", "site:gone", "--force", "--yes")
    run("keys", "show", "site:gone", code=3)
    assert "root token" not in said
    provider = keymgmt.load_config(site / "keymgmt.toml").provider("site")
    assert {"model", "publisher"} <= {info.key for info in provider.list_keys()}  # type: ignore[attr-defined]


def test_policies_are_those_of_the_manual(dev, site):
    run = runner(dev, site)
    for role, key in (("seal", "resnet50"), ("open", "resnet50"), ("rotate", "resnet50")):
        assert run("vault", "policy", role, f"site:{key}") in PAGE.read_text()
    assert run("vault", "policy", "publish", "site:publisher") in PAGE.read_text()
    run("vault", "policy", "open", "site:../../sys/seal", code=3)
    run("vault", "policy", "open", "elsewhere:model", code=3)


def test_seal_verify_sign_rewrap_usage(dev, site):
    run = runner(dev, site)
    run("seal", "model", "model.sealed", "--name", "resnet50", "--release", "3")
    assert "resnet50" in run("verify", "model.sealed")
    run("unseal", "model.sealed", "plain")
    assert same(site / "plain", site / "model")

    # A second signature, by another key of the same server.
    run("keys", "create", "site:second", "--kind", "ecdsa-p256")
    run("sign", "model.sealed", "site:second")
    run("verify", "model.sealed")

    # Rotate, see what is needed, move to the new version, retire the old one.
    old = (site / "model.sealed" / "keys.json").read_bytes()
    run("keys", "rotate", "site:model")
    usage = json.loads(run("keys", "usage", ".", "--json"))
    assert "model" in json.dumps(usage)
    assert "model" in run("keys", "list", "site")
    run("rewrap", "model.sealed")
    new = json.loads((site / "model.sealed" / "keys.json").read_bytes())
    versions = {r["version"] for group in new["groups"] for r in group["recipients"]}
    assert versions == {"2"}
    run("keys", "retire", "site:model@1")
    run("verify", "model.sealed")
    (site / "model.sealed" / "keys.json").write_bytes(old)
    assert "retired" in run("verify", "model.sealed", code=5)


def test_a_tree_is_rewrapped(dev, site):
    run = runner(dev, site)
    run("keys", "create", "site:fleet")
    (site / "small").mkdir()
    (site / "tree").mkdir()
    (site / "small" / "m.bin").write_bytes(b"m")
    for number in range(3):
        run("seal", "small", f"tree/m{number}.sealed", "--name", "m", "--to", "site:fleet")
    run("keys", "rotate", "site:fleet")
    run("rewrap", "tree")
    for number in range(3):
        policy = json.loads((site / "tree" / f"m{number}.sealed" / "keys.json").read_bytes())
        assert policy["groups"][0]["recipients"][0]["version"] == "2"
        run("verify", f"tree/m{number}.sealed")


def test_a_model_opens_with_the_servers_api_and_the_spec_alone(dev, site):
    """Sections 1, 4 and 5 of SPEC.md, and one call to the server."""
    runner(dev, site)("seal", "model", "spec.sealed", "--name", "resnet50")
    raw = (site / "spec.sealed" / "manifest.json").read_bytes()
    manifest, policy = json.loads(raw), json.loads((site / "spec.sealed/keys.json").read_bytes())
    group = policy["groups"][0]
    (recipient,) = group["recipients"]

    def listed(*parts: bytes) -> bytes:
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)

    label = b"keymgmt-sealed/1"
    place = (1).to_bytes(2, "big") + (0).to_bytes(2, "big")
    nonce = bytes.fromhex(group["nonce"])
    context = hashlib.sha384(
        listed(label, b"wrap", hashlib.sha384(raw).digest(), nonce, place)
    ).digest()
    data = dev.post(
        f"transit/decrypt/{recipient['key']}",
        {
            "ciphertext": base64.b64decode(recipient["blob"]).decode(),
            "associated_data": base64.b64encode(context).decode(),
        },
    )
    dek = base64.b64decode(data["plaintext"])
    info = listed(label, b"commitment", bytes.fromhex(manifest["id"]))
    commitment = HKDFExpand(hashes.SHA384(), 48, info).derive(dek).hex()
    assert commitment in raw.decode()


def test_a_model_runs(dev, site):
    """``keymgmt run``, where the loader is installed."""
    ov = pytest.importorskip("openvino")
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("keymgmt_openvino")
    from openvino import opset13 as ops

    parameter = ops.parameter([1, 4], ov.Type.f32, name="x")
    model = ov.Model([ops.relu(parameter)], [parameter], "relu")
    ov.save_model(model, str(site / "relu.xml"))
    run = runner(dev, site)
    run("seal", "relu.xml", "relu.sealed", "--name", "relu")
    numpy.save(site / "x.npy", numpy.array([[-1, 2, -3, 4]], dtype=numpy.float32))
    run("run", "relu.sealed", "--input", "x.npy", "--output", "y.npz")
    (answer,) = numpy.load(site / "y.npz").values()
    assert answer.tolist() == [[0, 2, 0, 4]]


def test_the_dev_server_ends_with_its_command(bao_binary, tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):
        dev = Dev(tmp_path / number.name, tmp_path)
        port = int(dev.address.rpartition(":")[2])
        dev.process.send_signal(number)
        assert dev.process.wait(30) == 0, dev.process.communicate()

        def gone(port: int = port) -> bool:
            import socket

            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) != 0

        until(gone)


def test_a_port_in_use(dev, tmp_path):
    port = dev.address.rpartition(":")[2]
    arguments = ["vault", "dev", "--port", port, "--directory", str(tmp_path / "second")]
    ran = programs.run_keymgmt(*arguments, env=dev.environment)
    assert ran.returncode == 6
    assert "does not start" in ran.stderr
    assert "port" in ran.stderr


@pytest.mark.once
def test_the_question_for_a_token_is_seen_whatever_asks(dev, site, asks, verbs_that_ask):
    config = site / "keymgmt.toml"
    text, count = re.subn(r"token = \{.*?\}", 'token = { prompt = "Token" }', config.read_text())
    assert count == 1, text
    config.write_text(text)
    token = (dev.directory / "token").read_text()
    for verb in verbs_that_ask("site:model"):
        asks("Token: ", token, "-c", config, *verb, cwd=site)


@pytest.mark.once
def test_a_command_that_is_stopped_prints_no_traceback(site, ends_quietly):
    ends_quietly("-c", "keymgmt.toml", "doctor", "site:model", cwd=site)
