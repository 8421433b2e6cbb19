"""The provider in memory keeps the whole contract, faults included."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from keymgmt.testing import Hook, ProviderContract, ProviderFactory
from keymgmt.testing.fakes import MemoryProvider, MemoryService, MemorySettings

NUMBERS = itertools.count()


class TestMemoryProvider(ProviderContract):
    @pytest.fixture
    def service(self) -> Iterator[MemoryService]:
        service = MemoryService.find(f"service-{next(NUMBERS)}")
        yield service
        service.answering = True

    @pytest.fixture
    def provider_factory(self, service: MemoryService) -> ProviderFactory:
        settings = MemorySettings(service=service.name, keys=["kit"], timeout=0.3)
        return lambda: MemoryProvider("memory", settings)

    @pytest.fixture
    def wrap_key(self) -> str:
        return "kit"

    @pytest.fixture
    def time_limit(self) -> float:
        return 0.3

    @pytest.fixture
    def break_service(self, service: MemoryService) -> Hook:
        return lambda: setattr(service, "up", False)

    @pytest.fixture
    def hang_service(self, service: MemoryService) -> Hook:
        return lambda: setattr(service, "answering", False)

    @pytest.fixture
    def heal_service(self, service: MemoryService) -> Hook:
        def heal() -> None:
            service.up = True
            service.answering = True

        return heal

    @pytest.fixture
    def expire_login(self, service: MemoryService) -> Hook:
        return lambda: setattr(service, "epoch", service.epoch + 1)

    @pytest.fixture
    def denied_factory(self, service: MemoryService) -> ProviderFactory:
        service.denied.add("nobody")
        settings = MemorySettings(service=service.name, user="nobody", timeout=0.3)
        return lambda: MemoryProvider("memory", settings)
