"""From an unlock policy and a config to the data key.

Groups are tried in the order of the file, or those of preferred providers first; in a group, the
members whose provider is local are tried first. A recipient is matched to providers by its backend,
never by a name that the file could choose. After every ProviderError the next candidate is tried,
and the error is kept; ConfigError, SealedModelError and interrupts stop. Each provider, blob and
context is tried once, and a provider that was unavailable is not asked again.

Until the MAC of a policy was checked, anybody may have added recipients to it. So the work for a
key service is bounded: 64 requests, each for one recipient or, where the service has batches, for
256. Local tries are bounded by the 16384 recipients that a policy may have. A total time bounds
both.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from keymgmt._config.calls import Answers, call_provider, unwrap_many
from keymgmt._crypto.dek import Dek
from keymgmt._providers.contract import SupportsOfflineRecipients
from keymgmt._system.audit import audit
from keymgmt.errors import (
    Attempt,
    BackendNotInstalled,
    CannotUnlock,
    ProviderError,
    ProviderUnavailable,
    UnwrapFailed,
    WrongKey,
    without_frames,
)
from keymgmt.sealed.derive import commitment
from keymgmt.sealed.keys import Group, recipient_name

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._providers.contract import KeyProvider
    from keymgmt._providers.data import WrappedKey
    from keymgmt.sealed.keys import UnlockPolicy
    from keymgmt.sealed.manifest import Manifest

__all__ = ["Opened", "Unlocker"]

MAX_REQUESTS: Final = 64
BATCH: Final = 256
TIME_LIMIT: Final = 120.0

log = logging.getLogger("keymgmt")


@dataclass(frozen=True)
class Opened:
    """How a model was opened.

    Attributes:
        group: index of the group that opened it.
        providers: the providers of that group.
        failed: the attempts of earlier groups that should have worked on this machine.
    """

    group: int
    providers: tuple[str, ...]
    failed: tuple[Attempt, ...]


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
        down: dict[str, ProviderError] | None = None,
    ) -> None:
        """Prepare; no provider is asked yet.

        Args:
            config: the providers and their policy.
            manifest: of the model.
            policy: its recipients.
            answers: answers that are known already; a provider is asked only for others.
            bounded: False for a policy whose MAC was checked, or that this process wrote.
            down: providers that were not reached, which are not asked, and to which each such
                provider is added; shared by the unlockers of many models.
        """
        self._config = config
        self._manifest = manifest
        self._policy = policy
        self._bounded = bounded
        self._deadline = time.monotonic() + TIME_LIMIT
        self._requests = 0
        self._unavailable = down if down is not None else {}
        self._failed: dict[tuple[str, bytes, bytes], ProviderError] = {}
        self._by_backend: dict[str, list[str]] = {}
        for name in config.provider_names:
            self._by_backend.setdefault(config.backend_of(name), []).append(name)
        self._answers = answers if answers is not None else {}
        # Groups before this one were asked ahead, for a provider and a key of several recipients.
        self._asked_ahead: dict[tuple[str, str], int] = {}
        self._opened: dict[tuple[int, int], str] = {}
        self._held: set[tuple[str, bytes]] = set()
        self._local: dict[str, bool] = {}
        self.attempts: list[Attempt] = []

    def open(self) -> tuple[Dek, Opened]:
        """The data key, and how the model was opened; raises as ``unlock``."""
        dek, index = self.unlock()
        return dek, Opened(index, tuple(self.providers(index)), self.broken)

    def unlock(self) -> tuple[Dek, int]:
        """The data key, and the index of the group that gave it.

        Raises:
            CannotUnlock: no group opens here; ``attempts`` has every reason. Or a group opens only
                after a provider failed, and the config refuses such a second way in.
            ConfigError: the config is wrong.
            IntegrityError: the policy was changed by somebody without the data key.
        """
        for index in self._order():
            dek = self.open_group(index)
            if dek is not None:
                try:
                    self._policy.check_mac(dek, self._manifest.id)
                    self._check_fallback(index)
                except BaseException:
                    dek.wipe()
                    raise
                self._bounded = False
                return dek, index
        if not self._by_backend:
            hint = "the config has no providers; add one, or make a config with: keymgmt init"
        else:
            # Only hints of providers of this machine: a recipient that is meant for another machine
            # needs nothing here.
            broken = (attempt.error.hint for attempt in self.broken if attempt.error.hint)
            hint = next(broken, "see what is wrong with this machine's providers: keymgmt doctor")
        raise CannotUnlock(
            f"no recipient of {self._manifest.name} opens with this config",
            attempts=self.attempts,
            hint=hint,
        )

    @property
    def broken(self) -> tuple[Attempt, ...]:
        """The first failed attempt of each provider that should work on this machine."""
        first: dict[str | None, Attempt] = {}
        for attempt in self.attempts:
            if attempt.broken:
                first.setdefault(attempt.provider, attempt)
        return tuple(first.values())

    def _check_fallback(self, index: int) -> None:
        """Report the providers that did not work; CannotUnlock where the config refuses that.

        A device that opens its models by its second way in for a year is a fault that nobody would
        notice otherwise.
        """
        opened_by = "+".join(self.providers(index))
        for attempt in self.broken:
            log.warning(
                "%s was opened by %s, because the provider %s does not work: %s",
                self._manifest.name,
                opened_by,
                attempt.provider,
                attempt.error,
            )
            audit(
                "fallback",
                error=attempt.error,
                model=self._manifest.id.hex(),
                provider=attempt.provider,
                opened_by=opened_by,
                reason=str(attempt.error),
            )
        if self.broken and self._config.policy.fallback == "refuse":
            raise CannotUnlock(
                f"{self._manifest.name} would open with {opened_by} alone, and this config "
                "refuses a second way in",
                attempts=self.attempts,
                hint=self.broken[0].error.hint
                or f"repair the provider {self.broken[0].provider}: keymgmt doctor",
            )

    def _order(self) -> Sequence[int]:
        prefer = self._config.policy.prefer
        indices = range(len(self._policy.groups))
        if not prefer:
            return indices
        rank = {name: number for number, name in enumerate(prefer)}

        def group_rank(index: int) -> int:
            # A member takes the best provider that it can, and a group needs all its members.
            return max(
                min(
                    (rank.get(name, len(rank)) for name in self._candidates(wrapped)),
                    default=len(rank),
                )
                for wrapped in self._policy.groups[index].recipients
            )

        return sorted(indices, key=group_rank)

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
                    self._note(index, member, group, None, WrongKey(missing), "match")
            return None
        shares: list[Dek] = []
        try:
            for member in self._local_first(group):
                share = self._open_member(index, member, group)
                if share is None:
                    return None
                shares.append(share)
            dek = Dek.join(shares)
        finally:
            for share in shares:
                share.wipe()
        computed = commitment(dek, self._manifest.id)
        if hmac.compare_digest(computed, self._manifest.commitment):
            return dek
        dek.wipe()
        error = UnwrapFailed(
            "the recipient unwrapped to a key that is not this model's",
            hint="somebody who is not the sealer made this recipient",
        )
        self._note(index, 0, group, None, error, "join")
        return None

    def _local_first(self, group: Group) -> Iterable[int]:
        """The members of a group, local ones first: if one of them fails, no service is asked."""
        members = range(len(group.recipients))
        if len(members) == 1:
            return members
        names = [self._candidates(wrapped) for wrapped in group.recipients]
        return sorted(members, key=lambda member: not all(map(self._is_local, names[member])))

    def _is_local(self, name: str) -> bool:
        if name not in self._local:
            try:
                self._local[name] = bool(call_provider(self._config, name, lambda p: p.local))
            except ProviderError:
                self._local[name] = False  # the error is met again, and reported, when it is asked
        return self._local[name]

    def _open_member(self, index: int, member: int, group: Group) -> Dek | None:
        wrapped = group.recipients[member]
        context = group.context(self._policy.manifest, member)
        for name in self._candidates(wrapped):
            started = time.monotonic()
            try:
                dek = self._ask(name, wrapped, context, index)
            except ProviderError as error:
                seconds = time.monotonic() - started
                self._note(index, member, group, name, without_frames(error), "unwrap", seconds)
            else:
                self._opened[index, member] = name
                self._held.add((name, wrapped.blob))
                self._audit(name, wrapped)
                return dek
        return None

    def providers(self, index: int) -> list[str]:
        """The names of the providers that opened the members of a group that did open."""
        return [self._opened[index, m] for m in range(len(self._policy.groups[index].recipients))]

    def holders(self, index: int) -> list[str] | None:
        """The providers that hold the keys of a group, even keys that cannot unwrap any more.

        None where the holder of one member is not known.
        """
        names = []
        for member, wrapped in enumerate(self._policy.groups[index].recipients):
            name = self._opened.get((index, member)) or self._holder(wrapped)
            if name is None:
                return None
            names.append(name)
        return names

    def _holder(self, wrapped: WrappedKey) -> str | None:
        def holds(provider: KeyProvider[Any]) -> bool:
            return isinstance(provider, SupportsOfflineRecipients) and provider.holds(wrapped)

        for name in self._candidates(wrapped):
            with contextlib.suppress(ProviderError):
                if call_provider(self._config, name, holds):
                    return name
        return None

    def asks_the_same_key(self, group: Group, member: int, name: str) -> bool:
        """Whether a provider holds the key of a group's member, by unwrapping; True if unknown.

        A key of the same name in another key service is another key.
        """
        wrapped = group.recipients[member]
        if (name, wrapped.blob) in self._held:
            return True
        try:
            self._ask(name, wrapped, group.context(self._policy.manifest, member)).wipe()
        except ProviderError as error:
            if isinstance(error, (UnwrapFailed, WrongKey)):
                return False
            # A user may be allowed to wrap and not to unwrap, so a refusal says nothing, unless
            # another provider is known to hold the key.
            others = (other for other in self._candidates(wrapped) if other != name)
            return not any((other, wrapped.blob) in self._held for other in others)
        self._audit(name, wrapped)
        return True

    def _ask(self, name: str, wrapped: WrappedKey, context: bytes, index: int | None = None) -> Dek:
        if name in self._unavailable:
            raise self._unavailable[name]
        question = (name, wrapped.blob, context)
        if question in self._failed:
            raise self._failed[question]
        if question not in self._answers:
            self._check_bounds(name)
            if index is not None:
                self._ask_ahead(name, wrapped.key, index)
        answer = self._answers.pop(question, None)
        if isinstance(answer, Dek):
            return answer
        try:
            if answer is not None:
                raise answer
            dek: Dek = call_provider(self._config, name, lambda p: p.unwrap(wrapped, context))
        except ProviderError as error:
            if answer is None:
                self._count(name, error)
            if isinstance(error, (ProviderUnavailable, BackendNotInstalled)):
                self._unavailable[name] = error
            elif not isinstance(error, WrongKey):  # a WrongKey is cheap to get again
                self._failed[question] = error
                if index is not None:
                    self._asked_ahead.setdefault((name, wrapped.key), index + 1)
            raise
        self._count(name, None)
        return dek

    def _check_bounds(self, name: str) -> None:
        if not self._bounded:
            return
        if self._requests >= MAX_REQUESTS and not self._is_local(name):
            raise ProviderError(
                f"not tried: {MAX_REQUESTS} requests were made for other recipients before it",
                hint=f"have the model rewrapped with fewer keys of the backend "
                f"{self._config.backend_of(name)}, or name the provider that holds its key first "
                "in [policy] prefer",
            )
        if time.monotonic() > self._deadline:
            raise ProviderUnavailable(f"not tried: {TIME_LIMIT:g} seconds had passed")

    def _count(self, name: str, error: ProviderError | None) -> None:
        """Count a request that reached a key service.

        A WrongKey without ``__cause__`` was raised before anything was sent.
        """
        if self._is_local(name) or (isinstance(error, WrongKey) and error.__cause__ is None):
            return
        self._requests += 1

    def _ask_ahead(self, name: str, key: str, index: int) -> None:
        """Unwrap the next recipients of one key name in one request, after one of them failed.

        A model for many sites has many recipients of one backend and key name, and only the key
        service knows which is its own.
        """
        if self._asked_ahead.get((name, key), index + 1) > index or self._is_local(name):
            return
        backend = self._config.backend_of(name)
        items: list[tuple[WrappedKey, bytes]] = []
        for position, group in enumerate(self._policy.groups[index:], index):
            own = [
                (wrapped, group.context(self._policy.manifest, member))
                for member, wrapped in enumerate(group.recipients)
                if (wrapped.backend, wrapped.key) == (backend, key)
            ]
            if len(items) + len(own) > BATCH:
                break
            items += own
            self._asked_ahead[name, key] = position + 1
        answers = unwrap_many(self._config, name, items) if len(items) > 1 else ()
        self._requests += bool(answers)
        for (wrapped, context), answer in zip(items, answers, strict=False):
            self._answers[name, wrapped.blob, context] = answer

    def _note(
        self,
        index: int,
        member: int,
        group: Group,
        name: str | None,
        error: ProviderError,
        stage: Literal["match", "unwrap", "join"],
        seconds: float = 0.0,
    ) -> None:
        wrapped = group.recipients[member]
        recipient = recipient_name(wrapped)
        self.attempts.append(Attempt(index, member, recipient, name, stage, error, seconds))
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
