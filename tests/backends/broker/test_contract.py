"""BrokerProvider keeps the contract of every provider, with a real service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from patience import PatientContract

pytest.importorskip("keymgmt_broker_service")

from keymgmt.testing import Hook, ProviderFactory


class TestBroker(PatientContract):
    """One instance with two workers, and HPKE keys of a file provider behind it."""

    @pytest.fixture
    def instance(self, shared_service) -> Iterator[Any]:
        yield shared_service
        shared_service.heal()

    @pytest.fixture
    def provider_factory(self, instance, client, time_limit) -> ProviderFactory:
        return lambda: client(instance.address, timeout=time_limit)

    @pytest.fixture
    def denied_factory(self, instance, client) -> ProviderFactory:
        return lambda: client(instance.address, evidence={"kind": "sgx", "proves": "nothing"})

    @pytest.fixture
    def other_wrap_key(self) -> str:
        return "other"

    @pytest.fixture
    def wraps_offline(self) -> bool:
        return True

    test_spawn = None  # the evidence is made in this process: see test_end_to_end

    @pytest.fixture
    def break_service(self, instance) -> Hook:
        return instance.kill

    @pytest.fixture
    def hang_service(self, instance) -> Hook:
        return instance.freeze

    @pytest.fixture
    def heal_service(self, instance) -> Hook:
        return instance.heal

    @pytest.fixture
    def place_values(self, instance) -> list[str]:
        return [str(instance.port), "127.0.0.1"]
