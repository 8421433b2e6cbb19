"""What keymgmt.backend offers to every backend for its checks."""

from __future__ import annotations

from typing import Any

import pytest

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    Dek,
    Fault,
    FaultTable,
    Finding,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    check_backend,
    check_mechanism,
    check_options,
    try_key,
)
from keymgmt.testing.fakes import MemoryProvider, MemoryService, MemorySettings

pytestmark = pytest.mark.once


@pytest.fixture
def provider() -> MemoryProvider:
    made = MemoryProvider("here", MemorySettings(service="checks", keys=["model"]))
    MemoryService.find("checks").keys.clear()
    return made


def test_a_key_is_tried(provider, monkeypatch):
    provider.create_key("publisher", "ed25519", {})
    try_key(provider, "model")
    try_key(provider, "publisher", "sign")
    with pytest.raises(UnsupportedOperation):
        try_key(provider, "model", "sign")

    def another(*_: Any) -> Dek:
        return Dek(bytes(32))

    monkeypatch.setattr(provider, "unwrap", another)
    with pytest.raises(UnwrapFailed, match="does not unwrap what it wrapped"):
        try_key(provider, "model")


def test_a_right_that_a_machine_may_lack_is_no_failure():
    denied = AccessDenied("denied", hint="grant it")
    assert Finding.failure("key", denied) == Finding("key", "failed", "denied", "grant it")
    assert Finding.failure("key", denied, may_lack=True).status == "skipped"
    gone = ProviderUnavailable("gone")
    assert Finding.failure("key", gone, may_lack=True).status == "failed"


def test_what_is_of_another_backend_or_names_no_key_is_refused():
    wrapped = WrappedKey("vault", "model", "1", "m", b"x")
    check_backend(wrapped, "vault")
    with pytest.raises(WrongKey, match="another backend"):
        check_backend(wrapped, "aws")
    object.__setattr__(wrapped, "key", "../x")
    with pytest.raises(WrongKey, match="names no key"):
        check_backend(wrapped, "vault")


def test_a_mechanism_is_allowed_or_its_error_says_where():
    wrapped = WrappedKey("vault", "model", "1", "m", b"x")
    check_mechanism(wrapped, ["m"], ["m", "n"], "site")
    with pytest.raises(UnsupportedOperation) as caught:
        check_mechanism(wrapped, ["n"], ["m", "n"], "site")
    assert "providers.site.keys.model" in str(caught.value.hint)
    with pytest.raises(UnsupportedOperation, match="unknown mechanism") as caught:
        check_mechanism(wrapped, ["n"], ["n"], "site")
    assert "known: n" in str(caught.value.hint)


def test_an_option_that_is_not_known_is_refused():
    check_options({"bits": "2048"}, {"bits": "3072"}, "pkcs11")
    with pytest.raises(ConfigError, match="knows no option 'size'") as caught:
        check_options({"size": "1"}, {"bits": "3072"}, "pkcs11")
    assert caught.value.hint == "it takes: bits=3072"
    with pytest.raises(ConfigError) as caught:
        check_options({"size": "1"}, {}, "file")
    assert caught.value.hint == "it takes: none"


def test_a_fault_says_whether_it_passes():
    table = FaultTable[str](
        {"busy": Fault(ProviderUnavailable, "it is busy", passing=True)},
        unknown=Fault(ProviderUnavailable, "it failed"),
    )
    assert table.error("busy", "asking").passing
    assert not table.error("else", "asking").passing
    assert not AccessDenied("no").passing
