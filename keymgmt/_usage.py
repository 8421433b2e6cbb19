"""Which key versions the sealed models of a tree still need, from their keys.json alone.

Nothing is authenticated: whoever can write to the tree can hide a model or invent one. What could
not be read is listed, and then nothing is said to be unused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keymgmt._admit import Candidate
from keymgmt._tree import Failure, find_models
from keymgmt.errors import KeymgmtError, SealedModelError

__all__ = ["KeyUse", "Usage", "usage"]


@dataclass
class KeyUse:
    """One version of one key: how many models it opens, and those that nothing else opens."""

    backend: str
    key: str
    version: str
    opens: int = 0
    only_way_into: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Usage:
    """What a tree refers to.

    Attributes:
        models: how many sealed models were read.
        keys: every key version that any of them names, sorted.
        failures: what could not be read; while there is any, no key version is known unused.
    """

    models: int
    keys: tuple[KeyUse, ...]
    failures: tuple[Failure, ...]

    def of(self, backend: str, key: str, version: str) -> KeyUse | None:
        """The use of one key version, or None if the tree does not name it."""
        wanted = (backend, key, version)
        return next((u for u in self.keys if (u.backend, u.key, u.version) == wanted), None)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "authenticated": False,
            "complete": not self.failures,
            "models": self.models,
            "keys": [
                {
                    "backend": use.backend,
                    "key": use.key,
                    "version": use.version,
                    "opens": use.opens,
                    "only_way_into": use.only_way_into,
                }
                for use in self.keys
            ],
            "failures": [
                {"path": failure.path, "error": str(failure.error)} for failure in self.failures
            ],
        }


def usage(tree: str | os.PathLike[str]) -> Usage:
    """Count the key versions that the sealed models at or below ``tree`` name; needs no key."""
    uses: dict[tuple[str, str, str], KeyUse] = {}
    failures: list[Failure] = []
    models = 0
    for item in find_models(tree):
        if isinstance(item, Failure):
            failures.append(item)
            continue
        try:
            with Candidate.read(item) as candidate:
                policy = candidate.policy()
        except KeymgmtError as error:
            failures.append(Failure(str(item), error))
            continue
        except OSError as error:
            failures.append(Failure(str(item), SealedModelError(f"cannot read: {error.strerror}")))
            continue
        models += 1
        groups = [
            {(w.backend, w.key, w.version) for w in group.recipients} for group in policy.groups
        ]
        for place in set().union(*groups):
            use = uses.setdefault(place, KeyUse(*place))
            use.opens += 1
            if all(place in group for group in groups):
                use.only_way_into.append(str(item))
    if not models and not failures and not Path(tree).is_dir():
        failures.append(Failure(str(tree), SealedModelError(f"{tree} is not a folder")))
    return Usage(models, tuple(uses[place] for place in sorted(uses)), tuple(failures))
