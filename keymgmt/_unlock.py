"""From an unlock policy and a config to the data key.

Groups are tried as written, or preferred providers' first. A recipient is matched to providers by
its backend, never by a name that the file could choose. Every ProviderError moves on to the next
candidate and is kept; ConfigError, SealedModelError and interrupts stop. One attempt for each
distinct blob, and a provider that was unavailable is not asked again. Until a policy's MAC was
right anybody may have made it longer: 64 attempts that got as far as a key service, and a total
time.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from keymgmt._audit import audit
from keymgmt._dek import Dek
from keymgmt.errors import (
    Attempt,
    BackendNotInstalled,
    CannotUnlock,
    ConfigError,
    KeymgmtError,
    ProviderError,
    ProviderUnavailable,
    UnwrapFailed,
    WrongKey,
)
from keymgmt.sealed.derive import commitment
from keymgmt.sealed.keys import Group, recipient_name

if TYPE_CHECKING:
    from keymgmt._config import Config
    from keymgmt._provider import KeyProvider, WrappedKey
    from keymgmt.sealed.keys import UnlockPolicy
    from keymgmt.sealed.manifest import Manifest

__all__ = ["Answers", "Unlocker", "call_provider", "require"]

# What providers answered ahead, many in one call: (provider, blob, context) -> its answer.
Answers = dict[tuple[str, bytes, bytes], Dek | ProviderError]

MAX_TRIES: Final = 64
TIME_LIMIT: Final = 120.0


class Unlocker:
    """One try to open one sealed model with one config; ``attempts`` keeps every reason."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        policy: UnlockPolicy,
        answers: Answers | None = None,
        *,
        bounded: bool = True,
    ) -> None:
        """Nothing is asked yet; ``answers`` are taken before a provider is asked.

        ``bounded`` is False for a policy that a holder of the data key wrote.
        """
        self._config = config
        self._manifest = manifest
        self._policy = policy
        self._bounded = bounded
        self._deadline = time.monotonic() + TIME_LIMIT
        self._tries = 0
        self._unavailable: dict[str, ProviderError] = {}
        self._failed: dict[tuple[str, bytes], KeymgmtError] = {}
        self._by_backend: dict[str, list[str]] = {}
        for name in config.provider_names:
            self._by_backend.setdefault(config.backend_of(name), []).append(name)
        self._answers = answers if answers is not None else {}
        self._opened: dict[tuple[int, int], str] = {}
        self._held: set[tuple[str, bytes]] = set()
        self.attempts: list[Attempt] = []

    def unlock(self) -> tuple[Dek, int]:
        """The data key, and the index of the group that gave it.

        Raises:
            CannotUnlock: no group opens here, with every reason.
            ConfigError: the config is wrong.
            IntegrityError: the policy was changed by somebody without the data key.
        """
        for index in self._order():
            dek = self.open_group(index)
            if dek is not None:
                self._policy.check_mac(dek, self._manifest.id)
                self._bounded = False
                return dek, index
        hint: str | None
        if not self._by_backend:
            hint = "the config has no providers; add one, or make a config with: keymgmt init"
        else:
            hint = next((a.error.hint for a in self.attempts if a.error.hint), None)
        raise CannotUnlock(
            f"no recipient of {self._manifest.name} opens with this config",
            attempts=self.attempts,
            hint=hint,
        )

    def _order(self) -> Sequence[int]:
        prefer = self._config.policy.prefer
        indices = range(len(self._policy.groups))
        if not prefer:
            return indices
        rank = {name: place for place, name in enumerate(prefer)}

        def place(index: int) -> int:
            # A group is as preferred as the least preferred member that it cannot do without.
            return max(
                min(
                    (rank.get(name, len(rank)) for name in self._candidates(wrapped)),
                    default=len(rank),
                )
                for wrapped in self._policy.groups[index].recipients
            )

        return sorted(indices, key=place)

    def _candidates(self, wrapped: WrappedKey) -> list[str]:
        return self._by_backend.get(wrapped.backend, [])

    def open_group(self, index: int) -> Dek | None:
        """The data key if this group opens here, else None with the reasons in ``attempts``.

        The commitment of the manifest is checked, the MAC of the policy is not.
        """
        group = self._policy.groups[index]
        if not all(self._candidates(wrapped) for wrapped in group.recipients):
            for member, wrapped in enumerate(group.recipients):
                if not self._candidates(wrapped):
                    missing = f"no provider of the backend {wrapped.backend} is configured"
                    self._note(index, member, group, None, WrongKey(missing))
            return None
        shares: list[Dek] = []
        try:
            for member in range(len(group.recipients)):
                share = self._open_member(index, member, group)
                if share is None:
                    return None
                shares.append(share)
            dek = Dek.join(shares)
        finally:
            for share in shares:
                share.wipe()
        found = commitment(dek, self._manifest.id)
        if hmac.compare_digest(found, self._manifest.commitment):
            return dek
        dek.wipe()
        error = UnwrapFailed(
            "it unwrapped to a key that is not this model's",
            hint="somebody who is not the sealer made this recipient",
        )
        self._note(index, 0, group, None, error)
        return None

    def _open_member(self, index: int, member: int, group: Group) -> Dek | None:
        wrapped = group.recipients[member]
        context = group.context(self._policy.manifest, member)
        for name in self._candidates(wrapped):
            try:
                dek = self._ask(name, wrapped, context)
            except ProviderError as error:
                self._note(index, member, group, name, error)
            else:
                self._opened[index, member] = name
                self._held.add((name, wrapped.blob))
                self._audit(name, wrapped)
                return dek
        return None

    def providers(self, index: int) -> list[str]:
        """The names of the providers that opened the members of a group that did open."""
        return [self._opened[index, m] for m in range(len(self._policy.groups[index].recipients))]

    def may_hold(self, group: Group, member: int, name: str) -> bool:
        """False where the provider certainly does not hold the key of a group's member.

        A key of the same name in another key service is another key.
        """
        wrapped = group.recipients[member]
        if (name, wrapped.blob) in self._held:
            return True
        try:
            self._ask(name, wrapped, group.context(self._policy.manifest, member)).wipe()
        except ProviderError as error:
            # Who may wrap need not be who may unwrap: then nobody knows.
            return not isinstance(error, (UnwrapFailed, WrongKey))
        self._audit(name, wrapped)
        return True

    def _ask(self, name: str, wrapped: WrappedKey, context: bytes) -> Dek:
        if name in self._unavailable:
            raise self._unavailable[name]
        if (name, wrapped.blob) in self._failed:
            raise self._failed[name, wrapped.blob]
        if self._bounded and self._tries >= MAX_TRIES:
            raise ProviderError(
                f"not tried: {MAX_TRIES} recipients were tried before it",
                hint="name the providers to ask first in [policy] prefer",
            )
        if self._bounded and time.monotonic() > self._deadline:
            raise ProviderUnavailable(f"not tried: {TIME_LIMIT:g} seconds had passed")
        # In one step: a thread with a copy of this model may take it at this moment.
        answer = self._answers.pop((name, wrapped.blob, context), None)
        if isinstance(answer, Dek):
            return answer
        try:
            dek: Dek = call_provider(self._config, name, lambda p: p.unwrap(wrapped, context))
        except ProviderError as error:
            self._tries += not isinstance(error, WrongKey)
            if isinstance(error, (ProviderUnavailable, BackendNotInstalled)):
                self._unavailable[name] = error
            elif not isinstance(error, WrongKey):  # which says nothing of the blob
                self._failed[name, wrapped.blob] = error
            raise
        self._tries += 1
        return dek

    def _note(
        self, index: int, member: int, group: Group, name: str | None, error: ProviderError
    ) -> None:
        wrapped = group.recipients[member]
        self.attempts.append(Attempt(index, member, recipient_name(wrapped), name, error))
        if name is not None and not isinstance(error, WrongKey):
            self._audit(name, wrapped, error)

    def _audit(self, name: str, wrapped: WrappedKey, error: ProviderError | None = None) -> None:
        audit(
            "unwrap",
            error=error,
            model=self._manifest.id.hex(),
            provider=name,
            key=wrapped.key,
            version=wrapped.version,
        )


def call_provider(config: Config, name: str, call: Any) -> Any:
    """Run ``call(provider)``; what a plugin lets through is turned into a ProviderError."""
    try:
        provider: KeyProvider[Any] = config.provider(name)
        return call(provider)
    except KeymgmtError:
        raise
    except Exception as error:
        # Its text could quote anything, so only its class is repeated.
        raise ProviderError(
            f"the provider {name} failed with {type(error).__name__}",
            hint="a backend raises only errors of keymgmt; report this one to its author",
        ) from error


def require(config: Config, name: str, ability: type[Any], what: str) -> Any:
    """The provider called ``name`` if it has the ability; ConfigError if it has not."""
    provider = config.provider(name)
    if not isinstance(provider, ability):
        raise ConfigError(
            f"the provider {name} ({config.backend_of(name)}) {what}",
            hint="see what each backend can do with: keymgmt backends",
        )
    return provider
