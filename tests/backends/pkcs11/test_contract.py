"""The whole provider contract on SoftHSM2 and on NSS softokn."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from patience import PatientContract

from keymgmt.backend import KeyNotFound, ProviderUnavailable
from keymgmt.testing import Hook, ProviderFactory

DEVICE_REMOVED = 0x32


def log_everybody_out(provider: Any) -> None:
    """What a token does when its user logs out elsewhere in the process."""

    def call(session: Any) -> None:
        logout = ctypes.CDLL(session.module.path)
        table = ctypes.c_void_p()
        assert logout.C_GetFunctionList(ctypes.byref(table)) == 0
        entry = (ctypes.c_void_p * 20).from_address(table.value + ctypes.sizeof(table))[19]
        assert ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong)(entry)(session.handle) == 0

    provider.connection.run("logging out", call)


def until(call: Callable[[], object], seconds: float = 20.0) -> None:
    """Call until the token is there again."""
    end = time.monotonic() + seconds
    while True:
        try:
            call()
        except ProviderUnavailable:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


def key_of_kind(token: Any, kind: str) -> str:
    """The token's key for these tests, made by whoever comes first."""
    with token.provider(allow_oaep_sha1=True) as provider:
        try:
            provider.describe_key(f"kit-{kind}")
        except KeyNotFound:
            provider.create_key(f"kit-{kind}", kind, {})
    return f"kit-{kind}"


class Pkcs11Contract(PatientContract):
    """What both modules share."""

    kind = "aes256"

    @pytest.fixture
    def token(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def provider_factory(self, token, time_limit) -> ProviderFactory:
        return lambda: token.provider(timeout=time_limit, allow_oaep_sha1=True)

    @pytest.fixture
    def wrap_key(self, token) -> str:
        return key_of_kind(token, self.kind)

    @pytest.fixture
    def recipient_key(self, token) -> str:
        return key_of_kind(token, "ecdh-p384" if self.kind == "aes256" else self.kind)

    @pytest.fixture
    def secret_values(self, token) -> Sequence[bytes]:
        return [token.pin.encode()]

    @pytest.fixture
    def place_values(self, token) -> Sequence[str]:
        return [str(token.module), token.label, str(token.directory)]

    @pytest.fixture
    def expire_login(self, token) -> Hook:
        other = token.provider()
        return lambda: log_everybody_out(other)


class TestSoftHsm(Pkcs11Contract):
    """AES-GCM inside SoftHSM; the service breaks when its token directory is moved away."""

    @pytest.fixture
    def token(self, softhsm_token) -> Any:
        return softhsm_token

    @pytest.fixture
    def _away(self, token, tmp_path) -> Path:
        return tmp_path / "away"

    @pytest.fixture
    def break_service(self, token, _away) -> Hook:
        return lambda: token.directory.rename(_away) and None

    @pytest.fixture
    def heal_service(self, token, _away) -> Hook:
        def heal() -> None:
            if _away.exists():
                _away.rename(token.directory)
            with token.provider() as provider:
                until(provider.list_keys)

        return heal

    @pytest.fixture
    def denied_factory(self, new_token, token, tmp_path) -> ProviderFactory:
        # A login is the process's, so the one that is refused needs a token of its own.
        other = new_token()
        wrong = tmp_path / "wrong-pin"
        wrong.touch(0o600)
        wrong.write_text("wrong-pin-1234")
        other.pin_file = wrong
        return lambda: other.provider()


class TestNss(Pkcs11Contract):
    """AES-GCM inside NSS softokn, behind a module that fails on request."""

    used = ("C_OpenSession", "C_FindObjectsInit", "C_DecryptInit", "C_EncryptInit")

    @pytest.fixture
    def token(self, nss_token) -> Any:
        return nss_token

    @pytest.fixture
    def break_service(self, nss_faults) -> Hook:
        return lambda: [nss_faults.answer(call, DEVICE_REMOVED) for call in self.used] and None

    @pytest.fixture
    def hang_service(self, nss_faults) -> Hook:
        return lambda: [nss_faults.hang(call) for call in self.used] and None

    @pytest.fixture
    def heal_service(self, nss_faults) -> Hook:
        return nss_faults.clear  # type: ignore[no-any-return]


class TestSoftHsmEcdh(TestSoftHsm):
    """HPKE by ECDH1_DERIVE, which also exports recipients."""

    kind = "ecdh-p256"


class TestNssRsa(TestNss):
    """RSA-OAEP with SHA-256."""

    kind = "rsa-oaep"
