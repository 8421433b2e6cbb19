"""The fixtures of the kit: two that every backend supplies, and more for what it can do.

Override a fixture in the test class. Checks that need a fixture which is not overridden are
skipped, with the reason.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NoReturn

import pytest

from keymgmt.backend import Dek, KeyProvider, SupportsKeyManagement
from keymgmt.testing._demand import Demand, secrets_of

__all__ = ["ContractFixtures", "Hook", "NewKey", "ProviderFactory"]

ProviderFactory = Callable[[], KeyProvider[Any]]
Hook = Callable[[], None]
NewKey = Callable[[Literal["wrap", "sign"]], str]


class ContractFixtures:
    """The fixtures of the kit. ``provider_factory`` and ``wrap_key`` must be overridden."""

    demand: Demand
    grace: ClassVar[float] = 5.0
    """Seconds beyond the time limit that a call may take on a loaded machine."""
    patience: ClassVar[float] = 20.0
    """Seconds beyond the time limit that a forked process may take."""

    # Every backend supplies these.

    @pytest.fixture
    def provider_factory(self) -> ProviderFactory:
        """Return a function that makes a new provider of the same service on every call.

        Two such providers share nothing but the service. They connect on first use. Give them a
        short time limit, so that checks of a hung service do not take long.
        """
        raise NotImplementedError("override the fixture provider_factory")

    @pytest.fixture
    def wrap_key(self) -> str:
        """Return the name of a KEK that exists and that the providers may use."""
        raise NotImplementedError("override the fixture wrap_key")

    # A backend supplies these where it can.

    @pytest.fixture
    def other_wrap_key(self, request: pytest.FixtureRequest) -> str:
        """Return the name of a second KEK; by default the kit creates it, if it can."""
        new_key: NewKey = request.getfixturevalue("new_key")
        return new_key("wrap")

    @pytest.fixture
    def recipient_key(self, wrap_key: str) -> str:
        """Return the name of a KEK with a public part; override it if ``wrap_key`` has none."""
        return wrap_key

    @pytest.fixture
    def signing_key(self, request: pytest.FixtureRequest) -> str:
        """Return the name of a signing key; by default the kit creates it, if it can."""
        new_key: NewKey = request.getfixturevalue("new_key")
        return new_key("sign")

    @pytest.fixture
    def may_create_keys(self) -> bool:
        """Return whether the checks may leave new keys in the service."""
        return True

    @pytest.fixture
    def made_keys(self) -> list[str]:
        """Return a list to which the checks add the name of each key that they make."""
        return []

    @pytest.fixture
    def denied_factory(self) -> ProviderFactory | None:
        """Return a function that makes a provider whose login the service refuses."""
        return None

    @pytest.fixture
    def break_service(self) -> Hook | None:
        """Return a function that makes the service unreachable: stopped, unplugged, sealed."""
        return None

    @pytest.fixture
    def hang_service(self) -> Hook | None:
        """Return a function that makes the service take calls and never answer (SIGSTOP, say)."""
        return None

    @pytest.fixture
    def heal_service(self) -> Hook | None:
        """Return a function that undoes ``break_service`` and ``hang_service``; may run twice."""
        return None

    @pytest.fixture
    def expire_login(self) -> Hook | None:
        """Return a function that ends every login or session now open at the service."""
        return None

    # A backend declares its properties by these.

    @pytest.fixture
    def time_limit(self) -> float:
        """Return the seconds within which every call of these providers ends in any case."""
        return 15.0

    @pytest.fixture
    def recovery_time(self) -> float:
        """Return the seconds that a healed service may take until it answers again."""
        return 30.0

    @pytest.fixture
    def secret_values(self, provider_factory: ProviderFactory) -> Sequence[bytes]:
        """Return the secrets that must not leak; by default those of the settings' secret sources.

        A PIN of less than 6 bytes is left out, since such a short text occurs by chance.
        """
        with provider_factory() as provider:
            return [secret for secret in secrets_of(provider.settings) if len(secret) >= 6]

    @pytest.fixture
    def place_values(self) -> Sequence[str]:
        """Return texts that must not be in a wrapped key, beyond those in the settings."""
        return ()

    @pytest.fixture
    def hides_missing_keys(self) -> bool:
        """Return whether the service answers "denied" for a key that does not exist."""
        return False

    @pytest.fixture
    def wraps_offline(self) -> bool:
        """Return whether wrap() takes a public key only, and so works without the service."""
        return False

    @pytest.fixture
    def lives_in_this_process(self) -> bool:
        """Return whether the service exists only in this process (a fake, say)."""
        return False

    # The kit makes these from the fixtures above.

    @pytest.fixture(autouse=True)
    def _demanding(self, request: pytest.FixtureRequest) -> None:
        self.demand = Demand(getattr(request.function, "__doc__", None))

    @pytest.fixture
    def provider(self, provider_factory: ProviderFactory) -> Iterator[KeyProvider[Any]]:
        """Make the provider of one check, and close it."""
        made = provider_factory()
        yield made
        with contextlib.suppress(Exception):  # other checks judge close()
            made.close()

    @pytest.fixture
    def dek(self) -> Iterator[Dek]:
        """Make the data key of one check."""
        with Dek.generate() as dek:
            yield dek

    @pytest.fixture
    def new_key(
        self, provider: KeyProvider[Any], may_create_keys: bool, made_keys: list[str]
    ) -> NewKey:
        """Return a function that makes a key for a purpose, or skips the check."""

        def make(purpose: Literal["wrap", "sign"]) -> str:
            if not isinstance(provider, SupportsKeyManagement):
                self.skip("this provider does not create keys; supply a fixture for this key")
            if not may_create_keys:
                self.skip("not allowed to create keys in this service")
            kind = next((k for k, use in provider.key_kinds.items() if use == purpose), None)
            if kind is None:
                self.skip(f"this provider cannot create a key with which to {purpose}")
            name = f"kit-{purpose}-{secrets.token_hex(4)}"
            made_keys.append(name)
            self.demand.works(lambda: provider.create_key(name, kind, {}), f"create_key({kind!r})")
            return name

        return make

    def skip(self, reason: str) -> NoReturn:
        """Skip this check and say why."""
        pytest.skip(reason)

    def need(self, hook: Hook | None, name: str) -> Hook:
        """Return the hook, or skip the check because it was not supplied."""
        if hook is None:
            self.skip(f"the hook {name} was not supplied")
        return hook
