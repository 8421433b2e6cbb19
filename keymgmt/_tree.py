"""Many sealed models below one folder: found, rewrapped in parallel, and counted by key version."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt._admit import Candidate
from keymgmt._config import use_config
from keymgmt._provider import SupportsBatchUnwrap, WrappedKey
from keymgmt._recipients import resolve_groups
from keymgmt._rewrap import Rewrapped, rewrap_one
from keymgmt._unlock import Answers, call_provider
from keymgmt.errors import ConfigError, KeymgmtError, ProviderError, SealedModelError
from keymgmt.sealed.folder import MANIFEST

if TYPE_CHECKING:
    from keymgmt._config import Config

__all__ = ["Failure", "find_models", "rewrap_tree"]

_CHUNK: Final = 128
_THREADS: Final = 8


@dataclass(frozen=True)
class Failure:
    """A model, or folder, of a tree with which something was wrong."""

    path: str
    error: KeymgmtError


def find_models(tree: str | os.PathLike[str]) -> Iterator[Path | Failure]:
    """Every sealed model at or below ``tree``; symbolic links are not followed.

    A folder that cannot be read comes as a Failure.
    """
    # Not os.walk, which recurses: folders may be nested deeper than Python's stack.
    waiting = [Path(tree)]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            yield _unreadable(error)
            continue
        if any(entry.name == MANIFEST and not entry.is_dir() for entry in found):
            yield folder
        else:
            waiting += [folder / e.name for e in found if e.is_dir(follow_symlinks=False)]


def _unreadable(error: OSError) -> Failure:
    message = f"cannot read {error.filename}: {error.strerror}"
    return Failure(str(error.filename), SealedModelError(message))


def rewrap_tree(
    tree: str | os.PathLike[str],
    *,
    add: Sequence[str] = (),
    drop: Sequence[str] = (),
    keys: Config | str | os.PathLike[str] | None = None,
    fingerprints: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
) -> Iterator[Rewrapped | Failure]:
    """Rewrap every sealed model below ``tree``, in parallel, and tell of each as it is done.

    A model with which something is wrong comes as a Failure and stops no other. May be killed at
    any point and run again: what is done is found done. A group to drop that no model had is a
    Failure of the tree. Arguments as for ``keymgmt.rewrap``.

    Raises:
        ConfigError, ProviderError: the config, or a group to add, is wrong; nothing was changed.
    """
    with use_config(keys) as config:
        groups = resolve_groups(add, config, fingerprints) if add else []
        seen: set[str] = set()

        def one(path: Path, answers: Answers) -> Rewrapped | Failure:
            try:
                return rewrap_one(
                    path,
                    config,
                    add=groups,
                    drop=drop,
                    force=force,
                    dry_run=dry_run,
                    seen=seen,
                    answers=answers,
                )
            except KeymgmtError as error:
                return Failure(str(path), error)
            except OSError as error:
                message = f"cannot rewrap {path}: {error.strerror}"
                return Failure(str(path), SealedModelError(message))

        found = find_models(tree)
        with ThreadPoolExecutor(_THREADS, "keymgmt rewrap") as pool:
            while chunk := list(itertools.islice(found, _CHUNK)):
                yield from (item for item in chunk if isinstance(item, Failure))
                paths = [item for item in chunk if isinstance(item, Path)]
                answers = _ask_ahead(paths, config)
                yield from pool.map(one, paths, [answers] * len(paths))
        for text in drop:
            if text not in seen:
                # Dropped by an earlier run, or misspelt: then nobody has lost access.
                message = f"no model that was opened had a group {text} to drop"
                yield Failure(str(tree), ConfigError(message))


def _ask_ahead(paths: Sequence[Path], config: Config) -> Answers:
    """Unwrap the recipients of many models in one call, where a provider can.

    Whatever goes wrong here is found again, and told, when the model itself is opened.
    """
    batching = {
        name: config.backend_of(name) for name in config.provider_names if _can_batch(config, name)
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
        if not asked:
            continue
        try:
            pairs = call_provider(
                config,
                name,
                lambda p, asked=asked: [*zip(asked, p.unwrap_batch(asked), strict=True)],
            )
        except ProviderError:
            continue
        for (wrapped, context), answer in pairs:
            answers[name, wrapped.blob, context] = answer
    return answers


def _can_batch(config: Config, name: str) -> bool:
    try:
        return bool(call_provider(config, name, lambda p: isinstance(p, SupportsBatchUnwrap)))
    except ProviderError:
        return False
