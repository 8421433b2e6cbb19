"""Ask providers which key version wrapped a recipient, where names do not prove it.

Only an answer counts: a recipient opens with a version, or it does not. A refusal, or a service
that does not answer, proves neither.
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

__all__ = ["Holders", "Prover"]

Answer = bool | ProviderError
# After one of these errors each further question would fail alike, or do harm.
_FINAL: Final = (AccessDenied, LockedOut, ProviderUnavailable)


def ask_many(
    config: Config, name: str, items: Sequence[tuple[WrappedKey, bytes]]
) -> list[Dek | ProviderError]:
    """Unwrap many recipients with one provider, in few calls if possible; one answer for each.

    After the service was once not reached, or refused, it is not asked again.
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
    """One version of one key, and the recipients that it opens.

    Attributes:
        tries: whether the version itself is tried; False where names are compared.
    """

    def __init__(
        self, config: Config, reference: KeyRef, *, names_only: bool, retired: bool = False
    ) -> None:
        """``names_only`` compares names and tries no key; a ``retired`` version cannot be tried."""
        self._config, self._reference = config, reference
        self._retired, self._holders = retired, Holders(config)
        self.tries = not (names_only or retired)
        self._backend = config.backend_of(reference.provider)
        self._has_public: bool | None = None
        self._broken: ProviderError | None = None
        self._names_only = names_only

    @classmethod
    def of(cls, config: Config, reference: KeyRef, *, names_only: bool) -> list[Prover]:
        """A Prover for the version that is named, or for each version of the key.

        Raises:
            ConfigError: the backend does not manage keys.
            KeyNotFound: there is no such key or version.
            KeyRetired: the named version is retired already, so it cannot be tried.
            ProviderError: the provider does not describe the key.
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

        An answer that is an error means that it is unknown.
        """
        key, version = self._reference.key, str(self._reference.version)
        items: list[tuple[WrappedKey, bytes]] = []
        positions: list[tuple[int, int, int]] = []
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
                    # Another config may have another name for the key, and other numbers.
                    elif wrapped.version == version or wrapped.key == key:
                        context = group.context(policy.manifest, m)
                        if self._retired:
                            answers[n][g][m] = self._guess(wrapped, context)
                            continue
                        as_this_version = replace(wrapped, key=key, version=version)
                        items.append((as_this_version, context))
                        positions.append((n, g, m))
        for (n, g, m), (wrapped, _), answer in zip(positions, items, self._ask(items), strict=True):
            answers[n][g][m] = self._meaning(wrapped, answer)
        return answers

    def _guess(self, wrapped: WrappedKey, context: bytes) -> Answer:
        """Whether a retired version opens a recipient, as far as names and other versions say."""
        if (wrapped.key, wrapped.version) == (self._reference.key, str(self._reference.version)):
            return True
        # A retired version opens nothing, so a recipient that opens here is of another one.
        with suppress(ProviderError):
            if self._holders.holder(wrapped, context) is not None:
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
                # A wrap under a public key is not by a key without a public part, nor the reverse.
                return answer if ("pk" in wrapped.params) == self._public() else False
            except ProviderError:
                return answer
        return answer

    def _public(self) -> bool:
        if self._has_public is None:
            key = self._reference.key
            with Dek.generate() as probe:
                wrapped_probe = call_provider(
                    self._config,
                    self._reference.provider,
                    lambda p: p.wrap(key, probe, b"keymgmt probe"),
                )
            self._has_public = "pk" in wrapped_probe.params
        return self._has_public


class Holders:
    """All providers of a config: which of them holds the key of a recipient?"""

    def __init__(self, config: Config) -> None:
        """No provider is asked yet."""
        self._config = config
        self._broken: dict[str, ProviderError] = {}

    def holder(self, wrapped: WrappedKey, context: bytes) -> str | None:
        """The name of the provider that opens it, or None where none of the config does.

        Raises:
            ProviderError: no provider opens it, and one of them could not be asked.
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
