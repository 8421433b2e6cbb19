"""Trying a key, as the check of every backend does."""

from __future__ import annotations

from typing import Any

from keymgmt._crypto.dek import Dek
from keymgmt._providers.contract import KeyProvider, SupportsSigning
from keymgmt.errors import UnwrapFailed

__all__ = ["try_key"]

_MESSAGE = b"keymgmt check"


def try_key(provider: KeyProvider[Any], key: str, purpose: str = "wrap") -> None:
    """Sign with a key, or wrap a new data key and unwrap it; whatever fails is raised.

    Raises:
        UnwrapFailed: another data key came back.
    """
    if purpose == "sign" and isinstance(provider, SupportsSigning):
        provider.sign(key, _MESSAGE)
        return
    with (
        Dek.generate() as dek,
        provider.unwrap(provider.wrap(key, dek, _MESSAGE), _MESSAGE) as again,
    ):
        if dek != again:
            raise UnwrapFailed(f"the key {key!r} does not unwrap what it wrapped")
