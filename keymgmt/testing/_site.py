"""The kit for a provider that a config names: what ``keymgmt plugin check`` runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from keymgmt.backend import (
    KeyProvider,
    ProviderError,
    SupportsOfflineRecipients,
    UnsupportedOperation,
)
from keymgmt.errors import ConfigError
from keymgmt.testing._contract import ProviderContract
from keymgmt.testing._fixtures import Hook, NewKey, ProviderFactory

__all__ = ["HOOKS", "Site", "load_hooks", "site_contract"]

HOOKS: Final = ("break_service", "hang_service", "heal_service", "expire_login")


@dataclass(frozen=True)
class Site:
    """A configured provider and what its operator allows.

    A key that is None is made by the kit, where it may.
    """

    provider: KeyProvider[Any]
    wrap_key: str | None
    other_wrap_key: str | None = None
    recipient_key: str | None = None
    signing_key: str | None = None
    may_create_keys: bool = False
    denied: KeyProvider[Any] | None = None
    hooks: Mapping[str, Hook] = field(default_factory=dict)
    time_limit: float = 15.0


def load_hooks(path: Path) -> dict[str, Hook]:
    """Run a Python file and take the hooks that it defines.

    Raises:
        ConfigError: it cannot be run, defines none, or could break what it cannot heal.
    """
    spec = importlib.util.spec_from_file_location("keymgmt_site_hooks", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    hooks = {name: vars(module)[name] for name in HOOKS if callable(vars(module).get(name))}
    if not hooks:
        raise ConfigError(f"{path} defines no hook", hint=f"define any of {', '.join(HOOKS)}")
    if {"break_service", "hang_service"} & set(hooks) and "heal_service" not in hooks:
        raise ConfigError(f"{path} breaks the service and does not heal it: define heal_service")
    return hooks


def _again(provider: KeyProvider[Any]) -> ProviderFactory:
    return lambda: type(provider)(provider.name, provider.settings)


def site_contract(site: Site) -> type[ProviderContract]:
    """The contract, with the fixtures of one site."""

    class SiteContract(ProviderContract):
        @pytest.fixture
        def provider_factory(self) -> ProviderFactory:
            return _again(site.provider)

        @pytest.fixture
        def wrap_key(self, request: pytest.FixtureRequest) -> str:
            return site.wrap_key or _make(request, "wrap")

        @pytest.fixture
        def other_wrap_key(self, request: pytest.FixtureRequest) -> str:
            return site.other_wrap_key or _make(request, "wrap")

        @pytest.fixture
        def recipient_key(self, provider: KeyProvider[Any], wrap_key: str) -> str:
            if site.recipient_key is None and isinstance(provider, SupportsOfflineRecipients):
                try:
                    provider.export_recipient(wrap_key)
                except UnsupportedOperation:
                    self.skip(f"{wrap_key} has no public part; name one with --recipient-key")
                except ProviderError:
                    pass  # the check itself says so
            return site.recipient_key or wrap_key

        @pytest.fixture
        def signing_key(self, request: pytest.FixtureRequest) -> str:
            return site.signing_key or _make(request, "sign")

        @pytest.fixture
        def may_create_keys(self) -> bool:
            return site.may_create_keys

        @pytest.fixture
        def denied_factory(self) -> ProviderFactory | None:
            return _again(site.denied) if site.denied is not None else None

        @pytest.fixture
        def break_service(self) -> Hook | None:
            return site.hooks.get("break_service")

        @pytest.fixture
        def hang_service(self) -> Hook | None:
            return site.hooks.get("hang_service")

        @pytest.fixture
        def heal_service(self) -> Hook | None:
            return site.hooks.get("heal_service")

        @pytest.fixture
        def expire_login(self) -> Hook | None:
            return site.hooks.get("expire_login")

        @pytest.fixture
        def time_limit(self) -> float:
            return site.time_limit

    return SiteContract


def _make(request: pytest.FixtureRequest, purpose: str) -> str:
    new_key: NewKey = request.getfixturevalue("new_key")
    return new_key(purpose)  # type: ignore[arg-type]
