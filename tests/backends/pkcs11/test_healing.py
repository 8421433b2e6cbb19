"""What passes heals without a new process, and one module's trouble is no other's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import programs
import pytest
from keymgmt_pkcs11._cryptoki import CkMechanism
from pkcs11 import Attribute, Mechanism

from keymgmt.backend import Dek, KeyNotFound, ProviderUnavailable, UnwrapFailed

GENERAL_ERROR, FUNCTION_FAILED, DEVICE_REMOVED, VENDOR = 0x05, 0x06, 0x32, 0x80000042


@pytest.fixture
def key(faulty) -> str:
    with faulty.provider() as provider:
        try:
            provider.describe_key("healing")
        except KeyNotFound:
            provider.create_key("healing", "aes256", {})
    return "healing"


@pytest.mark.parametrize("code", [GENERAL_ERROR, FUNCTION_FAILED, DEVICE_REMOVED, VENDOR])
@pytest.mark.parametrize("calls", [("C_DecryptInit", "C_EncryptInit"), ("C_Decrypt", "C_Encrypt")])
def test_a_module_that_heals_by_c_finalize_alone(faulty, faults, key, code, calls):
    provider = faulty.provider()
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")
        for call in calls:
            faults.answer(call, code)
        faults.until_finalize()
        assert provider.unwrap(wrapped, b"c") == dek
        assert faults.calls("C_Finalize") == 1
        # A tampered blob still is one, and costs no restart.
        with pytest.raises(UnwrapFailed):
            provider.unwrap(wrapped, b"d")
        assert faults.calls("C_Finalize") == 1


def test_a_module_that_does_not_heal_is_not_finalised_for_ever(faulty, faults, key):
    provider = faulty.provider(timeout=2.0)
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")
        faults.answer("C_DecryptInit", FUNCTION_FAILED)
        faults.answer("C_EncryptInit", FUNCTION_FAILED)
        for _ in range(20):
            with pytest.raises(ProviderUnavailable):
                provider.unwrap(wrapped, b"c")
        assert faults.calls("C_Finalize") < 15
        faults.clear()
        assert provider.unwrap(wrapped, b"c") == dek


def test_a_module_that_the_application_initialised_is_not_finalised(faulty, faults, key):
    from keymgmt_pkcs11._module import open_module

    module = open_module(faulty.module, None)
    provider = faulty.provider(timeout=2.0)
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")
        module.ours = False
        try:
            faults.answer("C_DecryptInit", FUNCTION_FAILED)
            faults.answer("C_EncryptInit", FUNCTION_FAILED)
            with pytest.raises(ProviderUnavailable):
                provider.unwrap(wrapped, b"c")
            assert faults.calls("C_Finalize") == 0
            faults.clear()
            told = {f.name: f.detail for f in provider.check().findings}
            assert "the application initialised" in told["recovery"]
        finally:
            module.ours = True


@pytest.mark.parametrize("call", ["C_Initialize", "C_OpenSession", "C_Login", "C_DecryptInit"])
def test_a_hung_module_holds_no_other_up(faulty, faulty_copy, key, call):
    other, faults = faulty_copy()
    hung = other.provider(timeout=0.5)
    with Dek.generate() as dek:
        wrapped = faulty.provider().wrap(key, dek, b"c")
        healthy = faulty.provider(timeout=5.0)
        faults.hang(call)
        try:
            with pytest.raises(ProviderUnavailable):
                hung.unwrap(wrapped, b"c")
            begun: list[bool] = []
            thread = threading.Thread(
                target=lambda: begun.append(healthy.unwrap(wrapped, b"c") == dek)
            )
            thread.start()
            thread.join(5.0)
            assert begun == [True]
        finally:
            faults.hang(call, False)
            hung.close()


def test_an_odd_object_is_skipped_and_named(faulty, faults, key):
    provider = faulty.provider()

    def odd(session: Any) -> int:
        name = {Attribute.TOKEN: True, Attribute.LABEL: b"o" * 1500, Attribute.ID: b"\x01"}
        how = CkMechanism(Mechanism.AES_KEY_GEN)
        template = {**name, Attribute.VALUE_LEN: 32}
        return int(session.ck.generate(session.handle, how, template))

    handle = provider.connection.run("making a key", odd, changes=True)
    try:
        assert key in {info.key for info in provider.list_keys()}
        health = provider.check()
        told = {f.name: f.detail for f in health.findings}
        assert "LABEL is larger than" in told["unreadable objects"]
        assert f"key {key}" in told
    finally:
        provider.connection.run(
            "destroying it", lambda s: s.ck.destroy(s.handle, handle), changes=True
        )


def test_the_last_reason_is_told(faulty, faults):
    faults.answer("C_Login", 0x102, times=8)
    assert faulty.provider().list_keys() is not None
    faulty.made.pop().close()
    faults.answer("C_Login", 0x102, times=3)
    # The reason that was seen last, and not the first.
    faults.answer("C_OpenSession", DEVICE_REMOVED)
    with pytest.raises(ProviderUnavailable):
        faulty.provider(timeout=1.0).list_keys()


def test_doctor_does_not_send_people_to_doctor(faulty, faults, key):
    faults.answer("C_OpenSession", GENERAL_ERROR)
    provider = faulty.provider(timeout=0.5)
    with pytest.raises(ProviderUnavailable) as caught:
        provider.list_keys()
    assert "keymgmt doctor" in str(caught.value.hint)
    health = provider.check()
    assert not health.ok
    assert not [each for each in health.findings if "keymgmt doctor" in str(each.hint)]


def test_no_token_and_why(faulty, tmp_path):
    """A module whose own configuration shows none, and a slot that is not initialised."""
    empty = tmp_path / "empty"
    empty.mkdir()
    config = tmp_path / "softhsm2.conf"
    config.write_text(f"directories.tokendir = {empty}\nobjectstore.backend = file\n")
    (tmp_path / "keymgmt.toml").write_text(
        f'[providers.hsm]\nbackend = "pkcs11"\nmodule = "{faulty.module}"\ntoken = "Model Keys"\n'
        f'pin = {{ file = "{faulty.pin_file}" }}\n'
    )

    def run(*arguments: str) -> tuple[int, str]:
        done = programs.run_keymgmt(
            "-c",
            "keymgmt.toml",
            *arguments,
            cwd=tmp_path,
            env={**os.environ, "SOFTHSM2_CONF": str(config)},
        )
        return done.returncode, done.stdout + done.stderr

    code, said = run("doctor")
    assert code == 1, said
    assert "is not initialised" in said
    assert "SOFTHSM2_CONF" in said
    code, said = run("pkcs11", "slots", str(faulty.module))
    assert code == 0, said
    assert "SOFTHSM2_CONF" in said


def test_a_module_that_crashes_as_it_is_unloaded(faulty, key, tmp_path):
    (tmp_path / "keymgmt.toml").write_text(
        f'[providers.hsm]\nbackend = "pkcs11"\nmodule = "{faulty.module}"\n'
        f'token = "{faulty.label}"\npin = {{ file = "{faulty.pin_file}" }}\n'
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return programs.run(
            sys.executable, *arguments, cwd=tmp_path, env={**os.environ, "FAULT_CRASHES": "1"}
        )

    # So it really does crash.
    load = f"import ctypes; ctypes.CDLL({str(faulty.module)!r})"
    assert run("-c", load).returncode == -signal.SIGABRT
    command = ["-m", "keymgmt.cli", "-c", "keymgmt.toml", "keys"]
    done = run(*command, "list", "hsm")
    assert (done.returncode, done.stderr) == (0, "")
    assert key in done.stdout
    missing = run(*command, "show", "hsm:not-there")
    assert missing.returncode == 3, missing.stdout + missing.stderr
