"""The common arguments of the commands, and the providers that they name."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from keymgmt.backend import ConfigError, SupportsSigning
from keymgmt_tpm2._provider import Tpm2Provider

__all__ = ["Json", "Provider", "find_key", "find_provider", "find_signer"]

Provider = Annotated[str, typer.Argument(metavar="PROVIDER", help="Provider in the config.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def find_provider(context: typer.Context, name: str) -> Tpm2Provider:
    """The TPM provider of this name; ConfigError if it is of another backend."""
    provider: Tpm2Provider = context.obj.provider(name, Tpm2Provider)
    return provider


def find_key(context: typer.Context, reference: str) -> tuple[Tpm2Provider, str]:
    """The TPM provider and the key of ``PROVIDER:KEY``."""
    name, key = _split(reference)
    return find_provider(context, name), key


def find_signer(context: typer.Context, reference: str) -> tuple[SupportsSigning, str]:
    """The provider, of any backend that can sign, and the key of ``PROVIDER:KEY``."""
    name, key = _split(reference)
    provider: Any = context.obj.config().provider(name)
    if not isinstance(provider, SupportsSigning):
        raise ConfigError(f"the provider {name!r} does not sign")
    return provider, key


def _split(reference: str) -> tuple[str, str]:
    name, colon, key = reference.partition(":")
    if not colon:
        raise ConfigError(f"not a key reference: {reference[:80]!r}", hint="write PROVIDER:KEY")
    return name, key
