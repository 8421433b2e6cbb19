"""The same commands on each module and kind of key; only the config differs."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from typer.testing import CliRunner

from keymgmt.backend import KeymgmtError, Recipient
from keymgmt.cli import app

CASES = [
    ("softhsm_token", "aes256", "ecdsa-p256"),
    ("softhsm_token", "ecdh-p256", "rsa-pss"),
    ("nss_token", "aes256", "ecdsa-p384"),
    ("nss_token", "rsa-oaep", "ecdsa-p256"),
]


class Site:
    """A directory with a config, its keys and a model; commands run in it."""

    def __init__(self, token: Any, directory: Path, kind: str, signs: str) -> None:
        self.token, self.directory = token, directory
        self.wraps, self.publisher = f"e2e-{kind}", f"e2e-{signs}"
        arguments = f"init_args = {json.dumps(token.init_args)}\n" if token.init_args else ""
        self.table = (
            f'[providers.hsm]\nbackend = "pkcs11"\nmodule = "{token.module}"\n'
            f'token = "{token.label}"\npin = {{ file = "{token.pin_file}" }}\n{arguments}'
        )
        self.trust = '[policy]\npublishers = { "publisher.pem" = ["*"] }\n'
        (directory / "keymgmt.toml").write_text(
            f"{self.table}{self.trust}"
            f'[seal]\nsign = "hsm:{self.publisher}"\nto = ["hsm:{self.wraps}"]\n'
        )
        (directory / "model").mkdir()
        (directory / "model" / "weights.bin").write_bytes(os.urandom(3 << 20))
        with token.provider() as provider:
            have = {info.key for info in provider.list_keys()}
        if self.wraps not in have:
            self.run("keys", "create", f"hsm:{self.wraps}", "--kind", kind)
        if self.publisher not in have:
            self.run("keys", "create", f"hsm:{self.publisher}", "--kind", signs)
        self.run("keys", "export", f"hsm:{self.publisher}", "-o", "publisher.pem")

    def run(self, *arguments: object, code: int = 0) -> str:
        # In this process: starting one for each command would be most of the time of the test.
        with contextlib.chdir(self.directory):
            ran = CliRunner().invoke(app, ["-c", "keymgmt.toml", *map(str, arguments)])
        failed = ran.exception if isinstance(ran.exception, KeymgmtError) else None
        assert (failed.exit_code if failed else ran.exit_code) == code, (ran.output, ran.exception)
        return " ".join([ran.output, str(failed), str(getattr(failed, "attempts", ""))])


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].partition('_')[0]}-{case[1]}")
def site(request, tmp_path) -> Site:
    module, kind, signs = request.param
    return Site(request.getfixturevalue(module), tmp_path, kind, signs)


def test_seal_verify_sign_rotate_rewrap_retire(site):
    site.run("seal", "model", "model.sealed", "--name", "resnet50", "--release", "3")
    policy = (site.directory / "model.sealed" / "keys.json").read_text()
    for place in (str(site.token.module), site.token.label, str(site.token.directory)):
        assert place not in policy
    site.run("verify", "model.sealed")
    site.run("unseal", "model.sealed", "plain")
    plain = (site.directory / "plain" / "weights.bin").read_bytes()
    assert plain == (site.directory / "model" / "weights.bin").read_bytes()
    assert site.token.pin not in site.run("doctor", f"hsm:{site.wraps}")

    second = "e2e-second"
    with site.token.provider() as provider:
        if second not in {info.key for info in provider.list_keys()}:
            provider.create_key(second, "ecdsa-p256", {})
    site.run("sign", "model.sealed", f"hsm:{second}")
    site.run("verify", "model.sealed")

    old = json.loads(policy)["groups"][0]["recipients"][0]["version"]
    site.run("keys", "rotate", f"hsm:{site.wraps}")
    site.run("rewrap", "model.sealed")
    new = (site.directory / "model.sealed" / "keys.json").read_text()
    assert json.loads(new)["groups"][0]["recipients"][0]["version"] != old
    site.run("keys", "retire", f"hsm:{site.wraps}@{old}")
    site.run("verify", "model.sealed")
    (site.directory / "model.sealed" / "keys.json").write_text(policy)
    assert "retired" in site.run("verify", "model.sealed", code=5)


WITHOUT_THE_HSM = """
import sys
sys.modules["keymgmt_pkcs11"] = sys.modules["pkcs11"] = None
import keymgmt
keymgmt.seal("model", "offline.sealed", to=["@device.recipient"], name="offline",
             keys="build.toml", fingerprints=[sys.argv[1]])
"""


@pytest.mark.parametrize("kind", ["ecdh-p256", "ecdh-p384", "rsa-oaep"])
def test_a_build_machine_seals_without_the_hsm(request, tmp_path, kind):
    module = "nss_token" if kind == "rsa-oaep" else "softhsm_token"
    site = Site(request.getfixturevalue(module), tmp_path, kind, "ecdsa-p256")
    site.run("keys", "export", f"hsm:{site.wraps}", "-o", "device.recipient")
    (tmp_path / "build.toml").write_text("[policy]\nrequire_signature = false\n")
    fingerprint = Recipient.load(tmp_path / "device.recipient").fingerprint
    command = [sys.executable, "-c", WITHOUT_THE_HSM, fingerprint]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    site.run("sign", "offline.sealed", f"hsm:{site.publisher}")
    site.run("verify", "offline.sealed")


PLAIN = """
import sys, pkcs11
module, label, pin, version, blob, context = sys.argv[1:]
blob, context = bytes.fromhex(blob), bytes.fromhex(context)
with pkcs11.lib(module).get_token(token_label=label).open(user_pin=pin) as session:
    key = session.get_key(id=bytes.fromhex(version), object_class=pkcs11.ObjectClass.SECRET_KEY)
    print(key.decrypt(blob[12:], mechanism=pkcs11.Mechanism.AES_GCM,
                      mechanism_param=pkcs11.GCMParams(blob[:12], context, 128)).hex())
