"""The contract of a provider in memory, with every hook."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest

from keymgmt.testing import Hook, ProviderContract, ProviderFactory
from keymgmt.testing.fakes import MemoryProvider, MemoryService

NUMBERS = itertools.count()
TOKEN = b"token-of-the-broken-provider"


@pytest.fixture(scope="session")
def contract() -> Callable[..., type[ProviderContract]]:
    """Make the contract class of a kind of provider; its secret is ``token-of-...``."""
    return make_contract


def make_contract(kind: type[MemoryProvider], *, spawn: bool = False) -> type[ProviderContract]:
    class Contract(ProviderContract):
        grace = 2.0
        patience = 8.0

        @pytest.fixture
        def lives_in_this_process(self) -> bool:
            return not spawn

        @pytest.fixture
        def service(self) -> Iterator[MemoryService]:
            service = MemoryService.find(f"broken-{next(NUMBERS)}")
            yield service
            service.answering = True

        @pytest.fixture
        def provider_factory(self, service: MemoryService) -> ProviderFactory:
            settings = kind.Settings(service=service.name, keys=["kit"], timeout=0.1)
            return lambda: kind("memory", settings)

        @pytest.fixture
        def wrap_key(self) -> str:
            return "kit"

        @pytest.fixture
        def time_limit(self) -> float:
            return 0.2

        @pytest.fixture
        def recovery_time(self) -> float:
            return 0.2

        @pytest.fixture
        def secret_values(self) -> Sequence[bytes]:
            return [TOKEN]

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
            settings = kind.Settings(service=service.name, user="nobody", timeout=0.1)
            return lambda: kind("memory", settings)

    return Contract
