"""Checks of what a backend is given, and errors about kinds and versions of keys: for all backends.

Each is written once, so that every backend says it in the same words.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from keymgmt._providers.names import is_key
from keymgmt.errors import (
    ConfigError,
    KeyNotFound,
    KeyRetired,
    UnsupportedOperation,
    WrongKey,
)

if TYPE_CHECKING:
    from keymgmt._providers.data import WrappedKey

__all__ = [
    "check_backend",
    "check_kind",
    "check_mechanism",
    "check_options",
    "check_retirable",
    "key_exists",
    "no_public_part",
    "no_version",
    "not_held",
    "version_retired",
    "wrong_purpose",
]


def check_backend(wrapped: WrappedKey, backend: str) -> None:
    """Raise WrongKey unless ``wrapped`` is of this backend and names a key.

    WrappedKey checks the name too. Here it is checked again, whatever way the name came past that:
    it becomes part of a path, an address or a search in a token.
    """
    if wrapped.backend != backend:
        raise WrongKey(f"{wrapped} is of another backend")
    if not is_key(wrapped.key):
        raise WrongKey("what was wrapped names no key")


def check_mechanism(
    wrapped: WrappedKey, allowed: Collection[str], known: Collection[str], provider: str
) -> None:
    """Raise UnsupportedOperation unless the mechanism of ``wrapped`` is ``allowed`` for its key.

    Args:
        wrapped: what is to be unwrapped.
        allowed: the mechanisms that the settings allow for its key.
        known: all mechanisms of the backend.
        provider: the operator's name for the provider, for the hint.
    """
    if wrapped.mechanism not in known:
        raise UnsupportedOperation(
            f"{wrapped} was wrapped by an unknown mechanism, {wrapped.mechanism!r}",
            hint=f"known: {', '.join(known)}",
        )
    if wrapped.mechanism not in allowed:
        raise UnsupportedOperation(
            f"the config does not allow {wrapped.mechanism} for the key {wrapped.key!r}",
            hint=f"add it to mechanisms of [providers.{provider}.keys.{wrapped.key}]",
        )


def check_options(options: Mapping[str, str], known: Mapping[str, str], backend: str) -> None:
    """Raise ConfigError for an option that ``keys create`` does not take.

    Args:
        options: what was given.
        known: option -> an example of its value.
        backend: the backend, for the message.
    """
    for name in options.keys() - known.keys():
        takes = ", ".join(f"{option}={value}" for option, value in known.items()) or "none"
        raise ConfigError(
            f"the backend {backend} knows no option {name[:40]!r}", hint=f"it takes: {takes}"
        )


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


def wrong_purpose(
    key: str, kind: str, purpose: str, kinds: Mapping[str, str]
) -> UnsupportedOperation:
    """The error for a key of ``kind``, which is for another purpose by ``kinds``."""
    able = ", ".join(name for name, does in kinds.items() if does == purpose)
    return UnsupportedOperation(
        f"the key {key!r} is {kind} and does not {purpose}",
        hint=f"a key has one purpose; kinds that {purpose}: {able}",
    )


def no_public_part(key: str, kind: str, provider: str, other: str) -> UnsupportedOperation:
    """The error for exporting a key of ``kind``, which has no public part; ``other`` has one."""
    return UnsupportedOperation(
        f"the key {key!r} is {kind}, which has no public part that others could wrap to",
        hint=f"make one that has: keymgmt keys create {provider}:NAME --kind {other}",
    )
