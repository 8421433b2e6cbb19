"""ProviderContract: all checks in one class."""

from __future__ import annotations

from keymgmt.testing._abilities import AbilityChecks
from keymgmt.testing._conduct import ConductChecks
from keymgmt.testing._faults import FaultChecks
from keymgmt.testing._hostile import HostileNameChecks
from keymgmt.testing._wrapping import WrappingChecks

__all__ = ["ProviderContract"]


class ProviderContract(
    FaultChecks, AbilityChecks, ConductChecks, HostileNameChecks, WrappingChecks
):
    """The rules for every provider, as tests for pytest; those of the last base class run first.

    A backend's test is a subclass that supplies fixtures::

        class TestAcme(ProviderContract):
            @pytest.fixture
            def provider_factory(self, server):
                return lambda: AcmeProvider("acme", AcmeSettings(address=server.address))

            @pytest.fixture
            def wrap_key(self, server):
                return server.make_key("kit")

            @pytest.fixture
            def break_service(self, server):
                return server.stop

            @pytest.fixture
            def heal_service(self, server):
                return server.start

    ``keymgmt.testing.ContractFixtures`` has all fixtures that a backend may supply. A check is
    skipped, with the reason, if it needs a fixture that was not supplied, or an ability that the
    provider does not have. A check that fails says what it demands, why, and where to look.
    """
