"""Every error that keymgmt raises on purpose, named by whose fault it is.

::

    KeymgmtError
    |-- ConfigError                 the operator: config file, secret source, argument
    |-- SealedModelError            the sealed model as it was read
    |   |-- FormatError             not of the format: malformed, out of bounds, another version
    |   |-- IntegrityError          of the format, but damaged or forged
    |   |-- UntrustedPublisher      no valid signature of a publisher trusted for this name
    |   |-- RollbackError           an older release than this config accepts
    |   `-- ModelExpired            the time until which its publishers vouch has passed
    |-- ProviderError               the key service; the next candidate is tried
    |   |-- BackendNotInstalled     no distribution here provides that backend, or a broken one
    |   |-- ProviderUnavailable     not reached, or no answer in time
    |   |-- AccessDenied            reached, and the request was refused
    |   |-- LockedOut               reached; refuses for a while or until it is unlocked
    |   |-- KeyNotFound             the named key does not exist
    |   |-- KeyRetired              the version exists and may not be used for this any more
    |   |-- UnwrapFailed            held, but authentication failed: context, tampering, other key
    |   |-- UnsupportedOperation    this provider or key cannot do that
    |   `-- WrongKey                this provider does not hold that key, known without decrypting
    |-- StorageError                where a model lies, if that is no folder of this machine
    |   |-- StorageUnavailable      not reached, no answer in time, or no whole answer
    |   `-- StorageDenied           reached, and it said no
    |-- CannotUnlock                no group of the unlock policy opens with this config
    `-- ModelInUse                  an object made from the model is still alive

Every error has a sentence that says what happened, and may have a ``hint``: the way out. Neither
holds a secret.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

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
    "ModelExpired",
    "ModelInUse",
    "ProviderError",
    "ProviderUnavailable",
    "RollbackError",
    "SealedModelError",
    "StorageDenied",
    "StorageError",
    "StorageUnavailable",
    "UnsupportedOperation",
    "UntrustedPublisher",
    "UnwrapFailed",
    "WrongKey",
    "bare",
    "printable",
    "without_frames",
]

E = TypeVar("E", bound=BaseException)
M = TypeVar("M", bound=Callable[..., Any])


class KeymgmtError(Exception):
    """Base of all errors; ``exit_code`` is the exit code of the command line."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(printable(message))
        self.hint = None if hint is None else printable(hint)

    def to_json(self) -> dict[str, object]:
        """The member ``error`` of the output of the command line with ``--json``."""
        return {
            "class": type(self).__name__,
            "message": str(self),
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


def without_frames(error: E) -> E:
    """``error`` without the frames that it and its causes came through.

    A traceback holds every frame up to the caller's, and so all their local variables. An error
    that is kept with them would keep a model's memory alive, which then cannot be wiped, and keep
    secrets within reach of whatever prints the error.
    """
    pending: list[BaseException | None] = [error]
    for current in pending:
        if current is not None and current.__traceback__ is not None:
            current.__traceback__ = None
            pending += [current.__cause__, current.__context__]
    return error


def bare(method: M) -> M:
    """Let errors of keymgmt out of ``method`` without the frames that they came through.

    The frames of a key service's library hold logins and plaintext as local variables, and crash
    reporters send those.
    """

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except KeymgmtError as error:
            without_frames(error)
            raise

    return cast("M", run)


def printable(text: str) -> str:
    """``text`` in one line, with what is not printable shown as an escape.

    Names come from files that others wrote: a line end in one would forge a line of a log, and a
    control character would reach a terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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


class ModelExpired(SealedModelError):
    """The time until which its publishers vouch has passed, or none is stated and one must be."""


class ProviderError(KeymgmtError):
    """A key service did not do what was asked; the next candidate is tried.

    ``passing`` says that the same call may succeed on a new connection, another node or later.
    """

    def __init__(self, message: str, *, hint: str | None = None, passing: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.passing = passing


class BackendNotInstalled(ProviderError):
    """No installed distribution provides the backend, or the distribution is broken."""

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

    exit_code = 3


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


class StorageError(KeymgmtError):
    """A web server, bucket or registry did not give, or take, what was asked."""


class StorageUnavailable(StorageError):
    """It was not reached, did not answer in time, or gave no whole answer."""

    exit_code = 6


class StorageDenied(StorageError):
    """It was reached and refused."""

    exit_code = 5


@dataclass(frozen=True)
class Attempt:
    """One recipient of an unlock policy and why it did not open.

    Attributes:
        group: which group of the policy, from 0.
        member: which recipient of that group, from 0.
        recipient: backend, key and version, as the policy names them.
        provider: the configured provider; None where none is of the recipient's backend.
        stage: ``match`` (no provider to ask), ``unwrap``, or ``join``: the shares gave another key.
        error: the reason.
        seconds: how long the attempt took.
    """

    group: int
    member: int
    recipient: str
    provider: str | None
    stage: Literal["match", "unwrap", "join"]
    error: KeymgmtError
    seconds: float = 0.0

    @property
    def broken(self) -> bool:
        """Whether the provider should have unwrapped the recipient, and could not.

        A provider that holds another key works well: the recipient is meant for another machine.
        """
        return self.provider is not None and not isinstance(self.error, (WrongKey, UnwrapFailed))

    def to_json(self) -> dict[str, object]:
        """As a JSON object."""
        return {
            "group": self.group,
            "member": self.member,
            "recipient": self.recipient,
            "provider": self.provider,
            "stage": self.stage,
            "error": type(self.error).__name__,
            "reason": str(self.error),
            "hint": self.error.hint,
            "seconds": round(self.seconds, 3),
        }


class CannotUnlock(KeymgmtError):
    """No group of the unlock policy opens with this config; ``attempts`` says why, one by one."""

    def __init__(
        self, message: str, *, attempts: Sequence[Attempt] = (), hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.attempts = tuple(attempts)

    def to_json(self) -> dict[str, object]:
        """With ``attempts``: why each recipient did not open."""
        return super().to_json() | {"attempts": [each.to_json() for each in self.attempts]}

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """6 if any recipient was unavailable, else 5 if any was denied, else 4.

        Anything that a provider lacks, such as its backend, a key that was lost or a mechanism of
        its module, counts as unavailable: it is a fault of this machine and not of the model.
        """
        errors = [attempt.error for attempt in self.attempts]
        codes = {e.exit_code for e in errors if not isinstance(e, WrongKey)}
        return 6 if codes - {4, 5} else 5 if 5 in codes else 4


class ModelInUse(KeymgmtError):
    """An object made from the model is still alive, so the model's memory cannot be wiped yet."""
