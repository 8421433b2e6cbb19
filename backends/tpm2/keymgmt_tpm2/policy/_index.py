"""NV indices of ours: what one is, and the name that nothing else has; it needs no TPM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from keymgmt.backend import ConfigError
from keymgmt_tpm2._structures import ALG_SHA256, sha256, sized, u16, u32

__all__ = [
    "NV_ANCHOR",
    "NV_ANCHOR_OPEN",
    "NV_COUNTER",
    "NV_WRITTEN",
    "NvIndex",
    "parse_index",
]

NV_WRITTEN: Final = 0x20000000
NV_COUNTER: Final = 0x02060018
"""TPMA_NV of counters: policyWrite, ownerRead, authRead, noDA, type counter."""
NV_ANCHOR: Final = 0x02060048
"""TPMA_NV of an anchor: policyWrite, ownerRead, authRead, noDA, type extend."""
NV_ANCHOR_OPEN: Final = 0x02060044
"""The same with authWrite, for an anchor without a policy."""


def parse_index(text: str) -> int:
    """Read ``0x018001xx``; ConfigError where it is no index for the owner's use."""
    try:
        index = int(text, 16)
    except ValueError:
        index = 0
    # Registry of Reserved TPM 2.0 Handles, 2.2: the owner's indices.
    if not 0x01800000 <= index <= 0x01BFFFFF:
        raise ConfigError(
            f"{text[:20]!r} is no NV index of the owner", hint="0x01800000-0x01bfffff"
        )
    return index


@dataclass(frozen=True)
class NvIndex:
    """An NV index: its number, TPMA_NV without *written*, size in bytes and authPolicy."""

    number: int
    attributes: int
    size: int
    policy: bytes = b""

    @property
    def name(self) -> bytes:
        """Its name once it was written (Part 1, 16): number, attributes, policy and size."""
        return self._name(self.attributes | NV_WRITTEN)

    @property
    def new_name(self) -> bytes:
        """Its name before that."""
        return self._name(self.attributes)

    def _name(self, attributes: int) -> bytes:
        public = u32(self.number) + u16(ALG_SHA256) + u32(attributes)
        return u16(ALG_SHA256) + sha256(public, sized(self.policy), u16(self.size))

    def __str__(self) -> str:
        return f"{self.number:#010x}"
