"""How many TPM commands an unwrap takes: on a chip each is some milliseconds, or some hundred."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keymgmt_tpm2 import Tpm2Provider
from keymgmt_tpm2.policy import _approval
from keymgmt_tpm2.policy._anchor import create_anchor
from keymgmt_tpm2.policy._approval import Approval
from keymgmt_tpm2.policy._policy import Approver, PcrState

from keymgmt.backend import Dek, SecretSource

CONTEXT = b"a context"
ECDH = 0x154


@pytest.fixture
def recorded(settings, wire, pin_file):
    changes = {"tcti": wire.tcti, "pin": SecretSource(file=pin_file)}
    with Tpm2Provider("tpm", settings.model_copy(update=changes)) as provider:
        yield provider


def approve(provider, tmp_path, stale: int):
    """A key with an approver, an approval of this boot state, and ``stale`` ones of others."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem, der = (
        key.public_key().public_bytes(e, PublicFormat.SubjectPublicKeyInfo)
        for e in (Encoding.PEM, Encoding.DER)
    )
    path = tmp_path / "approver.pem"
    path.write_bytes(pem)
    approver, now = Approver(der), provider.pcrs("sha256", [0, 7])
    states = [now] + [
        PcrState("sha256", {0: hashlib.sha256(bytes([i])).digest(), 7: now.values[7]})
        for i in range(stale)
    ]
    provider.create_key("dev", "ecc-p256", {"approver": str(path)})
    for state in states:
        message = Approval.message(state, None, approver)
        signature = key.sign(message, ec.ECDSA(hashes.SHA256()))
        _approval.install(provider.keys.path, Approval(state, None, approver, signature))


@pytest.mark.parametrize(
    ("kind", "most"), [("plain", 5), ("pin", 7), ("pcr", 7), ("signed", 11), ("approvals", 11)]
)
def test_commands_of_an_unwrap(recorded, wire, tmp_path, kind, most):
    if kind in ("signed", "approvals"):
        approve(recorded, tmp_path, 30 if kind == "approvals" else 0)
    else:
        options = {"plain": {}, "pin": {"pin": "yes"}, "pcr": {"pcr": "7"}}[kind]
        recorded.create_key("dev", "ecc-p256", options)
    with Dek.generate() as dek:
        wrapped = recorded.wrap("dev", dek, CONTEXT)
        wire.commands.clear()
        with recorded.unwrap(wrapped, CONTEXT) as again:
            assert again == dek
    # libtpms asks to try again when it first counts a key with a PIN as used (TPM_RC_RETRY).
    sent = [
        code
        for code, before in zip(wire.commands, [0, *wire.commands], strict=False)
        if not (kind == "pin" and code == before == ECDH)
    ]
    assert len(sent) == most, [hex(code) for code in sent]


@pytest.mark.parametrize(("key", "moving"), [(None, 6), ("dev", 8)])
def test_commands_of_an_anchor(recorded, wire, key, moving):
    """It is read by every open, and moved by every new release."""
    recorded.create_key("dev", "ecc-p256", {"pcr": "7"})
    name = create_anchor(recorded.service, key).name.hex()
    pinned = recorded.settings.model_copy(update={"anchor": name})
    with Tpm2Provider("tpm", pinned) as provider:
        wire.commands.clear()
        value = provider.anchor()
        assert len(wire.commands) == 4, [hex(code) for code in wire.commands]
        wire.commands.clear()
        provider.move_anchor(value, bytes(32))
        assert len(wire.commands) == moving, [hex(code) for code in wire.commands]
