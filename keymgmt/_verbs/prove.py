"""Asking providers which key version wrapped something, where names do not say.

Only an answer counts: a recipient opens with a version, or it does not. A refusal, and a service
that does not answer, are neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from keymgmt._config.calls import call_provider, require, unwrap_many
from keymgmt._crypto.dek import Dek
from keymgmt._providers.contract import SupportsKeyManagement
from keymgmt._providers.versions import no_version
from keymgmt.errors import (
    AccessDenied,
    KeyRetired,
    LockedOut,
    ProviderError,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._providers.contract import KeyProvider
    from keymgmt._providers.data import WrappedKey
    from keymgmt._providers.names import KeyRef
    from keymgmt.sealed.keys import UnlockPolicy

__all__ = ["Prover", "Provers"]

Answer = bool | ProviderError
# After one of these every further question would be answered alike, or make it worse.
_FINAL: Final = (AccessDenied, LockedOut, ProviderUnavailable)


def ask_many(
    config: Config, name: str, items: Sequence[tuple[WrappedKey, bytes]]
) -> list[Dek | ProviderError]:
    """Unwrap many recipients with one provider, in few calls where it can: one answer each.

    Nothing is asked after the service was once not reached, or refused.
    """
    known = unwrap_many(config, name, items) if len(items) > 1 else ()
    if known:
        return list(known)
    answers: list[Dek | ProviderError] = []
    for wrapped, context in items:
        try:
            answers.append(call_provider(config, name, partial(_unwrap, wrapped, context)))
        except _FINAL as error:
            return answers + [error] * (len(items) - len(answers))
        except ProviderError as error:
            answers.append(error)
    return answers


def _unwrap(wrapped: WrappedKey, context: bytes, provider: KeyProvider[Any]) -> Dek:
    return provider.unwrap(wrapped, context)


class Prover:
    """One version of one key, and what it opens.

    Attributes:
        tries: whether the version itself is tried; False where names are compared.
    """

    def __init__(
        self, config: Config, reference: KeyRef, *, names_only: bool, retired: bool = False
    ) -> None:
        """``names_only`` compares names, and tries nothing; ``retired`` cannot be tried."""
        self._config, self._reference = config, reference
        self._retired, self._provers = retired, Provers(config)
        self.tries = not (names_only or retired)
        self._backend = config.backend_of(reference.provider)
        self._has_public: bool | None = None
        self._broken: ProviderError | None = None
        self._names_only = names_only

    @classmethod
    def of(cls, config: Config, reference: KeyRef, *, names_only: bool) -> list[Prover]:
        """The version that is named, or each of the key.

        Raises:
            ConfigError: the backend does not manage keys.
            KeyNotFound: there is no such key or version.
            KeyRetired: the one that is named is retired already, so nothing can be tried.
            ProviderError: the provider does not say.
        """
        require(config, reference.provider, SupportsKeyManagement, "does not manage keys")
        info = call_provider(config, reference.provider, lambda p: p.describe_key(reference.key))
        states = {version.version: version.state for version in info.versions}
        if reference.version is not None:
            if reference.version not in states:
                raise no_version(reference.key, reference.version, list(states))
            if states[reference.version] == "retired":
                raise KeyRetired(
                    f"{reference} is retired already, so nobody can try what it opens",
                    hint="there is nothing left to do",
                )
            states = {reference.version: states[reference.version]}
        return [
            cls(
                config,
                reference._replace(version=version),
                names_only=names_only,
                retired=state == "retired",
            )
            for version, state in states.items()
        ]

    def try_all(self, policies: Sequence[UnlockPolicy]) -> list[list[list[Answer]]]:
        """For each recipient of each group of each policy: whether this version opens it.

        An answer that is an error means that nobody knows.
        """
        key, version = self._reference.key, str(self._reference.version)
        items: list[tuple[WrappedKey, bytes]] = []
        places: list[tuple[int, int, int]] = []
        answers: list[list[list[Answer]]] = [
            [[False] * len(group.recipients) for group in policy.groups] for policy in policies
        ]
        for n, policy in enumerate(policies):
            for g, group in enumerate(policy.groups):
                for m, wrapped in enumerate(group.recipients):
                    if wrapped.backend != self._backend:
                        continue
                    if self._names_only:
                        answers[n][g][m] = (wrapped.key, wrapped.version) == (key, version)
                    # One key may have other names elsewhere, and other people other numbers.
                    elif wrapped.version == version or wrapped.key == key:
                        context = group.context(policy.manifest, m)
                        if self._retired:
                            answers[n][g][m] = self._guess(wrapped, context)
                            continue
                        very = replace(wrapped, key=key, version=version)
                        items.append((very, context))
                        places.append((n, g, m))
        for (n, g, m), (wrapped, _), answer in zip(places, items, self._ask(items), strict=True):
            answers[n][g][m] = self._meaning(wrapped, answer)
        return answers

    def _guess(self, wrapped: WrappedKey, context: bytes) -> Answer:
        """What is known of a version that is retired, so that nobody can try it."""
        if (wrapped.key, wrapped.version) == (self._reference.key, str(self._reference.version)):
            return True
        # A retired version opens under no name, so what opens here is none of its.
        with suppress(ProviderError):
            if self._provers.holder(wrapped, context) is not None:
                return False
        untried = UnsupportedOperation(
            f"{self._reference} is retired, so it cannot be tried",
            hint="undo that in the key service and look again; or compare names: --names-only",
        )
        return self._meaning(wrapped, untried)

    def _ask(self, items: Sequence[tuple[WrappedKey, bytes]]) -> list[Dek | ProviderError]:
        if self._broken is not None:
            return [self._broken] * len(items)
        answers = ask_many(self._config, self._reference.provider, items)
        self._broken = next((each for each in answers if isinstance(each, _FINAL)), None)
        return answers

    def _meaning(self, wrapped: WrappedKey, answer: Dek | ProviderError) -> Answer:
        if isinstance(answer, Dek):
            answer.wipe()
            return True
        if isinstance(answer, (UnwrapFailed, WrongKey)):
            return False
        if isinstance(answer, UnsupportedOperation):
            try:
                # A wrap by a public key is none of a key that has no public part, nor the reverse.
                return answer if ("pk" in wrapped.params) == self._public() else False
            except ProviderError:
                return answer
        return answer

    def _public(self) -> bool:
        if self._has_public is None:
            key = self._reference.key
            with Dek.generate() as probe:
                made = call_provider(
                    self._config,
                    self._reference.provider,
                    lambda p: p.wrap(key, probe, b"keymgmt probe"),
                )
            self._has_public = "pk" in made.params
        return self._has_public


class Provers:
    """All providers of a config, asked which of them holds the key of a recipient."""

    def __init__(self, config: Config) -> None:
        """Nothing is asked yet."""
        self._config = config
        self._broken: dict[str, ProviderError] = {}

    def holder(self, wrapped: WrappedKey, context: bytes) -> str | None:
        """The name of the provider that opens it, or None where none of the config does.

        Raises:
            ProviderError: none does, and one of them could not be asked.
        """
        unknown: ProviderError | None = None
        for name in self._config.provider_names:
            if self._config.backend_of(name) != wrapped.backend:
                continue
            if name not in self._broken:
                (answer,) = ask_many(self._config, name, [(wrapped, context)])
                if isinstance(answer, Dek):
                    answer.wipe()
                    return name
                if isinstance(answer, (UnwrapFailed, WrongKey, UnsupportedOperation)):
                    continue
                if not isinstance(answer, _FINAL):
                    unknown = answer
                    continue
                self._broken[name] = answer
            unknown = self._broken[name]
        if unknown is not None:
            raise unknown
        return None
