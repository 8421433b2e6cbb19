"""The site's plugin: the contract, then what is particular to KMIP."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from kmip.core import enums

import keymgmt
from keymgmt.backend import (
    Dek,
    KeyNotFound,
    KeyRetired,
    ProviderUnavailable,
    WrongKey,
)
from keymgmt.testing import Hook, ProviderContract, ProviderFactory


class TestContract(ProviderContract):
    @pytest.fixture
    def provider_factory(self, hsm: Any, time_limit: float) -> ProviderFactory:
        return lambda: hsm.provider(timeout=time_limit)

    @pytest.fixture
    def wrap_key(self) -> str:
        return "kit"

    @pytest.fixture
    def other_wrap_key(self) -> str:
        return "other"

    @pytest.fixture
    def time_limit(self, request: pytest.FixtureRequest) -> float:
        """Short where the service is gone or hangs, long where it works on a busy machine."""
        return 3.0 if {"hang_service", "break_service"} & set(request.fixturenames) else 20.0

    @pytest.fixture
    def break_service(self, hsm: Any) -> Hook:
        return lambda: hsm.stop()

    @pytest.fixture
    def hang_service(self, hsm: Any) -> Hook:
        return lambda: hsm.hang()

    @pytest.fixture
    def heal_service(self, hsm: Any) -> Hook:
        return lambda: hsm.start()

    @pytest.fixture
    def denied_factory(self, hsm: Any, tmp_path: Path) -> ProviderFactory:
        stranger = type(hsm.authority)(tmp_path, "strange-ca").issue("line8")
        return lambda: hsm.provider(certificate=stranger[0], private_key=stranger[1])


def test_another_object_of_the_name_is_a_new_version(hsm: Any) -> None:
    first = hsm.make_key("rotated")
    with hsm.provider() as provider, Dek.generate() as dek:
        old = provider.wrap("rotated", dek, b"c")
        second = hsm.make_key("rotated")
        new = provider.wrap("rotated", dek, b"c")
        assert (old.version, new.version) == (first, second)
        assert provider.unwrap(old, b"c") == provider.unwrap(new, b"c") == dek
        hsm.revoke(first)
        with pytest.raises(KeyRetired):
            provider.unwrap(old, b"c")
        assert provider.unwrap(new, b"c") == dek
        hsm.revoke(second)
        with pytest.raises(KeyRetired):
            provider.wrap("rotated", dek, b"c")


def test_an_identifier_of_another_key_is_not_used(hsm: Any) -> None:
    with hsm.provider() as provider, Dek.generate() as dek:
        wrapped = provider.wrap("kit", dek, b"c")
        with pytest.raises(WrongKey):
            provider.unwrap(replace(wrapped, key="other"), b"c")


def test_a_key_may_have_another_name_in_the_hsm(hsm: Any) -> None:
    hsm.make_key("ACME Line 7 / KEK")
    with hsm.provider(keys={"line7": "ACME Line 7 / KEK"}) as provider, Dek.generate() as dek:
        wrapped = provider.wrap("line7", dek, b"c")
        assert wrapped.key == "line7"
        assert provider.unwrap(wrapped, b"c") == dek


def test_a_key_that_was_never_activated_does_not_wrap(hsm: Any) -> None:
    with hsm.console() as console:
        console.create(enums.CryptographicAlgorithm.AES, 256, name="sleeping")
    with hsm.provider() as provider, Dek.generate() as dek, pytest.raises(KeyRetired):
        provider.wrap("sleeping", dek, b"c")


def test_a_short_key_is_not_found(hsm: Any) -> None:
    with hsm.console() as console:
        console.activate(console.create(enums.CryptographicAlgorithm.AES, 128, name="short"))
    with hsm.provider() as provider, Dek.generate() as dek, pytest.raises(KeyNotFound):
        provider.wrap("short", dek, b"c")


def test_a_server_with_another_name_or_authority_is_refused(hsm: Any, tmp_path: Path) -> None:
    stranger = type(hsm.authority)(tmp_path, "strange-ca")
    # "127.1" is the same address under a name that is not in the certificate.
    for other in ({"ca_file": stranger.file}, {"host": "127.1"}):
        refused = pytest.raises(ProviderUnavailable, match="vouches")
        with hsm.provider(**other) as provider, Dek.generate() as dek, refused:
            provider.wrap("kit", dek, b"c")


def test_a_private_key_that_others_can_read_or_that_is_gone_is_refused(
    hsm: Any, tmp_path: Path
) -> None:
    certificate, private = type(hsm.authority)(tmp_path, "ca").issue("open")
    private.chmod(0o644)
    settings = {"certificate": certificate, "private_key": private}
    with hsm.provider(**settings) as provider, Dek.generate() as dek:
        assert not provider.check().ok
        with pytest.raises(ProviderUnavailable, match="others can use it"):
            provider.wrap("kit", dek, b"c")
        private.unlink()
        with pytest.raises(ProviderUnavailable, match="cannot look at the private key"):
            provider.wrap("kit", dek, b"c")


def test_it_is_chosen_by_config_alone(hsm: Any, tmp_path: Path) -> None:
    """An application that never heard of this plugin uses it, and a model goes through it."""
    (entry,) = entry_points(group="keymgmt.backends", name="acme-hsm")
    assert entry.dist is not None
    assert entry.dist.name == "acme-keymgmt-hsm"
    settings = hsm.settings()
    config = tmp_path / "keymgmt.toml"
    config.write_text(
        f"""
        [providers.site]
        backend = "acme-hsm"
        distribution = "acme-keymgmt-hsm"
        host = "localhost"
        port = {settings.port}
        ca_file = "{settings.ca_file}"
        certificate = "{settings.certificate}"
        private_key = "{settings.private_key}"

        [policy]
        require_signature = false
        """
    )
    config.chmod(0o600)
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights.bin").write_bytes(bytes(range(256)) * 64)
    keymgmt.seal(source, tmp_path / "m.sealed", to=["site:kit"], keys=config, name="m")
    with keymgmt.open(tmp_path / "m.sealed", keys=config) as model:
        assert model.read("weights.bin") == bytes(range(256)) * 64
