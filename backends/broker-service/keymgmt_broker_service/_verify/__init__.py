"""What a policy asks of evidence, and whether evidence satisfies it.

No kind of evidence is verified yet, so no config with a policy is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pydantic import field_validator

from keymgmt.backend import AccessDenied, ConfigError, Settings

__all__ = [
    "AnyPolicy",
    "Claims",
    "Collateral",
    "NotReady",
    "Refused",
    "load_collateral",
    "prepare",
    "verify",
]


class Refused(AccessDenied):
    """The evidence does not satisfy the policy."""


class NotReady(Refused):
    """The evidence cannot be judged now, by a fault of the service and not of the machine."""


class AnyPolicy(Settings):
    """A policy of one kind of evidence.

    Attributes:
        evidence: the kind.
    """

    evidence: str

    @field_validator("evidence")
    @classmethod
    def _none_is_verified(cls, value: str) -> NoReturn:
        raise ValueError(f"evidence {value[:40]!r} is not verified by this version")


@dataclass(frozen=True)
class Claims:
    """What accepted evidence says: the kind, and short public words for the log."""

    kind: str
    said: Mapping[str, str]


class Collateral:
    """What the maker of a processor says of its platforms."""


def load_collateral(folder: Path, unsafe_root: Path | None = None) -> Collateral:
    """Read a folder of collateral; ConfigError always, since nothing is verified with it."""
    raise ConfigError(f"{unsafe_root or folder}: this version verifies with no collateral")


def prepare(policy: AnyPolicy) -> object:
    """What ``verify`` takes for a policy."""
    return policy


def verify(
    evidence: bytes, report_data: bytes, policy: object, collateral: Collateral | None, now: int
) -> Claims:
    """Raise Refused always."""
    raise Refused(
        f"evidence of {len(evidence)} bytes for {len(report_data)}, {policy}, {collateral}, {now}"
    )
