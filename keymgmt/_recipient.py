"""A recipient: the public part of a wrapping key, to which anyone seals without its provider."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Recipient"]


@dataclass(frozen=True)
class Recipient:
    """What a device exports of one of its keys; a recipient file is its JSON.

    Attributes:
        kind: how to wrap for it, a mechanism of ``keymgmt._hpke`` or ``RSA-OAEP-256``.
        backend: kind of key service that unwraps.
        key: the KEK's name there.
        version: its version.
        public_key: the public key as its kind says.
        attributes: what the device says of the key, short plain strings.
    """

    kind: str
    backend: str
    key: str
    version: str
    public_key: bytes = field(repr=False)
    attributes: Mapping[str, str] = field(default_factory=dict)
