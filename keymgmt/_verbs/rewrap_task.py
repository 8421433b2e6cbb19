"""What a rewrap is to do, and the requests to providers that it makes of a model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from keymgmt._config.calls import Answers, has_ability
from keymgmt._crypto.dek import Dek
from keymgmt._providers.contract import SupportsBatchUnwrap, SupportsBatchWrap
from keymgmt._providers.names import KeyRef
from keymgmt._providers.registry import backends
from keymgmt._trust.policy import load_publishers
from keymgmt._trust.recipients import ProviderKey, RecipientFile, resolve_groups
from keymgmt.errors import ConfigError, ProviderError
from keymgmt.sealed.keys import recipient_name

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._providers.data import WrappedKey
    from keymgmt._trust.policy import Publisher
    from keymgmt._verbs.journal import Journal
    from keymgmt.sealed.keys import Group, UnlockPolicy, Wrap

__all__ = ["Task", "Wanted"]

# A model with more recipients asks for them in batches of its own, apart from other models.
_FEW: Final = 64


@dataclass(frozen=True)
class Wanted:
    """The requests of one model to providers, and the answers that came in advance.

    A caller with many models can make the requests of all of them in few calls. A request without
    an answer is made alone.

    Attributes:
        unwraps: provider, recipient and context of each request to unwrap.
        wraps: provider, key, data key or share, and context of each request to wrap.
        unwrapped: answers to ``unwraps``; the unlocker removes each that it uses.
        wrapped: (provider, key, context) -> answer.
        last: there are no more requests: the next step locks the model, to write it.
    """

    unwraps: Sequence[tuple[str, WrappedKey, bytes]] = ()
    wraps: Sequence[tuple[str, str, Dek, bytes]] = ()
    unwrapped: Answers = field(default_factory=dict)
    wrapped: dict[tuple[str, str, bytes], WrappedKey | ProviderError] = field(default_factory=dict)
    last: bool = False


@dataclass(frozen=True)
class Task:
    """The arguments of a rewrap of one model, or of each model of a tree.

    Attributes:
        config: the loaded config.
        add: groups to add.
        drop: groups to take out, as texts.
        exact: take out only the version that is written.
        only: leave no group but those of ``add``.
        force: allow that no group is left that opens here.
        dry_run: write nothing.
        tree: whether this is one of many models: then a group to drop may be missing, and a model
            that does not open here is reported and not raised.
        journal: told of each model that is finished.
        dropped: texts of ``drop`` that some model had.
        down: providers that could not be reached, and are not asked again.
    """

    config: Config
    add: Sequence[Sequence[Wrap]] = ()
    drop: Sequence[str] = ()
    exact: bool = False
    only: bool = False
    force: bool = False
    dry_run: bool = False
    tree: bool = False
    journal: Journal | None = None
    dropped: set[str] = field(default_factory=set)
    down: dict[str, ProviderError] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """What is done, by whom: the part of it that decides what becomes of a model."""
        return {
            "add": ["+".join(map(_shown, group)) for group in self.add],
            "drop": list(self.drop),
            "set": self.only,
            "exact": self.exact,
            "force": self.force,
            "providers": self.config.provider_tables.hex(),
        }

    def newest(self, key: str) -> str:
        """The name of the recipient that wrapping under ``provider:key`` makes now.

        Raises:
            ConfigError: there is no such provider.
            ProviderError: it cannot wrap.
        """
        reference = KeyRef.parse(key)
        wrap = ProviderKey(self.config, reference.provider, reference.key)
        with Dek.generate() as probe:
            return recipient_name(wrap(probe, b"keymgmt probe"))

    @functools.cached_property
    def publishers(self) -> list[Publisher]:
        """The publishers of the config, read once for all models."""
        return load_publishers(self.config) if self.config.policy.require_signature else []

    @functools.cached_property
    def unwrapping(self) -> dict[str, list[str]]:
        """By backend, the providers that unwrap many recipients in one call."""
        found: dict[str, list[str]] = {}
        for name in self.config.provider_names:
            if has_ability(self.config, name, SupportsBatchUnwrap):
                found.setdefault(self.config.backend_of(name), []).append(name)
        return found

    @functools.cached_property
    def wrapping(self) -> frozenset[str]:
        """The providers that wrap many data keys in one call."""
        names = self.config.provider_names
        return frozenset(n for n in names if has_ability(self.config, n, SupportsBatchWrap))

    @property
    def in_few_calls(self) -> bool:
        """Whether every provider takes many requests in one call."""
        unwrapping = {name for names in self.unwrapping.values() for name in names}
        return unwrapping & self.wrapping >= set(self.config.provider_names)

    def wanted(self, policy: UnlockPolicy, groups: Iterable[Group]) -> Wanted:
        """The recipients of some groups that providers can unwrap many at once."""
        if not self.tree:
            return Wanted()
        found = [
            (name, wrapped, group.context(policy.manifest, member))
            for group in groups
            for member, wrapped in enumerate(group.recipients)
            for name in self.unwrapping.get(wrapped.backend, ())
        ]
        return Wanted(found if len(found) <= _FEW else ())

    @classmethod
    def make(
        cls,
        config: Config,
        *,
        add: Sequence[str],
        drop: Sequence[str],
        to: Sequence[str],
        fingerprints: Sequence[str],
        exact: bool,
        force: bool,
        dry_run: bool,
        tree: bool = False,
    ) -> Task:
        """Look up the groups; raises as ``rewrap``."""
        if to and (add or drop):
            raise ConfigError("--set names all groups, so there is none to add or to drop")
        for text in drop:
            _refuse_provider(text, config)
        texts = [*add, *to]
        return cls(
            config,
            add=resolve_groups(texts, config, fingerprints) if texts else (),
            drop=drop,
            exact=exact,
            only=bool(to),
            force=force,
            dry_run=dry_run,
            tree=tree,
        )


def _refuse_provider(text: str, config: Config) -> None:
    """ConfigError where a group to drop is named by providers, before any model is changed.

    Another provider of that backend may have a key of the same name, which would be dropped too.
    """
    shown = []
    for member in text.split("+"):
        name, colon, key = member.partition(":")
        is_provider = name in config.provider_names and name not in backends()
        shown.append(f"{config.backend_of(name) if is_provider else name}{colon}{key}")
    if (meant := "+".join(shown)) != text:
        raise ConfigError(
            f"{text} names a provider, and a group to drop is named as `inspect` shows it",
            hint=f"--drop {meant}",
        )


def _shown(wrap: Wrap) -> str:
    if isinstance(wrap, ProviderKey):
        return f"{wrap.provider}:{wrap.key}"
    return f"@{wrap.recipient.fingerprint}" if isinstance(wrap, RecipientFile) else repr(wrap)
