"""The key versions that the sealed models of some folders still need, by their keys.json.

A key is identified by its public key, by the provider that opened with it, or else by its name
alone, which two key services may both use. Nothing is authenticated: whoever can write to a tree
can hide a model or add a false one. Failures are listed, and while there are any, no key version is
reported as unused.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from keymgmt._config.config import use_config
from keymgmt._remote.location import has_location
from keymgmt._verbs.find_models import Failure, Link, find_models, read_models
from keymgmt._verbs.prove import Holders
from keymgmt.errors import ProviderError

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._providers.data import WrappedKey

__all__ = ["KeyUse", "Usage", "usage"]

KnownBy = Literal["public key", "provider", "name"]


@dataclass
class KeyUse:
    """One version of one key, and the models that it opens.

    Attributes:
        backend: kind of key service.
        key: name of the key in the models.
        version: version of the key in the models.
        known_by: how the key was identified: by its ``public key``, by the ``provider`` that opened
            with it, or by its ``name`` alone, under which several keys may be counted as one.
        identity: id of the public key (SHA-256, hex), or name of the provider; else empty.
        opens: number of models that it opens.
        only_way_into: folders of the models in which every group needs it.
    """

    backend: str
    key: str
    version: str
    known_by: KnownBy = "name"
    identity: str = ""
    opens: int = 0
    only_way_into: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Usage:
    """The key versions that the models of some folders name.

    Attributes:
        models: number of sealed models that were read.
        keys: every key version that any of them names, sorted.
        links: links to folders, which were followed.
        failures: what could not be read; while there are any, no key version is known to be unused.
        shard: the part of the folders that was read, such as ``2/8``; None for all of them.
    """

    models: int
    keys: tuple[KeyUse, ...]
    links: tuple[Link, ...]
    failures: tuple[Failure, ...]
    shard: str | None = None

    def of(self, backend: str, key: str, version: str, identity: str = "") -> KeyUse | None:
        """The use of one key version, or None if no model names it."""
        wanted = (backend, key, version, identity)
        return next(
            (u for u in self.keys if (u.backend, u.key, u.version, u.identity) == wanted), None
        )

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "format": "keymgmt-usage/1",
            "authenticated": False,
            "complete": not self.failures,
            "shard": self.shard,
            "models": self.models,
            "keys": [asdict(use) for use in self.keys],
            "links": [asdict(link) for link in self.links],
            "failures": [failure.to_json() for failure in self.failures],
        }


def usage(
    *trees: str | os.PathLike[str],
    prove: Config | str | os.PathLike[str] | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
    shard: str | None = None,
) -> Usage:
    """Count the key versions that the sealed models at or below some folders name.

    Args:
        trees: the folders, or ``s3://BUCKET/PATH`` as texts; links are followed, and each model
            counts once.
        prove: a loaded config, or the path of one: its providers are asked for the keys of
            recipients without a public key. By default no key service is asked.
        keys: a loaded config, or the path of one, with the login of a bucket; by default that of
            ``prove``, else the config that is found. It is not read for folders alone.
        shard: only this part of each folder, such as ``2/8``, as for ``keymgmt.rewrap_tree``.

    Raises:
        ConfigError: the config, or ``shard``, is wrong.
    """
    links: list[Link] = []
    failures: list[Failure] = []
    uses: dict[tuple[str, str, str, KnownBy, str], KeyUse] = {}
    models = 0
    with contextlib.ExitStack() as stack:
        holders = Holders(stack.enter_context(use_config(prove))) if prove is not None else None
        remote = None
        if has_location(trees):
            remote = stack.enter_context(use_config(prove if keys is None else keys)).remote
        for item in read_models(find_models(trees, links, shard, remote), remote):
            if isinstance(item, Failure):
                failures.append(item)
                continue
            path, policy = item
            models += 1
            groups = []
            for group in policy.groups:
                versions = set()
                for member, wrapped in enumerate(group.recipients):
                    context = group.context(policy.manifest, member)
                    try:
                        known = _identity(wrapped, context, holders)
                    except ProviderError as error:
                        known = ("name", "")
                        failures.append(Failure(str(path), error))
                    versions.add((wrapped.backend, wrapped.key, wrapped.version, *known))
                groups.append(versions)
            for version_id in set().union(*groups):
                use = uses.setdefault(version_id, KeyUse(*version_id))
                use.opens += 1
                if all(version_id in group for group in groups):
                    use.only_way_into.append(str(path))
    used = tuple(uses[version_id] for version_id in sorted(uses))
    return Usage(models, used, tuple(links), tuple(failures), shard)


def _identity(wrapped: WrappedKey, context: bytes, holders: Holders | None) -> tuple[KnownBy, str]:
    public = wrapped.params.get("pk", "")
    if public:
        return "public key", public
    holder = holders.holder(wrapped, context) if holders is not None else None
    return ("provider", holder) if holder is not None else ("name", "")
