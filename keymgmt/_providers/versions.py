"""Errors about kinds and versions of keys, in the same words for every backend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from keymgmt.errors import ConfigError, KeyNotFound, KeyRetired, WrongKey

if TYPE_CHECKING:
    from keymgmt._providers.data import WrappedKey

__all__ = [
    "check_kind",
    "check_retirable",
    "key_exists",
    "no_version",
    "not_held",
    "version_retired",
]


def check_kind(kind: str, kinds: Iterable[str], backend: str) -> None:
    """Raise ConfigError unless ``kind`` is one of ``kinds``, which ``backend`` can make."""
    known = list(kinds)
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        raise ConfigError(
            f"the backend {backend} makes no key of kind {kind[:40]!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(known)}",
        )


def key_exists(key: str, where: object, provider: str) -> ConfigError:
    """The error for making a key whose name exists already in ``where``."""
    return ConfigError(
        f"there is a key {key!r} already in {where}",
        hint=f"a new version of it: keymgmt keys rotate {provider}:{key}",
    )


def not_held(wrapped: WrappedKey, provider: str) -> WrongKey:
    """The error for a wrap of a version that the provider of this name does not have."""
    return WrongKey(
        f"the key {wrapped.key!r} of {provider!r} has no version {wrapped.version}",
        hint=f"see its versions: keymgmt keys show {provider}:{wrapped.key}",
    )


def version_retired(key: str, version: str, why: str = "") -> KeyRetired:
    """The error for a version that exists and was retired; ``why`` says how that is known."""
    return KeyRetired(
        f"version {version} of the key {key!r} was retired" + (f": {why}" if why else ""),
        hint="rewrap the model where another group opens it",
    )


def no_version(key: str, version: str, versions: Sequence[str]) -> KeyNotFound:
    """The error for a version that an existing key does not have; it has ``versions``."""
    return KeyNotFound(
        f"the key {key!r} has no version {version[:80]!r}",
        hint=f"versions: {', '.join(versions)}",
    )


def check_retirable(key: str, version: str, versions: Sequence[str], provider: str) -> None:
    """Refuse to retire a version that does not exist, or that new wraps use.

    Args:
        key: name of the key.
        version: the version that an operator wants to retire.
        versions: all versions of the key, from oldest to newest.
        provider: the operator's name for the provider, for the hint.

    Raises:
        KeyNotFound: the key has no such version.
        ConfigError: it is the newest version.
    """
    if version not in versions:
        raise no_version(key, version, versions)
    if version == versions[-1]:
        raise ConfigError(
            f"version {version} of the key {key!r} is its newest and in use",
            hint=f"first: keymgmt keys rotate {provider}:{key}",
        )
