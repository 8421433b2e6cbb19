"""What every backend says of the versions of a key, in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from keymgmt.errors import ConfigError, KeyNotFound, KeyRetired, WrongKey

if TYPE_CHECKING:
    from keymgmt._providers.data import WrappedKey

__all__ = ["check_retirable", "no_version", "not_held", "version_retired"]


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
