"""Rewrap of many sealed models: in parallel, and with few calls to a key service."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keymgmt._config.calls import Answers, call_provider, unwrap_many
from keymgmt._config.config import use_config
from keymgmt._providers.contract import SupportsBatchUnwrap
from keymgmt._providers.data import WrappedKey
from keymgmt._trust.candidate import Candidate
from keymgmt._verbs.find_models import Failure, find_models, over_models
from keymgmt._verbs.rewrap import Rewrapped, Task, rewrap_one
from keymgmt.errors import ConfigError, KeymgmtError, ProviderError

if TYPE_CHECKING:
    from keymgmt._config.config import Config

__all__ = ["rewrap_tree"]


def rewrap_tree(
    tree: str | os.PathLike[str],
    *,
    add: Sequence[str] = (),
    drop: Sequence[str] = (),
    to: Sequence[str] = (),
    exact: bool = False,
    keys: Config | str | os.PathLike[str] | None = None,
    fingerprints: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
) -> Iterator[Rewrapped | Failure]:
    """Rewrap every sealed model below ``tree``, in parallel, and tell of each as it is done.

    A model with which something is wrong comes as a Failure and stops no other; one that does not
    open here comes with the reason in the states of its groups. A key service that was not reached
    is not asked again in this run. May be killed at any point and run again: what is done is found
    done. A group to drop that no model had is a Failure of the tree. Arguments as for
    ``keymgmt.rewrap``.

    Raises:
        ConfigError, ProviderError: the config, or a group to add, is wrong; nothing was changed.
    """
    with use_config(keys) as config:
        task = Task.make(
            config,
            add=add,
            drop=drop,
            to=to,
            fingerprints=fingerprints,
            exact=exact,
            force=force,
            dry_run=dry_run,
            tree=True,
        )

        def prepare(paths: Sequence[Path]) -> Callable[[Path], Rewrapped]:
            answers = _ask_ahead(paths, config, task.down)
            return lambda path: rewrap_one(path, task, answers=answers)

        yield from over_models(find_models(tree), prepare, "rewrap")
        for text in drop:
            if text not in task.dropped:
                # Dropped by an earlier run, or misspelt: then nobody has lost access.
                message = f"no model that was opened had a group {text} to drop"
                yield Failure(str(tree), ConfigError(message))


def _ask_ahead(paths: Sequence[Path], config: Config, down: dict[str, ProviderError]) -> Answers:
    """Unwrap the recipients of many models in one call, where a provider can and is not ``down``.

    Whatever goes wrong here is found again, and told, when the model itself is opened.
    """
    batching = {
        name: config.backend_of(name)
        for name in config.provider_names
        if name not in down and _can_batch(config, name)
    }
    items: dict[str, list[tuple[WrappedKey, bytes]]] = {name: [] for name in batching}
    for path in paths if batching else ():
        try:
            with Candidate.read(path) as candidate:
                candidate.trust(config)
                policy = candidate.policy()
        except (KeymgmtError, OSError):
            continue
        for group in policy.groups:
            for index, wrapped in enumerate(group.recipients):
                for name, backend in batching.items():
                    if wrapped.backend == backend:
                        context = group.context(policy.manifest, index)
                        items[name].append((wrapped, context))
    answers: Answers = {}
    for name, asked in items.items():
        answers |= unwrap_many(config, name, asked) if asked else {}
    return answers


def _can_batch(config: Config, name: str) -> bool:
    try:
        return bool(call_provider(config, name, lambda p: isinstance(p, SupportsBatchUnwrap)))
    except ProviderError:
        return False
