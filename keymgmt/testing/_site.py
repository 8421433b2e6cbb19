"""The kit for a provider that a config names; ``keymgmt plugin check`` runs it."""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from keymgmt.backend import (
    AccessDenied,
    Dek,
    KeyNotFound,
    KeyProvider,
    KeyRetired,
    LockedOut,
    ProviderError,
    ProviderUnavailable,
    SupportsKeyDeletion,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
    UnsupportedOperation,
    within,
)
from keymgmt.errors import ConfigError
from keymgmt.testing._contract import ProviderContract
from keymgmt.testing._fixtures import Hook, NewKey, ProviderFactory

__all__ = [
    "HOOKS",
    "Site",
    "check_site",
    "load_hooks",
    "remove_made",
    "site_contract",
    "unattended",
]

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
    made_keys: list[str] = field(default_factory=list)
    """The keys that the checks made."""


# Errors that the operator of a provider has to mend, and not its author.
_OPERATORS: Final = (
    AccessDenied,
    ConfigError,
    KeyNotFound,
    KeyRetired,
    LockedOut,
    ProviderUnavailable,
    UnsupportedOperation,
)


def check_site(site: Site) -> None:
    """Use each key that the operator named once, and create a key, before the checks run.

    Only faults of the operator's are raised; the checks report all others.

    Raises:
        KeymgmtError: the operator has to mend something first.
    """

    def use() -> None:
        with _factory(site.provider)() as provider, Dek.generate() as dek:
            for key in filter(None, (site.wrap_key, site.other_wrap_key, site.recipient_key)):
                provider.unwrap(provider.wrap(key, dek, b"keymgmt check"), b"keymgmt check").wipe()
            if site.signing_key is not None and isinstance(provider, SupportsSigning):
                provider.sign(site.signing_key, b"keymgmt check")
            if site.may_create_keys and isinstance(provider, SupportsKeyManagement):
                site.made_keys.append(name := f"kit-first-{secrets.token_hex(4)}")
                # It is no fault if this service does not have that kind.
                with contextlib.suppress(UnsupportedOperation):
                    provider.create_key(name, next(iter(provider.key_kinds)), {})

    try:
        within(3 * site.time_limit, f"the provider {site.provider.name!r}", use)
    except _OPERATORS:
        raise
    except Exception:  # noqa: BLE001, S110 - the checks meet this error again, and judge it
        pass


@contextlib.contextmanager
def unattended() -> Iterator[None]:
    """Let no provider ask a person: the checks make many providers, some in other processes.

    Raises:
        ConfigError: a provider needs a secret that a person has to type.
    """
    stdin, sys.stdin = sys.stdin, None
    try:
        yield
    except ProviderUnavailable as error:
        request, separator, _ = str(error).partition(": this is not a terminal")
        if not separator:
            raise
        raise ConfigError(
            f"{request}: the checks make many providers",
            hint="for the checks, name a file, a credential or an environment variable",
        ) from error
    finally:
        sys.stdin = stdin


def remove_made(site: Site) -> dict[str, str]:
    """Delete the keys that the checks made; return those that are left, each with the reason."""
    kept: dict[str, str] = {}
    with _factory(site.provider)() as provider:
        for key in site.made_keys:
            try:
                if isinstance(provider, SupportsKeyDeletion):
                    provider.delete_key(key)
                elif isinstance(provider, SupportsKeyManagement):
                    provider.describe_key(key)
                    kept[key] = "this provider deletes no keys"
            except KeyNotFound:
                pass
            except Exception as error:  # noqa: BLE001 - reported whatever it is
                kept[key] = f"{type(error).__name__}: {error}"
    return kept


def load_hooks(path: Path) -> dict[str, Hook]:
    """Run a Python file and take the hooks that it defines.

    Raises:
        ConfigError: the file cannot be run or defines no hook, or it breaks the service and does
            not define ``heal_service``.
    """
    spec = importlib.util.spec_from_file_location("keymgmt_site_hooks", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
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


def _factory(provider: KeyProvider[Any]) -> ProviderFactory:
    return lambda: type(provider)(provider.name, provider.settings)


def site_contract(site: Site) -> type[ProviderContract]:
    """The contract, with the fixtures of one site."""

    def hook(name: str) -> Hook | None:
        run = site.hooks.get(name)
        if run is None:
            return None

        def careful() -> None:
            try:
                run()
            except Exception as error:  # noqa: BLE001 - a hook may raise any error
                # Every other check would fail too if the service stays broken.
                pytest.exit(f"the hook {name} failed: {type(error).__name__}: {error}")

        return careful

    class SiteContract(ProviderContract):
        provider_factory = _given(_factory(site.provider))
        may_create_keys = _given(site.may_create_keys)
        made_keys = _given(site.made_keys)
        denied_factory = _given(_factory(site.denied) if site.denied is not None else None)
        break_service = _given(hook("break_service"))
        hang_service = _given(hook("hang_service"))
        heal_service = _given(hook("heal_service"))
        expire_login = _given(hook("expire_login"))
        time_limit = _given(site.time_limit)

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
                    pass  # the check itself reports it
            return site.recipient_key or wrap_key

        @pytest.fixture
        def signing_key(self, request: pytest.FixtureRequest) -> str:
            return site.signing_key or _make(request, "sign")

    return SiteContract


def _given(value: Any) -> Any:
    """A fixture that gives ``value``."""

    @pytest.fixture
    def given(_self: object) -> Any:
        return value

    return given


def _make(request: pytest.FixtureRequest, purpose: str) -> str:
    new_key: NewKey = request.getfixturevalue("new_key")
    return new_key(purpose)  # type: ignore[arg-type]
