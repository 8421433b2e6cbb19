"""Every error that keymgmt raises on purpose, named by whose fault it is.

    KeymgmtError
    |-- ConfigError                 the operator: config file, secret source, argument
    |-- SealedModelError            the sealed model as it was read
    |   |-- FormatError             not of the format: malformed, out of bounds, another version
    |   |-- IntegrityError          of the format, but damaged or forged
    |   |-- UntrustedPublisher      no valid signature of a publisher trusted for this name
    |   `-- RollbackError           an older release than this config accepts
    |-- ProviderError               the key service; the next candidate is tried
    |   |-- BackendNotInstalled     no distribution here provides that backend
    |   |-- ProviderUnavailable     not reached, or no answer in time
    |   |-- AccessDenied            reached, and it said no
    |   |-- LockedOut               reached; refuses for a while or until it is unlocked
    |   |-- KeyNotFound             the named key is not there
    |   |-- KeyRetired              the version is there and may not be used for this any more
    |   |-- UnwrapFailed            held, but authentication failed: context, tampering, other key
    |   |-- UnsupportedOperation    this provider or key cannot do that
    |   `-- WrongKey                this provider does not hold that key, known without decrypting
    |-- CannotUnlock                no group of the unlock policy opens with this config
    `-- ModelInUse                  something made from the model is still alive

Every error carries one sentence of what happened and may carry a ``hint``: the way out. Neither
holds a secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "AccessDenied",
    "Attempt",
    "BackendNotInstalled",
    "CannotUnlock",
    "ConfigError",
    "FormatError",
    "IntegrityError",
    "KeyNotFound",
    "KeyRetired",
    "KeymgmtError",
    "LockedOut",
    "ModelInUse",
    "ProviderError",
    "ProviderUnavailable",
    "RollbackError",
    "SealedModelError",
    "UnsupportedOperation",
    "UntrustedPublisher",
    "UnwrapFailed",
    "WrongKey",
]


class KeymgmtError(Exception):
    """Base of all; ``exit_code`` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(KeymgmtError):
    """The operator's config, a secret source or an argument is wrong."""

    exit_code = 3


class SealedModelError(KeymgmtError):
    """The sealed model, as it was read, cannot be accepted."""

    exit_code = 4


class FormatError(SealedModelError):
    """Not a sealed model of a version that this reader knows."""


class IntegrityError(SealedModelError):
    """Damaged or forged: an authentication check failed."""


class UntrustedPublisher(SealedModelError):
    """No valid signature of a publisher that the config trusts for this name."""


class RollbackError(SealedModelError):
    """The release is older than the config accepts."""


class ProviderError(KeymgmtError):
    """A key service did not do what was asked; the next candidate is tried."""


class BackendNotInstalled(ProviderError):
    """No installed distribution provides the backend."""

    exit_code = 3


class ProviderUnavailable(ProviderError):
    """The key service was not reached, or did not answer in time."""

    exit_code = 6


class AccessDenied(ProviderError):
    """The key service was reached and refused."""

    exit_code = 5


class LockedOut(ProviderError):
    """The key service refuses until time has passed or somebody unlocks it."""

    exit_code = 5


class KeyNotFound(ProviderError):
    """The named key does not exist in the provider."""


class KeyRetired(ProviderError):
    """The key version exists but may not be used for this any more."""

    exit_code = 5


class UnwrapFailed(ProviderError):
    """Authentication failed: wrong context, tampered, or another key of that name."""

    exit_code = 4


class UnsupportedOperation(ProviderError):
    """The provider, or this kind of key, cannot do what was asked."""


class WrongKey(ProviderError):
    """The provider does not hold that key or version, known without decrypting."""


@dataclass(frozen=True)
class Attempt:
    """One recipient of an unlock policy and why it did not open.

    ``group`` and ``member`` count from 0; ``provider`` is None where no configured provider is of
    the recipient's backend.
    """

    group: int
    member: int
    recipient: str
    provider: str | None
    error: KeymgmtError


class CannotUnlock(KeymgmtError):
    """No group of the unlock policy opens with this config; ``attempts`` says why, one by one."""

    def __init__(
        self, message: str, *, attempts: Sequence[Attempt] = (), hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.attempts = tuple(attempts)

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """6 if any recipient was unavailable, else 5 if any was denied, else 4."""
        codes = {attempt.error.exit_code for attempt in self.attempts}
        return next((code for code in (6, 5) if code in codes), 4)


class ModelInUse(KeymgmtError):
    """Something made from the model is still alive, so its memory may not be wiped yet."""
