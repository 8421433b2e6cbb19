"""The TPM backend does what every provider must do, on swtpm."""

from __future__ import annotations

import pytest
from keymgmt_tpm2 import Tpm2Provider
from keymgmt_tpm2.policy._anchor import create_anchor
from patience import PatientContract

from keymgmt.backend import SecretSource


class TestTpm2(PatientContract):
    @pytest.fixture
    def settings(self, swtpm, set_up):
        settings = set_up(swtpm, timeout=20.0)
        with Tpm2Provider("tpm", settings) as provider:
            name = create_anchor(provider.service, None).name
        return settings.model_copy(update={"anchor": name.hex()})

    @pytest.fixture
    def provider_factory(self, settings, time_limit):
        limited = settings.model_copy(update={"timeout": time_limit})
        return lambda: Tpm2Provider("tpm", limited)

    @pytest.fixture
    def wrap_key(self, settings):
        with Tpm2Provider("tpm", settings) as provider:
            return provider.create_key("kit", "ecc-p256", {}).key

    @pytest.fixture
    def break_service(self, swtpm):
        return swtpm.kill

    @pytest.fixture
    def hang_service(self, swtpm):
        return swtpm.hang

    @pytest.fixture
    def heal_service(self, swtpm):
        return swtpm.resume

    @pytest.fixture
    def expire_login(self, swtpm):
        return swtpm.restart

    @pytest.fixture
    def wraps_offline(self):
        return True


class TestTpm2WithPin(TestTpm2):
    """The same with a PIN; another PIN is a login that is refused."""

    @pytest.fixture
    def settings(self, swtpm, set_up, pin_file):
        return set_up(swtpm, timeout=20.0, pin={"file": pin_file})

    @pytest.fixture
    def wrap_key(self, settings):
        with Tpm2Provider("tpm", settings) as provider:
            return provider.create_key("kit", "ecc-p256", {"pin": "yes"}).key

    @pytest.fixture
    def denied_factory(self, settings, tmp_path):
        path = tmp_path / "wrong"
        path.write_text("wrong-pin-45")
        path.chmod(0o600)
        wrong = settings.model_copy(update={"pin": SecretSource(file=path)})
        return lambda: Tpm2Provider("tpm", wrong)

    @pytest.fixture
    def secret_values(self):
        return (b"correct-pin-71", b"wrong-pin-45")


class TestTpm2Rsa(TestTpm2):
    """The same with RSA-OAEP, for chips without ECDH."""

    @pytest.fixture
    def wrap_key(self, settings):
        with Tpm2Provider("tpm", settings) as provider:
            return provider.create_key("kit", "rsa-2048", {}).key

    @pytest.fixture
    def other_wrap_key(self, settings):
        with Tpm2Provider("tpm", settings) as provider:
            return provider.create_key("kit2", "rsa-2048", {}).key
