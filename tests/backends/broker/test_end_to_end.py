"""From evidence to a model that runs, by the kinds of evidence that are installed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from quotes import MR_TD, RTMRS
from tees import gramine_toml, mounted

pytest.importorskip("keymgmt_broker_service")

from keymgmt_broker import BrokerProvider, BrokerSettings

import keymgmt
from keymgmt.backend import AccessDenied, Dek

pytestmark = pytest.mark.once

IN_AN_ENCLAVE = """
import pickle, sys
settings, wrapped = pickle.load(sys.stdin.buffer)
from keymgmt_broker import BrokerProvider
with BrokerProvider("proven", settings).unwrap(wrapped, b"c") as dek:
    sys.stdout.buffer.write(bytes(dek.view()))
"""


@pytest.fixture
def enclave(tmp_path, world, require_tool) -> Iterator[Path]:
    with mounted("sgx", world, tmp_path / "enclave", require_tool) as folder:
        yield folder


@pytest.fixture
def settings(shared_service, enclave, recipients) -> BrokerSettings:
    evidence = {
        "kind": "sgx",
        "user_report_data": enclave / "user_report_data",
        "quote": enclave / "quote",
    }
    return BrokerSettings(service=shared_service.address, evidence=evidence, recipients=recipients)


def test_a_process_that_is_spawned_unwraps_with_gramines_files(settings):
    provider = BrokerProvider("proven", settings)
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
        done = subprocess.run(
            [sys.executable, "-c", IN_AN_ENCLAVE],
            input=pickle.dumps((settings, wrapped)),
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout == bytes(dek.view())


def test_doctor_says_what_the_broker_makes_of_this_machine(settings):
    health = BrokerProvider("proven", settings).check()
    assert health.ok, health
    assert {finding.name for finding in health.findings} >= {"evidence sgx", "round trip model"}


def test_the_same_for_a_guest_of_tdx(make_service, client):
    wanted = ", ".join(f'"{each.hex()}"' for each in (RTMRS[1],))
    service = make_service(
        policy=f'evidence = "tdx"\nmr_td = ["{MR_TD.hex()}"]\nrtmr1 = [{wanted}]\n'
    )
    provider = client(service.address, evidence="tdx")
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
        with provider.unwrap(wrapped, b"c") as again:
            assert again == dek
    with pytest.raises(AccessDenied, match="no policy that gives this key for this kind"):
        client(service.address, evidence="sgx").unwrap(wrapped, b"c")


def test_a_model_runs_in_openvino(shared_service, enclave, recipients, tmp_path):
    ov = pytest.importorskip("openvino")
    np = pytest.importorskip("numpy")
    load = pytest.importorskip("keymgmt_openvino").load
    from openvino import opset13 as op

    data = op.parameter([1, 4], np.float32)
    weights = op.constant(np.arange(16, dtype=np.float32).reshape(4, 4))
    plain = ov.Model([op.matmul(data, weights, False, False)], [data], "doubled")
    (tmp_path / "model").mkdir()
    ov.save_model(plain, tmp_path / "model" / "model.xml", compress_to_fp16=False)
    file = tmp_path / "keymgmt.toml"
    file.write_text(
        f'[providers.proven]\nbackend = "broker"\nservice = "{shared_service.address}"\n'
        f'evidence = {gramine_toml(enclave)}\nrecipients = {{ model = "{recipients["model"]}" }}\n'
        "[policy]\nrequire_signature = false\n"
    )
    keymgmt.seal(tmp_path / "model", tmp_path / "m.sealed", to=["proven:model"], keys=file)
    given = np.ones((1, 4), np.float32)
    with load(tmp_path / "m.sealed", keys=file) as model:
        (result,) = model(given).values()
    (expected,) = ov.Core().compile_model(plain, "CPU")(given).values()
    assert (result == expected).all()
