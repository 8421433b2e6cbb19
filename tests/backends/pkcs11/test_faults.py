"""Bad days of a token: what goes wrong, by which error it is told, and what works afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from forks import in_child
from waiting import until

from keymgmt.backend import (
    AccessDenied,
    Dek,
    KeymgmtError,
    KeyNotFound,
    LockedOut,
    ProviderUnavailable,
    SecretSource,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)
from keymgmt.testing import Hook, ProviderFactory
from keymgmt.testing._faults import FaultChecks

GENERAL_ERROR, DEVICE_REMOVED, MECHANISM_INVALID, CANT_LOCK = 0x05, 0x32, 0x70, 0x0A


@pytest.fixture
def key(faulty) -> str:
    with faulty.provider() as provider:
        try:
            provider.describe_key("fault")
        except KeyNotFound:
            provider.create_key("fault", "aes256", {})
    return "fault"


def wrong_pin(path: Path, pin: str = "not-the-pin-99") -> SecretSource:
    path.touch(0o600)
    path.write_text(pin)
    return SecretSource(file=path)


class TestHungOrGone(FaultChecks):
    """The kit's checks of a service that hangs, breaks and comes back."""

    @pytest.fixture
    def provider_factory(self, faulty) -> ProviderFactory:
        return lambda: faulty.provider(timeout=1.5)

    @pytest.fixture
    def wrap_key(self, key) -> str:
        return key

    @pytest.fixture
    def time_limit(self) -> float:
        return 1.5

    @pytest.fixture
    def hang_service(self, faults) -> Hook:
        def hang() -> None:
            for call in ("C_OpenSession", "C_DecryptInit", "C_EncryptInit"):
                faults.hang(call)

        return hang

    @pytest.fixture
    def break_service(self, faults) -> Hook:
        def unplug() -> None:
            for call in ("C_OpenSession", "C_DecryptInit", "C_EncryptInit"):
                faults.answer(call, DEVICE_REMOVED)

        return unplug

    @pytest.fixture
    def heal_service(self, faults) -> Hook:
        return faults.clear  # type: ignore[no-any-return]


