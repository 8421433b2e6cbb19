"""Retire a key version or delete a key: steps that may make every copy of a model useless.

A name proves nothing: one key may have several names, and several keys one name. So whatever the
version could have wrapped is tried with that version, and a model that it opens still needs it. A
folder or recipient that could not be checked stops the step. A key stands for all its versions.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from keymgmt._config.config import use_config
from keymgmt._providers.names import KeyRef
from keymgmt._remote.location import has_location
from keymgmt._system.words import counted
from keymgmt._verbs.find_models import CHUNK, Failure, Link, Place, find_models, read_models
from keymgmt._verbs.prove import Prover
from keymgmt.errors import ConfigError, KeymgmtError

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt.sealed.keys import UnlockPolicy

__all__ = ["Need", "needs"]

_SHOWN = 3


@dataclass(frozen=True)
class Need:
    """The models of some folders that need a key version.

    Attributes:
        key: the version, as ``provider:key@version``; without one, all versions of the key.
        trees: the folders that were searched.
        proved: whether the version itself was tried; False where only names were compared, as for
            a retired version.
        models: how many sealed models were read.
        opens: folders of the models that the version opens.
        only_way_into: those of them in which every group needs the version.
        links: links to folders, which were followed.
        failures: folders and recipients that could not be checked, so that it is unknown.
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
        """``needed``; ``unknown`` where not all was checked; or ``not_referenced``."""
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
        """ConfigError where the version is needed, or where that is unknown."""
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
        key: the version, ``provider:key@version``. A key without a version stands for all its
            versions. Retired versions cannot be tried: a recipient with the name or number of one
            is a failure, unless another key is proved to have wrapped it.
        trees: the folders, or ``s3://BUCKET/PATH`` as texts; links are followed.
        keys: a loaded config, or the path of one.
        names_only: compare names and try no key; wrong where a key has two names.

    Raises:
        ConfigError: the config, or ``key``, is wrong.
        KeyNotFound: there is no such key or version.
        KeyRetired: the version is retired already, so it cannot be tried.
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
        remote = config.remote if has_location(trees) else None
        found = read_models(find_models(trees, links, remote=remote), remote)
        chunk: list[tuple[Place, UnlockPolicy]] = []

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
