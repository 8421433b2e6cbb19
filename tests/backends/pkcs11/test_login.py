"""A PIN is sent as rarely as can be, and by whom and how the config says."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from keymgmt_pkcs11 import _login
from keymgmt_pkcs11._cryptoki import CkMechanism
from keymgmt_pkcs11._settings import KeyEntry
from pkcs11 import Attribute, Mechanism

from keymgmt.backend import (
    AccessDenied,
    Dek,
    KeyNotFound,
    LockedOut,
    ProviderError,
    ProviderUnavailable,
    SecretSource,
    UnsupportedOperation,
)

DEVICE_REMOVED = 0x32


def another_pin(path: Path, pin: str) -> SecretSource:
    path.touch(0o600)
    path.write_text(pin)
    return SecretSource(file=path)


@pytest.fixture
def key(faulty) -> str:
    with faulty.provider() as provider:
        try:
            provider.describe_key("login")
        except KeyNotFound:
            provider.create_key("login", "aes256", {})
    return "login"


@pytest.mark.parametrize("code", [0x05, 0x06, 0x30, 0xE0, 0x80000123])
def test_a_pin_that_was_never_accepted_is_sent_once(faulty, faults, tmp_path, code):
    faults.answer("C_Login", code)
    pin = another_pin(tmp_path / "pin", f"never-seen-{code}")
    for provider in (faulty.provider(pin=pin), faulty.provider(pin=pin)):
        for _ in range(3):
            with pytest.raises(AccessDenied):
                provider.list_keys()
        assert not provider.check().ok
    assert faults.calls("C_Login") == 1
    assert faults.sessions == 0


@pytest.mark.parametrize("code", [0x190, 0xB0, 0xB3, 0xB1, 0x03, 0x102])
def test_a_pin_that_was_not_compared_is_sent_again(faulty, faults, tmp_path, code):
    faults.answer("C_Login", code, times=1)
    pin = another_pin(tmp_path / "pin", faulty.pin)
    provider = faulty.provider(pin=pin)
    if code == 0xB1:  # there is no session for one more, so this call is over
        with pytest.raises(ProviderUnavailable):
            provider.list_keys()
    assert provider.list_keys() is not None
    assert faults.calls("C_Login") == 2


def test_a_module_that_hides_a_wrong_pin(faulty, faults, tmp_path):
    faults.personality("ePass2003")
    provider = faulty.provider(pin=another_pin(tmp_path / "pin", "a-wrong-pin-0815"))
    for _ in range(3):
        with pytest.raises(AccessDenied):
            provider.list_keys()
    assert faults.calls("C_Login") == 1


def test_an_hsm_that_is_away_with_a_login_in_it_heals(faulty, faults, key, monkeypatch):
    monkeypatch.setattr(_login, "_PAUSES", (0.05,))
    provider = faulty.provider(timeout=3.0)
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")
        logins = faults.calls("C_Login")
        away = ("C_OpenSession", "C_DecryptInit", "C_Login", "C_GetSessionInfo")
        for call in away:
            faults.answer(call, DEVICE_REMOVED)
        for _ in range(3):
            with pytest.raises(ProviderError):
                provider.unwrap(wrapped, b"c")
        assert faults.calls("C_Login") == logins
        # It comes back, but the first login in it says neither yes nor no.
        for call in away:
            faults.answer(call, DEVICE_REMOVED, times=0)
        faults.answer("C_Login", 0x30, times=1)
        with pytest.raises(ProviderUnavailable):
            provider.unwrap(wrapped, b"c")
        assert faults.calls("C_Login") == logins + 1
        time.sleep(0.1)
        assert provider.unwrap(wrapped, b"c") == dek
        assert faults.calls("C_Login") == logins + 2


def test_no_second_pin_while_the_flags_say_that_one_was_wrong(faulty, faults, key):
    provider = faulty.provider()
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")
        logins = faults.calls("C_Login")
        faults.low()
        # The session, and with it the login, is lost.
        faults.answer("C_DecryptInit", 0x101, times=2)
        with pytest.raises(AccessDenied, match="after a loss none is sent"):
            provider.unwrap(wrapped, b"c")
        assert faults.calls("C_Login") == logins
        faults.locks()
        for number in range(2):
            with pytest.raises(AccessDenied):
                faulty.provider(pin=_wrong(faulty, number)).list_keys()
        with pytest.raises(LockedOut):
            provider.unwrap(wrapped, b"c")


def _wrong(faulty: Any, number: int) -> SecretSource:
    return another_pin(faulty.directory.parent.parent / f"wrong-{number}", f"wrong-{number}-0815")


def test_a_vendors_kind_of_user(faulty, faults, key):
    faults.personality("Luna FIPS")
    with pytest.raises(AccessDenied, match="no such kind of user"):
        faulty.provider(user_type=7).list_keys()
    provider = faulty.provider(user_type=0x80000001)
    assert key in {info.key for info in provider.list_keys()}


def test_a_write_protected_token_unwraps_signs_and_lists(faulty, faults, key):
    with faulty.provider() as writer:
        writer.create_key("protected-sign", "ecdsa-p256", {})
    faults.personality("write-protected")
    provider = faulty.provider()
    with Dek.generate() as dek:
        assert provider.unwrap(provider.wrap(key, dek, b"c"), b"c") == dek
    assert provider.sign("protected-sign", b"m").signature
    assert provider.list_keys()
    with pytest.raises(UnsupportedOperation, match="write-protected") as caught:
        provider.create_key("never", "aes256", {})
    assert "read_only" not in str(caught.value.hint)


def test_a_key_that_wants_the_pin_for_every_use(faulty, faults):
    usages = {Attribute.SIGN: True, Attribute.DECRYPT: False, Attribute.UNWRAP: False}
    name = {Attribute.TOKEN: True, Attribute.LABEL: b"each-time", Attribute.ID: b"\x01"}

    def make(session: Any) -> None:
        curve = {Attribute.EC_PARAMS: bytes.fromhex("06082a8648ce3d030107")}
        private = {**name, **usages, Attribute.PRIVATE: True, Attribute.ALWAYS_AUTHENTICATE: True}
        how = CkMechanism(Mechanism.EC_KEY_PAIR_GEN)
        session.ck.generate_pair(session.handle, how, {**name, **curve}, private)

    provider = faulty.provider()
    provider.connection.run("making a key", make, changes=True)
    before = faults.calls("C_Login")
    assert provider.sign("each-time", b"one").signature
    assert provider.sign("each-time", b"two").signature
    assert faults.calls("C_Login") == before + 2
    # At a pad: each time somebody has the time that a person needs.
    provider.close()
    faults.pad(faulty.pin)
    slow = faulty.provider(login="protected", pin=None, timeout=0.3)
    assert slow.list_keys()
    assert slow.sign("each-time", b"three").signature
    assert slow.sign("each-time", b"four").signature


def test_a_person_has_time(faulty, faults, key):
    with pytest.raises(UnsupportedOperation, match="no PIN pad"):
        faulty.provider(login="protected", pin=None).list_keys()
    # Of a pad: the time limit is for the calls, and not for the person.
    faults.pad(faulty.pin)
    provider = faulty.provider(login="protected", pin=None, timeout=0.3)
    assert key in {info.key for info in provider.list_keys()}


@pytest.mark.parametrize("typed", ["the PIN", "Ctrl-C"])
def test_the_pin_is_typed_and_an_interrupt_leaves_the_terminal_as_it_was(
    faulty, key, tmp_path, typed
):
    (tmp_path / "keymgmt.toml").write_text(
        f'[providers.hsm]\nbackend = "pkcs11"\nmodule = "{faulty.module}"\n'
        f'token = "{faulty.label}"\npin = {{ prompt = "PIN" }}\n'
    )
    ours, theirs = os.openpty()

    def echo() -> bool:
        return bool(termios.tcgetattr(theirs)[3] & termios.ECHO)

    with subprocess.Popen(
        [sys.executable, "-m", "keymgmt.cli", "-c", "keymgmt.toml", "keys", "list", "hsm"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:
        said = b""
        while not said.endswith(b"PIN: "):
            assert select.select([ours], [], [], 60)[0], said
            said += os.read(ours, 4096)
        assert not echo()
        os.write(ours, b"\x03" if typed == "Ctrl-C" else f"{faulty.pin}\n".encode())
        assert process.wait(60) == (130 if typed == "Ctrl-C" else 0)
    assert echo()
    os.close(ours)
    os.close(theirs)


def test_threads_that_want_a_pin_ask_for_it_once(faulty, key, monkeypatch):
    asked: list[str] = []

    def type_it(prompt: str) -> str:
        asked.append(threading.current_thread().name)
        time.sleep(0.5)
        return str(faulty.pin)

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", type_it)
    # The time limit is for the token, and not for who types.
    provider = faulty.provider(pin=SecretSource(prompt="PIN"), timeout=0.4)
    with ThreadPoolExecutor(6, "caller") as pool:
        found = list(pool.map(lambda _: {info.key for info in provider.list_keys()}, range(6)))
    assert all(key in each for each in found)
    assert len(asked) == 1
    assert asked[0].startswith("caller")


def test_what_is_absent_here_is_the_providers_failure(faulty, tmp_path):
    for settings in (
        {"pin": SecretSource(file=tmp_path / "nothing")},
        {"pin": SecretSource(env="KEYMGMT_NO_SUCH_PIN")},
        {"module": tmp_path / "nothing.so"},
        {"token": "nobody's"},
    ):
        with pytest.raises(ProviderUnavailable):
            faulty.provider(**settings).list_keys()


def test_new_keys_as_the_config_says(new_token):
    token = new_token()
    provider = token.provider(
        create={
            "modifiable": False,
            "allowed_mechanisms": True,
            "attributes": {"WRAP_WITH_TRUSTED": True},
        },
        keys={"pinned": KeyEntry(id="07")},
    )
    assert provider.create_key("pinned", "aes256", {}).newest == "07"
    provider.create_key("fixed", "ecdh-p256", {})
    provider.rotate_key("fixed")
    old = provider.describe_key("fixed").versions[0].version

    def look(session: Any) -> None:
        (handle,) = session.ck.find(session.handle, {Attribute.ID: b"\x07"})
        read = session.ck.read(session.handle, handle, Attribute.ALLOWED_MECHANISMS, 64)
        assert int.from_bytes(read, "little") == Mechanism.AES_GCM
        assert any(session.ck.read(session.handle, handle, Attribute.WRAP_WITH_TRUSTED, 1))
        assert not any(session.ck.read(session.handle, handle, Attribute.MODIFIABLE, 1))

    provider.connection.run("looking", look)
    with pytest.raises(UnsupportedOperation):
        provider.retire_version("fixed", old)
    assert provider.describe_key("fixed").versions[0].state == "old"
    provider.close()