"""


def test_a_model_opens_with_plain_python_pkcs11_and_the_spec_alone(softhsm_token, tmp_path):
    """Sections 1, 4 and 5 of SPEC.md, and one C_Decrypt."""
    site = Site(softhsm_token, tmp_path, "aes256", "ecdsa-p256")
    site.run("seal", "model", "spec.sealed", "--name", "resnet50")
    raw = (tmp_path / "spec.sealed" / "manifest.json").read_bytes()
    manifest = json.loads(raw)
    (group,) = json.loads((tmp_path / "spec.sealed" / "keys.json").read_bytes())["groups"]
    (recipient,) = group["recipients"]

    def listed(*parts: bytes) -> bytes:
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)

    label, place = b"keymgmt-sealed/1", (1).to_bytes(2, "big") + (0).to_bytes(2, "big")
    nonce = bytes.fromhex(group["nonce"])
    context = hashlib.sha384(
        listed(label, b"wrap", hashlib.sha384(raw).digest(), nonce, place)
    ).hexdigest()
    blob = base64.b64decode(recipient["blob"]).hex()
    done = programs.run(
        *(sys.executable, "-c", PLAIN, str(softhsm_token.module), softhsm_token.label),
        *(softhsm_token.pin, recipient["version"], blob, context),
        check=True,
    )
    info = listed(label, b"commitment", bytes.fromhex(manifest["id"]))
    dek = bytes.fromhex(done.stdout.strip())
    assert HKDFExpand(hashes.SHA384(), 48, info).derive(dek).hex() in raw.decode()


def test_a_model_runs(site):
    """``keymgmt run``, where the loader is installed."""
    ov = pytest.importorskip("openvino")
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("keymgmt_openvino")
    from openvino import opset13 as ops

    parameter = ops.parameter([1, 4], ov.Type.f32, name="x")
    model = ov.Model([ops.relu(parameter)], [parameter], "relu")
    ov.save_model(model, str(site.directory / "relu.xml"))
    site.run("seal", "relu.xml", "relu.sealed", "--name", "relu")
    numpy.save(site.directory / "x.npy", numpy.array([[-1, 2, -3, 4]], dtype=numpy.float32))
    site.run("run", "relu.sealed", "--input", "x.npy", "--output", "y.npz")
    (answer,) = numpy.load(site.directory / "y.npz").values()
    assert answer.tolist() == [[0, 2, 0, 4]]


def test_two_tokens_as_one_lock(softhsm_token, nss_token, tmp_path, new_token):
    """A group of both modules opens with both, and a third token alone is break-glass."""
    site = Site(softhsm_token, tmp_path, "aes256", "ecdsa-p256")
    spare = new_token("break glass")
    (tmp_path / "keymgmt.toml").write_text(
        (tmp_path / "keymgmt.toml").read_text()
        + site.table.replace("providers.hsm", "providers.spare").replace(
            softhsm_token.label, spare.label
        )
        + f'[providers.nss]\nbackend = "pkcs11"\nmodule = "{nss_token.module}"\n'
        f'token = "{nss_token.label}"\npin = {{ file = "{nss_token.pin_file}" }}\n'
        f"init_args = {json.dumps(nss_token.init_args)}\n"
    )
    for key in ("nss:lock", "spare:glass"):
        site.run("keys", "create", key, "--kind", "aes256")
    groups = ("--to", f"hsm:{site.wraps}+nss:lock", "--to", "spare:glass")
    site.run("seal", "model", "both.sealed", "--name", "both", *groups)
    site.run("verify", "both.sealed")
    spare.tool("--delete-object", "--type", "secrkey", "--label", "glass")
    site.run("verify", "both.sealed")
    site.run("keys", "rotate", "nss:lock")
    site.run("verify", "both.sealed")


@pytest.mark.once
def test_the_question_for_a_pin_is_seen_whatever_asks(
    softhsm_token, tmp_path, asks, verbs_that_ask
):
    site = Site(softhsm_token, tmp_path, "aes256", "ecdsa-p256")
    config = tmp_path / "keymgmt.toml"
    pin = f'pin = {{ file = "{softhsm_token.pin_file}" }}'
    config.write_text(config.read_text().replace(pin, 'pin = { prompt = "PIN of the HSM" }'))
    assert pin not in config.read_text()
    for verb in verbs_that_ask(f"hsm:{site.wraps}"):
        asks("PIN of the HSM: ", softhsm_token.pin, "-c", config, *verb, cwd=tmp_path)


@pytest.mark.once
def test_a_command_that_is_stopped_prints_no_traceback(softhsm_token, tmp_path, ends_quietly):
    Site(softhsm_token, tmp_path, "aes256", "ecdsa-p256")
    ends_quietly("-c", "keymgmt.toml", "pkcs11", "mechanisms", "hsm", cwd=tmp_path)


@pytest.mark.once
def test_a_module_that_lacks_its_own_configuration_says_where_that_is(softhsm_token, tmp_path):
    """SoftHSM answers CKR_GENERAL_ERROR, whatever it did not find."""
    Site(softhsm_token, tmp_path, "aes256", "ecdsa-p256")
    ran = subprocess.run(
        [sys.executable, "-m", "keymgmt.cli", "-c", "keymgmt.toml", "doctor"],
        env=os.environ | {"SOFTHSM2_CONF": "/nonexistent"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert ran.returncode == 1
    assert "CKR_GENERAL_ERROR" in ran.stdout
    assert "SOFTHSM2_CONF" in ran.stdout
