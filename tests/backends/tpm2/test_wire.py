"""What passes between this machine and its TPM, recorded, and searched for secrets.

The search is shown to find them: with parameter encryption off, they are there.
"""

from __future__ import annotations

import pytest
from keymgmt_tpm2 import Tpm2Provider
from keymgmt_tpm2._connection.tpm import Tpm

from keymgmt.backend import Dek, SecretSource

CONTEXT = b"a context"
PIN = b"correct-pin-71"


@pytest.fixture
def recorded(settings, wire, pin_file):
    changes = {"tcti": wire.tcti, "pin": SecretSource(file=pin_file)}
    with Tpm2Provider("tpm", settings.model_copy(update=changes)) as provider:
        yield provider


def work(provider, monkeypatch, kind: str) -> tuple[bytes, bytes]:
    """Make a key, wrap and unwrap; returns the DEK and what the TPM computed for it."""
    computed = []
    for name in ("ecdh", "rsa_decrypt"):
        original = getattr(Tpm, name)

        def keep(tpm, *args, original=original):
            result = original(tpm, *args)
            computed.append(bytes(result))
            return result

        monkeypatch.setattr(Tpm, name, keep)
    provider.create_key("dev", kind, {"pin": "yes", "pcr": "7"})
    with Dek.generate() as dek:
        wrapped = provider.wrap("dev", dek, CONTEXT)
        with provider.unwrap(wrapped, CONTEXT) as again:
            assert again == dek
        assert len(computed) == 1
        return bytes(dek.view()), computed[0]


@pytest.mark.parametrize("kind", ["ecc-p256", "rsa-2048"])
def test_no_secret_is_on_the_wire(recorded, wire, monkeypatch, kind):
    dek, computed = work(recorded, monkeypatch, kind)
    assert len(wire.recorded) > 1000
    for secret in (dek, computed, PIN):
        assert secret not in wire.recorded


@pytest.mark.parametrize("kind", ["ecc-p256", "rsa-2048"])
def test_without_parameter_encryption_they_are(recorded, wire, monkeypatch, unencrypted, kind):
    dek, computed = work(recorded, monkeypatch, kind)
    assert computed in wire.recorded
    assert PIN in wire.recorded
    # Even then the data key itself is not: the TPM never has it.
    assert dek not in wire.recorded


def test_the_pin_is_not_sent_when_it_is_refused(recorded, wire, pin_file):
    recorded.create_key("dev", "ecc-p256", {"pin": "yes"})
    pin_file.write_text("another-pin-22")
    wire.recorded.clear()
    with Dek.generate() as dek:
        wrapped = recorded.wrap("dev", dek, CONTEXT)
        with pytest.raises(Exception, match="refused"):
            recorded.unwrap(wrapped, CONTEXT)
    assert wire.recorded
    assert b"another-pin-22" not in wire.recorded


def test_another_root_key_on_the_wire_gets_no_session(recorded, wire, make_swtpm, settings, set_up):
    """An interposer that answers with its own TPM: nothing is salted to its root key."""
    recorded.create_key("dev", "ecc-p256", {"pin": "yes"})
    other = make_swtpm("interposer")
    set_up(other)
    wire._target = other.port
    wire.commands.clear()
    with Dek.generate() as dek:
        wrapped = recorded.wrap("dev", dek, CONTEXT)
        with pytest.raises(Exception, match="the config pins"):
            recorded.unwrap(wrapped, CONTEXT)
    start_auth_session, read_public = 0x176, 0x173
    assert read_public in wire.commands
    assert start_auth_session not in wire.commands


def test_a_busy_tpm_is_asked_again(recorded, wire):
    """RC_RETRY, RC_YIELDED and RC_TESTING are answers of a TPM that is well."""
    recorded.create_key("dev", "ecc-p256", {})
    with Dek.generate() as dek:
        wrapped = recorded.wrap("dev", dek, CONTEXT)
        for code in (0x922, 0x908, 0x90A):
            times = [0]

            def busy(command, code=code, times=times):
                # ESAPI asks five times by itself; more than that is ours to ask again.
                if times[0] < 12:
                    times[0] += 1
                    return b"\x80\x01" + (10).to_bytes(4, "big") + code.to_bytes(4, "big")
                return None

            wire.intercept = busy
            with recorded.unwrap(wrapped, CONTEXT) as again:
                assert again == dek
            assert times[0] == 12
        wire.intercept = lambda command: None
