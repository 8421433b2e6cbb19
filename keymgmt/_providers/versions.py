"""What every backend says of the kinds and versions of a key, in the same words."""

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
    """Raise ConfigError for a kind of key that ``backend`` does not make; ``kinds`` are its own."""
    known = list(kinds)
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        raise ConfigError(
            f"the backend {backend} makes no key of kind {kind[:40]!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(known)}",
        )


def key_exists(key: str, place: object, provider: str) -> ConfigError:
    """A key is to be made, and there is one of that name in ``place``."""
    return ConfigError(
        f"there is a key {key!r} already in {place}",
        hint=f"a new version of it: keymgmt keys rotate {provider}:{key}",
    )


def not_held(wrapped: WrappedKey, provider: str) -> WrongKey:
    """A wrap names a version that the provider called ``provider`` does not have."""
    return WrongKey(
        f"the key {wrapped.key!r} of {provider!r} has no version {wrapped.version}",
        hint=f"see its versions: keymgmt keys show {provider}:{wrapped.key}",
    )


def version_retired(key: str, version: str, why: str = "") -> KeyRetired:
    """The version is there and may not be used any more; ``why`` says by what it is known."""
    return KeyRetired(
        f"version {version} of the key {key!r} was retired" + (f": {why}" if why else ""),
        hint="rewrap the model where another group opens it",
    )


def no_version(key: str, version: str, versions: Sequence[str]) -> KeyNotFound:
    """The key is there and has no such version, but ``versions``, from oldest to newest."""
    return KeyNotFound(
        f"the key {key!r} has no version {version[:80]!r}",
        hint=f"versions: {', '.join(versions)}",
    )


def check_retirable(key: str, version: str, versions: Sequence[str], provider: str) -> None:
    """Refuse to retire a version that is not there, or that new wraps use.

    Args:
        key: name of the key.
        version: which an operator wants to retire.
        versions: what the key has, from oldest to newest.
        provider: the operator's name for the provider, for the hint.

    Raises:
        KeyNotFound: the key has no such version.
        ConfigError: it is the newest.
    """
    if version not in versions:
        raise no_version(key, version, versions)
    if version == versions[-1]:
        raise ConfigError(
            f"version {version} of the key {key!r} is its newest and in use",
            hint=f"first: keymgmt keys rotate {provider}:{key}",
        )
