"""A key for a device with a TPM: a real emulator, a real service, and the quote between them."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("keymgmt_broker_service")
pytest.importorskip("tpm2_pytss")

from keymgmt_broker import BrokerProvider, BrokerSettings
from keymgmt_broker_service._verify._collateral import Refused
from keymgmt_broker_service._verify._policies import TpmPolicy
from keymgmt_broker_service._verify._quotes import examine, prepare
from keymgmt_tpm2 import Tpm2Provider, Tpm2Settings
from keymgmt_tpm2._setup import set_up
from keymgmt_tpm2._structures import Public
from keymgmt_tpm2.enroll._attest import check_statement
from keymgmt_tpm2.enroll._office import ek_id
from keymgmt_tpm2.quote import _file
from office import Signer, boot
from swtpm import Swtpm

from keymgmt.backend import AccessDenied, Dek

pytestmark = pytest.mark.once
BOOTED = [(4, b"a kernel"), (7, b"secure boot")]


@pytest.fixture
def make_device(require_tool, tmp_path):
    """An emulated TPM by name, with a key and something booted; its provider and its evidence."""
    program = require_tool("swtpm", package="swtpm")
    with contextlib.ExitStack() as stack:

        def make(name: str) -> tuple[Tpm2Provider, dict[str, Any]]:
            tcti = stack.enter_context(Swtpm(program, tmp_path / f"tpm-{name}")).tcti
            values = {"keys": str(tmp_path / name), "tcti": tcti}
            with Tpm2Provider(name, Tpm2Settings.model_validate(values)) as plain:
                values["srk_name"] = set_up(plain, create=True).name
            provider = Tpm2Provider(name, Tpm2Settings.model_validate(values))
            stack.enter_context(provider)
            boot(provider, *BOOTED)
            provider.create_key("dev", "ecc-p256", {})
            return provider, {"kind": "tpm2", "pcrs": "4,7", **values}

        yield make


@pytest.fixture
def client(recipients):
    def make(address: str, evidence: dict[str, Any]) -> BrokerProvider:
        values = {"service": address, "evidence": evidence, "recipients": recipients}
        return BrokerProvider("proven", BrokerSettings.model_validate(values))

    return make


def enrol(office: Signer, provider: Tpm2Provider, client: BrokerProvider, file: Path) -> None:
    """What the office signs of a device; how it proves that, tests/backends/tpm2 shows."""
    quote = json.loads(client.settings.evidence.make().quote(bytes(32)))
    ak = Public.parse(base64.b64decode(quote["ak"]))
    known = {"attested": "tpm2", "ak": ak.name.hex(), "ek": ek_id(ak)}
    recipient = provider.export_recipient("dev")
    office.state(dataclasses.replace(recipient, attributes=known), file)


def opens(client: BrokerProvider) -> bool:
    with Dek.generate() as dek:
        wrapped = client.wrap("model", dek, b"context")
        with client.unwrap(wrapped, b"context") as opened:
            return bool(opened == dek)


def test_a_quote_is_verified_once_whatever_the_number_of_policies(
    make_device, client, tmp_path, monkeypatch
):
    office, devices = Signer(tmp_path / "office.pem"), tmp_path / "devices"
    device, evidence = make_device("one")
    machine = client("http://127.0.0.1:1", evidence)
    enrol(office, device, machine, devices / "one.recipient")
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"bank": "sha256", "pcrs": {"4": "01" * 31 + "02"}}))
    policy = {"evidence": "tpm2", "devices": devices, "attesters": [office.pem]}
    other = prepare(TpmPolicy.model_validate({**policy, "pcr_values": [state]}))
    wanted = prepare(TpmPolicy.model_validate({**policy, "any_state": True}))
    verified = []

    def count(*arguments):
        verified.append(arguments)
        return check_statement(*arguments)

    monkeypatch.setattr(_file, "check_statement", count)
    asked = bytes(range(32))
    judge = examine(machine.settings.evidence.make().quote(asked), asked, "tpm2", None, 0)
    for _ in range(3):
        with pytest.raises(Refused, match="another boot state"):
            judge(other)
    assert judge(wanted).facts["ek"]
    assert len(verified) == 1


def test_a_key_for_an_enrolled_device_in_its_boot_state(
    make_device, make_service, client, tmp_path
):
    office, devices = Signer(tmp_path / "office.pem"), tmp_path / "devices"
    device, evidence = make_device("one")
    enrol(office, device, client("http://127.0.0.1:1", evidence), devices / "one.recipient")
    state = tmp_path / "state.json"
    state.write_text(json.dumps(device.pcrs("sha256", [4, 7]).to_json()))
    service = make_service(
        more=f'[policies.devices]\nevidence = "tpm2"\ndevices = "{devices}"\n'
        f'attesters = ["{office.pem}"]\npcr_values = ["{state}"]\n',
        keys='[keys.model]\nkey = "site:model"\nallow = ["devices"]\n',
    )
    machine = client(service.address, evidence)
    assert opens(machine)
    assert "ek" in service.said()
    # Another machine of the same kind was not enrolled.
    _, other = make_device("two")
    with pytest.raises(AccessDenied, match="does not accept the evidence"):
        opens(client(service.address, other))
    assert "is of no enrolled device" in service.said()
    # The device boots something else.
    boot(device, (4, b"another kernel"))
    with pytest.raises(AccessDenied, match="does not accept the evidence"):
        opens(machine)
    assert "another boot state: PCR 4 of sha256" in service.said()