def test_a_wrong_pin_is_tried_once(faulty, faults, tmp_path):
    settings = {"pin": wrong_pin(tmp_path / "pin"), "sessions": 8}
    providers = [faulty.provider(**settings) for _ in range(3)]
    errors: list[KeymgmtError] = []

    def work(provider: Any) -> None:
        with pytest.raises(AccessDenied) as caught:
            provider.list_keys()
        errors.append(caught.value)

    threads = [threading.Thread(target=work, args=(p,)) for p in providers for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 12
    assert faults.calls("C_Login") == 1
    assert sum("not sent again" in str(error) for error in errors) == 11
    assert faults.sessions == 0

    def again() -> None:
        with pytest.raises(AccessDenied):
            faulty.provider(**settings).list_keys()
        assert faults.calls("C_Login") == 1

    in_child(again)
    # The right PIN from its own source is not held against.
    assert faulty.provider().list_keys() is not None


def test_the_pin_is_in_no_error(faulty, tmp_path):
    with pytest.raises(AccessDenied) as caught:
        faulty.provider(pin=wrong_pin(tmp_path / "pin", "secret-pin-4711")).list_keys()
    chain: BaseException | None = caught.value
    while chain is not None:
        assert "4711" not in repr(chain)
        chain = chain.__cause__ or chain.__context__


def test_a_locked_pin(faulty, faults, tmp_path):
    faults.locks()
    for number in range(2):
        with pytest.raises(AccessDenied, match="PIN is wrong"):
            faulty.provider(pin=wrong_pin(tmp_path / f"{number}", f"wrong-{number}")).list_keys()
    # One try is left, and no program takes it.
    with pytest.raises(LockedOut, match="next wrong PIN locks"):
        faulty.provider().list_keys()
    assert faults.calls("C_Login") == 2
    findings = {f.name: f for f in faulty.provider().check().findings}
    assert findings["PIN"].status == "failed"
    assert "next wrong PIN" in findings["PIN"].detail


def test_a_pin_that_locks_meanwhile(faulty, faults):
    faults.answer("C_Login", 0xA4)
    with pytest.raises(LockedOut, match="locked") as caught:
        faulty.provider().list_keys()
    assert "SO PIN" in str(caught.value.hint)


def test_a_hung_call_costs_no_more_than_its_session(faulty, faults, key):
    provider = faulty.provider(timeout=0.5, sessions=3)
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")
        faults.hang("C_Decrypt")
        before = threading.active_count()
        for _ in range(5):
            with pytest.raises(ProviderUnavailable):
                provider.unwrap(wrapped, b"c")
        assert faults.sessions <= 3
        assert threading.active_count() <= before + 3
        faults.hang("C_Decrypt", False)
        until(lambda: _works(provider, wrapped))
        provider.close()
    until(lambda: faults.sessions == 0)


def _works(provider: Any, wrapped: Any) -> bool:
    try:
        provider.unwrap(wrapped, b"c").wipe()
    except ProviderUnavailable:
        return False
    return True


def test_an_interrupt_in_the_middle_of_a_call(faulty, faults, key):
    provider = faulty.provider(timeout=30.0, sessions=1)
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")
        faults.hang("C_Decrypt")

        def interrupt() -> None:
            until(lambda: faults.calls("C_Decrypt") > calls)
            os.kill(os.getpid(), signal.SIGINT)

        calls = faults.calls("C_Decrypt")
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            provider.unwrap(wrapped, b"c")
        thread.join()
        faults.hang("C_Decrypt", False)
        # The only session comes back to the pool when its call is done.
        assert provider.unwrap(wrapped, b"c") == dek
        assert faults.sessions == 1


def test_the_session_limit_of_the_token(faulty, faults, key):
    provider = faulty.provider(sessions=8)
    faults.limit(2)
    failures: list[str] = []
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")

        def work() -> None:
            for _ in range(20):
                try:
                    if provider.unwrap(wrapped, b"c") != dek:
                        failures.append("wrong")
                except KeymgmtError as error:
                    failures.append(repr(error))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert faults.sessions <= 2
    provider.close()
    faults.limit(0)
    with pytest.raises(ProviderUnavailable, match="no free session"):
        faulty.provider().list_keys()


def test_a_mechanism_that_is_listed_and_refused(faulty, faults, key):
    faults.answer("C_EncryptInit", MECHANISM_INVALID)
    provider = faulty.provider()
    with Dek.generate() as dek:
        with pytest.raises(UnsupportedOperation, match="AES-GCM: CKR_MECHANISM_INVALID"):
            provider.wrap(key, dek, b"c")
        assert not provider.check(key).ok
        with pytest.raises(UnsupportedOperation):
            provider.create_key("never", "aes256", {})
        with pytest.raises(KeyNotFound):
            provider.describe_key("never")
        # What works is still offered: the other mechanism of the same token.
        assert "aes256-kw" in provider.create_key("wrapping", "aes256-kw", {}).kind


def test_a_token_in_trouble_is_not_a_tampered_blob(faulty, faults, key):
    provider = faulty.provider()
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")
        with pytest.raises(UnwrapFailed):
            provider.unwrap(wrapped, b"d")
        faults.answer("C_Decrypt", GENERAL_ERROR)
        with pytest.raises(ProviderUnavailable):
            provider.unwrap(wrapped, b"c")
        # Once is survived: the connection is made anew and the call repeated.
        faults.answer("C_Decrypt", DEVICE_REMOVED, times=1)
        assert provider.unwrap(wrapped, b"c") == dek


def test_a_token_that_makes_its_own_iv(faulty, faults, key):
    faults.personality("own iv")
    provider = faulty.provider()
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")
        assert provider.unwrap(wrapped, b"c") == dek


def test_a_module_that_cannot_lock(faulty, faults, key):
    from keymgmt_pkcs11._module import open_module

    module = open_module(faulty.module, None)
    faults.answer("C_Initialize", CANT_LOCK, times=1)
    module.in_vain = 0
    assert module.restart(module.generation)
    try:
        assert not module.locking
        provider = faulty.provider()
        failures: list[str] = []
        with Dek.generate() as dek:
            wrapped = provider.wrap(key, dek, b"c")

            def work() -> None:
                for _ in range(20):
                    if provider.unwrap(wrapped, b"c") != dek:
                        failures.append("wrong")

            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not failures
        threads_finding = next(f for f in provider.check(key).findings if f.name == "threads")
        assert threads_finding.status == "warning"
    finally:
        module.locking = True
        module.in_vain = 0
        assert module.restart(module.generation)


def test_a_fork_does_not_wait_for_a_hung_call(faulty, faults, key):
    provider = faulty.provider(timeout=2.0)
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"c")
        faults.hang("C_Decrypt")
        with pytest.raises(ProviderUnavailable):
            provider.unwrap(wrapped, b"c")

        def use() -> None:
            faults.clear()
            assert provider.unwrap(wrapped, b"c") == dek

        in_child(use)


def test_missing_module_and_other_libraries(softhsm_token, tmp_path, require_tool):
    missing = tmp_path / "libmissing.so"
    with pytest.raises(ProviderUnavailable, match="no PKCS#11 module at"):
        softhsm_token.provider(module=missing).list_keys()
    text = tmp_path / "libtext.so"
    text.write_text("not a library")
    with pytest.raises(ProviderUnavailable, match="cannot load"):
        softhsm_token.provider(module=text).list_keys()
    other = require_tool(
        "/usr/lib/x86_64-linux-gnu/libz.so.1", "/usr/lib/aarch64-linux-gnu/libz.so.1"
    )
    with pytest.raises(
        ProviderUnavailable, match="not a PKCS#11 module: it gives no function list"
    ):
        softhsm_token.provider(module=other).list_keys()
    assert not softhsm_token.provider(module=missing).check().ok


