"""Hostile key names, and the checks that no provider acts on such a name.

A key name reaches a provider from a file that anybody may have written. Put into a URL, a path or
a search template, ``../../auth/token/revoke-self`` has really revoked a login.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    Dek,
    KeyNotFound,
    KeyProvider,
    ProviderError,
    SupportsKeyDeletion,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
    WrongKey,
)
from keymgmt.errors import FormatError, KeymgmtError
from keymgmt.testing._fixtures import ContractFixtures

__all__ = ["HOSTILE_KEY_NAMES", "HostileNameChecks"]

HOSTILE_KEY_NAMES: Final = (
    "",
    " ",
    ".",
    "..",
    "a..b",
    "-a",
    "a.",
    "../../auth/token/revoke-self",
    "../../sys/tools/random",
    "..%2f..%2fauth%2ftoken%2frevoke-self",
    "%2e%2e/%2e%2e/sys/seal",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\r\nX-Header: 1",
    "a b",
    "a?version=1",
    "a#b",
    "a;b",
    "a'b",
    'a"b',
    "$(id)",
    "{name}",
    "%s%s%n",
    "*",
    "A",
    "é",
    "а",  # noqa: RUF001 - a Cyrillic letter that looks like a Latin one
    "\u202eyek",
    "\ud800",
    "a" * 65,
    "a" * 100_000,
)
"""Names outside the grammar of keys, of kinds that are known to break programs."""


def _show(name: str) -> str:
    return ascii(name[:40]) + ("..." if len(name) > 40 else "")


class HostileNameChecks(ContractFixtures):
    """No name outside the grammar is acted on, and no missing key is made."""

    def test_hostile_names_do_not_wrap(
        self, provider: KeyProvider[Any], dek: Dek, wrap_key: str
    ) -> None:
        """wrap() of a name outside the grammar is a ConfigError and the login survives it, because
        such a name climbs out of a URL, a path or a search template; look whether wrap() calls
        check_key() before it does anything else.
        """
        for name in HOSTILE_KEY_NAMES:
            self.demand.refused(
                partial(provider.wrap, name, dek, b"c"),
                f"wrap(key={_show(name)})",
                ConfigError,
                KeyNotFound,
            )
        self.demand.wraps(provider, wrap_key, dek, "wrap() after hostile names")

    def test_hostile_names_do_not_unwrap(
        self, provider: KeyProvider[Any], dek: Dek, wrap_key: str
    ) -> None:
        """unwrap() of a name outside the grammar is refused even where it got past WrappedKey,
        because the name then came from a file; look whether unwrap() calls check_key() or compares
        the name with those that it knows.
        """
        wrapped = self.demand.wraps(provider, wrap_key, dek)
        for name in HOSTILE_KEY_NAMES:
            object.__setattr__(wrapped, "key", name)
            self.demand.refused(
                partial(provider.unwrap, wrapped, b"c"),
                f"unwrap(key={_show(name)})",
                ConfigError,
                KeyNotFound,
                WrongKey,
                FormatError,
            )
        object.__setattr__(wrapped, "key", wrap_key)
        self.demand.unwraps(provider, wrapped, dek, "unwrap() after hostile names")

    def test_hostile_names_in_every_ability(self, provider: KeyProvider[Any]) -> None:
        """Every method that takes a key name refuses one outside the grammar with ConfigError or
        KeyNotFound, because operators and files both supply names; look whether the method calls
        check_key() first.
        """
        calls: dict[str, Callable[[str], object]] = {}
        if isinstance(provider, SupportsKeyManagement):
            kind = next(iter(provider.key_kinds))
            calls |= {
                "create_key": lambda name: provider.create_key(name, kind, {}),
                "describe_key": provider.describe_key,
                "rotate_key": provider.rotate_key,
                "retire_version": lambda name: provider.retire_version(name, "1"),
            }
        if isinstance(provider, SupportsKeyDeletion):
            calls["delete_key"] = provider.delete_key
        if isinstance(provider, SupportsSigning):
            calls |= {
                "public_key": provider.public_key,
                "sign": lambda name: provider.sign(name, b"m"),
            }
        if isinstance(provider, SupportsOfflineRecipients):
            calls["export_recipient"] = provider.export_recipient
        if not calls:
            self.skip("this provider claims no ability beyond wrap and unwrap")
        for method, call in calls.items():
            for name in HOSTILE_KEY_NAMES:
                self.demand.refused(
                    partial(call, name),
                    f"{method}({_show(name)})",
                    ConfigError,
                    KeyNotFound,
                )

    def test_missing_key_is_not_made(
        self, provider: KeyProvider[Any], dek: Dek, hides_missing_keys: bool
    ) -> None:
        """wrap() under a key that does not exist is KeyNotFound and does not create the key,
        because a service that makes keys on first use turns a typing error into a model sealed for
        nobody; look whether the service creates keys on encryption and turn that off.
        """
        kinds: tuple[type[ProviderError], ...] = (KeyNotFound,)
        kinds += (AccessDenied,) if hides_missing_keys else ()
        name = f"kit-missing-{secrets.token_hex(6)}"
        for attempt in ("first", "second"):
            self.demand.refused(
                partial(provider.wrap, name, dek, b"c"),
                f"the {attempt} wrap() under a key that does not exist",
                *kinds,
            )
        if isinstance(provider, SupportsKeyManagement):
            listed = self.demand.works(provider.list_keys, "list_keys()")
            self.demand.that(
                name not in [info.key for info in listed], "wrap() made the missing key"
            )
            self.demand.refused(
                partial(provider.describe_key, name), "describe_key() of a missing key", *kinds
            )

    def test_check_survives_every_name(self, provider: KeyProvider[Any]) -> None:
        """check() of a key that is missing or has a hostile name reports a failed finding (or a
        ConfigError for the hostile name), because doctor must be able to print it; look whether
        check() turns every error of the round trip into a Finding.
        """
        missing = f"kit-missing-{secrets.token_hex(6)}"
        health = self.demand.works(lambda: provider.check(missing), "check() of a missing key")
        self.demand.that(not health.ok, "check() of a missing key reported that all is well")
        for name in HOSTILE_KEY_NAMES:
            try:
                health = provider.check(name)
            except ConfigError:
                continue
            except KeymgmtError as error:
                self.demand.fail(f"check({_show(name)}) raised {type(error).__name__}")
            self.demand.that(not health.ok, f"check({_show(name)}) reported that all is well")
