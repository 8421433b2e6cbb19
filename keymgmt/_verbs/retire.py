"""Retiring a key version, or deleting a key: the steps that can take away every copy of a model.

A name proves nothing: one key may have several, and several keys one. So whatever could have been
wrapped by the version is tried with that very version, and whoever opens still needs it. What could
not be looked at, or not be tried, stops it. A key stands for all its versions.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from keymgmt._config.config import use_config
from keymgmt._providers.names import KeyRef
from keymgmt._system.words import counted
from keymgmt._verbs.find_models import CHUNK, Failure, Link, find_models, read_models
from keymgmt._verbs.prove import Prover
from keymgmt.errors import ConfigError, KeymgmtError

if TYPE_CHECKING:
    from pathlib import Path

    from keymgmt._config.config import Config
    from keymgmt.sealed.keys import UnlockPolicy

__all__ = ["Need", "needs"]

_SHOWN = 3


@dataclass(frozen=True)
class Need:
    """Which models of some folders need a key version.

    Attributes:
        key: the version, as ``provider:key@version``; without one, all versions of the key.
        trees: the folders that were looked at.
        proved: whether each version itself was tried; False where names were compared, as they
            are for one that is retired.
        models: how many sealed models were read.
        opens: folders of the models that it opens.
        only_way_into: those of them in which every group needs it.
        links: links to folders, which were followed.
        failures: what could not be looked at or tried, so that nobody knows.
    """

    key: str
    trees: tuple[str, ...]
    proved: bool
    models: int
    opens: tuple[str, ...]
    only_way_into: tuple[str, ...]
    links: tuple[Link, ...]
    failures: tuple[Failure, ...]

    @property
    def verdict(self) -> str:
        """``needed``; ``unknown``, where not all was looked at; or ``not_referenced``."""
        if self.opens:
            return "needed"
        return "unknown" if self.failures else "not_referenced"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "key": self.key,
            "trees": list(self.trees),
            "verdict": self.verdict,
            "proved": self.proved,
            "models": self.models,
            "opens": list(self.opens),
            "only_way_into": list(self.only_way_into),
            "links": [asdict(link) for link in self.links],
            "failures": [failure.to_json() for failure in self.failures],
        }

    def check(self) -> None:
        """ConfigError where it is needed, or nobody knows whether it is."""
        if self.opens:
            raise ConfigError(
                f"{self.key} opens {counted(len(self.opens), 'model')}, and is the only way into "
                f"{len(self.only_way_into)}; the first: {', '.join(self.opens[:_SHOWN])}",
                hint=f"first: keymgmt rewrap {shlex.join(self.trees)}; a group that does not open "
                "here is moved where it does, or dropped"
                if "@" in self.key
                else "first give them another way in, and drop this one: rewrap --add, rewrap "
                "--drop",
            )
        if self.failures:
            first = self.failures[0]
            raise ConfigError(
                f"{counted(len(self.failures), 'place')} cannot be read or tried, so nobody knows "
                f"whether {self.key} is needed; the first: {first.path}: {first.error}",
                hint=first.error.hint
                or "repair or remove them, or leave that folder out of the trees",
            )


def needs(
    key: str,
    *trees: str | os.PathLike[str],
    keys: Config | str | os.PathLike[str] | None = None,
    names_only: bool = False,
) -> Need:
    """Find out which sealed models at or below some folders a key, or one version of it, opens.

    Args:
        key: the version, ``provider:key@version``; a key without one stands for all its versions,
            of which those that are retired cannot be tried: what has the name or the number of
            one, and is not seen to be another key's, is a failure.
        trees: the folders; links in them are followed.
        keys: a loaded config, or the path of one.
        names_only: compare names and try nothing, which a key with two names deceives.

    Raises:
        ConfigError: the config, or ``key``, is wrong.
        KeyNotFound: there is no such key, or version of it.
        KeyRetired: it is retired already, so that nothing can be tried.
        ProviderError: the provider does not describe the key.
    """
    reference = KeyRef.parse(key)
    links: list[Link] = []
    failures: list[Failure] = []
    opens: list[str] = []
    only: list[str] = []
    models = 0
    with use_config(keys) as config:
        provers = Prover.of(config, reference, names_only=names_only)
        found = read_models(find_models(trees, links))
        chunk: list[tuple[Path, UnlockPolicy]] = []

        def tell() -> None:
            policies = [policy for _, policy in chunk]
            tried = zip(*(prover.try_all(policies) for prover in provers), strict=True)
            for (path, _), versions in zip(chunk, tried, strict=True):
                groups = [list(chain(*group)) for group in zip(*versions, strict=True)]
                flat = list(chain(*groups))
                failures.extend(
                    Failure(str(path), answer)
                    for answer in flat
                    if isinstance(answer, KeymgmtError)
                )
                if True in flat:
                    opens.append(str(path))
                    if all(True in group for group in groups):
                        only.append(str(path))
            chunk.clear()

        for item in found:
            if isinstance(item, Failure):
                failures.append(item)
                continue
            models += 1
            chunk.append(item)
            if len(chunk) == CHUNK:
                tell()
        tell()
    return Need(
        str(reference),
        tuple(str(tree) for tree in trees),
        all(prover.tries for prover in provers),
        models,
        tuple(opens),
        tuple(only),
        tuple(links),
        tuple(failures),
    )
