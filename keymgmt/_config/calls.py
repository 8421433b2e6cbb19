"""Calls to a configured provider, and the abilities that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keymgmt._crypto.dek import Dek
from keymgmt._providers.contract import SupportsBatchUnwrap, SupportsBatchWrap
from keymgmt.errors import (
    ConfigError,
    KeymgmtError,
    ProviderError,
    ProviderUnavailable,
)

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._providers.contract import KeyProvider
    from keymgmt._providers.data import WrappedKey

__all__ = ["Answers", "call_provider", "has_ability", "require", "unwrap_many", "wrap_many"]

# Results of providers that did many in one call: (provider, blob, context) -> result.
Answers = dict[tuple[str, bytes, bytes], Dek | ProviderError]


def call_provider(config: Config, name: str, call: Any) -> Any:
    """Run ``call(provider)``; an exception of any other type becomes a ProviderError."""
    try:
        provider: KeyProvider[Any] = config.provider(name)
        return call(provider)
    except KeymgmtError:
        raise
    except Exception as error:
        # Its text could quote a secret, so only its class is repeated.
        raise ProviderError(
            f"the provider {name} failed with {type(error).__name__}",
            hint="a backend raises only errors of keymgmt; report this one to its author",
        ) from error


def require(config: Config, name: str, ability: type[Any], what: str) -> Any:
    """The provider ``name``; ConfigError where it does not have the ability."""
    provider = config.provider(name)
    if not isinstance(provider, ability):
        raise ConfigError(
            f"the provider {name} ({config.backend_of(name)}) {what}",
            hint="see what each backend can do with: keymgmt backends",
        )
    return provider


def has_ability(config: Config, name: str, ability: type[Any]) -> bool:
    """Whether a provider has an ability; False where the provider cannot be created."""
    try:
        return bool(call_provider(config, name, lambda provider: isinstance(provider, ability)))
    except ProviderError:
        return False


def unwrap_many(
    config: Config, name: str, items: Sequence[tuple[WrappedKey, bytes]]
) -> Sequence[Dek | ProviderError]:
    """Unwrap many recipients in one call; empty where the provider cannot do that.

    Where the service cannot be reached, that error stands for every recipient. Any other failure of
    the whole call gives an empty result: it appears again when a recipient is unwrapped alone.
    """
    if not items or not has_ability(config, name, SupportsBatchUnwrap):
        return ()
    return _many(config, name, len(items), lambda provider: provider.unwrap_batch(items))


def wrap_many(
    config: Config, name: str, key: str, items: Sequence[tuple[Dek, bytes]]
) -> Sequence[WrappedKey | ProviderError]:
    """Wrap many data keys under one key; as ``unwrap_many``."""
    if not items or not has_ability(config, name, SupportsBatchWrap):
        return ()
    return _many(config, name, len(items), lambda provider: provider.wrap_batch(key, items))


def _many(config: Config, name: str, count: int, call: Any) -> Sequence[Any]:
    try:
        answers: list[Any] = call_provider(config, name, lambda provider: list(call(provider)))
    except ProviderUnavailable as error:
        return [error] * count
    except ProviderError:
        return ()
    return answers if len(answers) == count else ()
