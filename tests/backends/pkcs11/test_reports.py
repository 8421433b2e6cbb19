"""No secret in what tools show that report an error with the variables of every frame."""

from __future__ import annotations

import pytest
from reports import report

from keymgmt.backend import Dek, KeymgmtError, KeyNotFound, LockedOut, SecretSource

GENERAL_ERROR = 0x05


@pytest.mark.parametrize("code", [0xA0, GENERAL_ERROR, 0x190])
def test_a_pin_that_was_sent(faulty, faults, tmp_path, code):
    secret = f"secret-pin-{code}-4711"
    place = tmp_path / "pin"
    place.touch(0o600)
    place.write_text(secret)
    faults.answer("C_Login", code)
    with pytest.raises(KeymgmtError) as raised:
        faulty.provider(pin=SecretSource(file=place), timeout=2.0).list_keys()
    text = report(raised.value)
    assert "log_in" in text
    assert secret not in text
    assert "4711" not in text


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("aes256", "C_Encrypt"),
        ("aes256", "C_Decrypt"),
        ("aes256-kw", "C_WrapKey"),
        ("aes256-kw", "C_UnwrapKey"),
        ("ecdh-p256", "C_DeriveKey"),
    ],
)
def test_a_data_key_in_a_call_that_fails(faulty, faults, kind, call):
    provider = faulty.provider(timeout=3.0)
    key = f"report-{kind}"
    try:
        provider.describe_key(key)
    except KeyNotFound:
        provider.create_key(key, kind, {})
    with Dek.generate() as dek:
        secret = repr(bytes(dek.view()[:12]))[2:-1]
        wrapped = provider.wrap(key, dek, b"c")
        faults.answer(call, GENERAL_ERROR)
        wraps = call in ("C_Encrypt", "C_WrapKey")
        with pytest.raises(KeymgmtError) as raised:
            provider.wrap(key, dek, b"c") if wraps else provider.unwrap(wrapped, b"c")
        text = report(raised.value)
        assert secret not in text
        assert secret not in repr(raised.value.__cause__)


def test_the_right_pin_and_a_locked_token(faulty, faults):
    faults.answer("C_Login", 0xA4)
    with pytest.raises(LockedOut) as raised:
        faulty.provider().list_keys()
    assert faulty.pin not in report(raised.value)