def test_no_such_token_or_key(softhsm_token):
    with pytest.raises(ProviderUnavailable, match="no token is") as caught:
        softhsm_token.provider(token="nobody's").list_keys()
    assert "'shared'" in str(caught.value.hint)
    with Dek.generate() as dek, pytest.raises(KeyNotFound):
        softhsm_token.provider().wrap("nothing", dek, b"")


def test_two_tokens_of_one_label(new_token):
    first, second = new_token("twin"), new_token("twin")
    with pytest.raises(ProviderUnavailable, match="2 tokens are") as caught:
        first.provider().list_keys()
    message = str(caught.value)
    serials = [part.split()[0] for part in message.split("serial ")[1:]]
    assert len(set(serials)) == 2
    assert "serial" in str(caught.value.hint)
    made = set()
    for serial in serials:
        provider = second.provider(serial=serial)
        made.add(provider.create_key("only-here", "aes256", {}).newest)
        assert len(provider.list_keys()) == 1
        provider.close()
    assert len(made) == 2
    uri = f"pkcs11:token=twin;serial={serials[0]}"
    assert len(second.provider(token=None, uri=uri).list_keys()) == 1


def test_a_token_that_is_initialised_anew(new_token):
    token = new_token("again")
    provider = token.provider()
    provider.create_key("k", "aes256", {})
    with Dek.generate() as dek:
        wrapped = provider.wrap("k", dek, b"c")
        assert provider.unwrap(wrapped, b"c") == dek
        shutil.rmtree(token.directory)
        with pytest.raises(ProviderUnavailable):
            provider.unwrap(wrapped, b"c")
        subprocess.run(
            [
                *("softhsm2-util", "--init-token", "--free", "--label", "again"),
                *("--pin", token.pin, "--so-pin", "another-so-pin"),
            ],
            check=True,
            capture_output=True,
        )

        def gone() -> bool:
            try:
                provider.unwrap(wrapped, b"c")
            except ProviderUnavailable:
                return False
            except WrongKey:
                return True
            raise AssertionError("a key of a token that is no more")

        until(gone)
        provider.create_key("k", "aes256", {})
        assert provider.unwrap(provider.wrap("k", dek, b"c"), b"c") == dek
        with pytest.raises(WrongKey):
            provider.unwrap(wrapped, b"c")


def test_a_key_destroyed_between_wrap_and_unwrap(new_token):
    token = new_token()
    provider = token.provider()
    for name in ("k", "other"):
        provider.create_key(name, "aes256", {})
    with Dek.generate() as dek:
        wrapped, other = provider.wrap("k", dek, b"c"), provider.wrap("other", dek, b"c")
        assert provider.unwrap(wrapped, b"c") == dek
        token.tool("--delete-object", "--type", "secrkey", "--label", "k")
        for _ in range(2):
            with pytest.raises(WrongKey, match="no key label 'k'"):
                provider.unwrap(wrapped, b"c")
        with pytest.raises(KeyNotFound):
            provider.wrap("k", dek, b"c")
        assert provider.unwrap(other, b"c") == dek


def test_two_modules_in_one_process(softhsm_token, nss_token):
    providers = [softhsm_token.provider(), nss_token.provider()]
    for provider in providers:
        try:
            provider.create_key("both", "aes256", {})
        except KeymgmtError:
            assert provider.describe_key("both")
    failures: list[str] = []

    def work(provider: Any, other: Any) -> None:
        with Dek.generate() as dek:
            for _ in range(20):
                wrapped = provider.wrap("both", dek, b"c")
                if provider.unwrap(wrapped, b"c") != dek:
                    failures.append("wrong")
                try:
                    other.unwrap(wrapped, b"c")
                    failures.append("the other token opened it")
                except WrongKey:
                    pass

    threads = [
        threading.Thread(target=work, args=(p, q))
        for p, q in (providers, providers[::-1])
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_two_init_args_for_one_module(nss_token):
    from keymgmt.backend import ConfigError

    assert nss_token.provider().list_keys() is not None
    with pytest.raises(ConfigError, match="other init_args"):
        nss_token.provider(init_args="configdir='sql:elsewhere'").list_keys()


def test_a_provider_that_may_only_read(softhsm_token):
    provider = softhsm_token.provider(read_only=True)
    assert provider.list_keys() is not None
    for call in (
        lambda: provider.create_key("new", "aes256", {}),
        lambda: provider.rotate_key("new"),
        lambda: provider.retire_version("new", "00"),
    ):
        with pytest.raises(UnsupportedOperation, match="read-only"):
            call()
