"""Sign, verify and reseal every model of a tree.

Each result is yielded as it is ready; an error in one model does not stop the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from keymgmt._config.config import use_config
from keymgmt._trust.candidate import Candidate, refusal
from keymgmt._verbs.find_models import Failure, Place, find_models, over_models
from keymgmt._verbs.reseal import reseal
from keymgmt._verbs.sign import sign
from keymgmt._verbs.verify import verify
from keymgmt.errors import ConfigError
from keymgmt.sealed.times import utc_text

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._config.remote import Remote
    from keymgmt.sealed.manifest import Manifest

__all__ = ["Done", "InTree", "reseal_tree", "sign_tree", "verify_tree"]

InTree = Callable[[str, int, int], object]
"""Told the folder of the model that is being worked on, its bytes done, and those in all."""


@dataclass(frozen=True)
class Done:
    """The result for one model of a tree.

    Attributes:
        path: its folder.
        state: ``signed``, ``verified``, ``resealed``, or ``current`` (it was done already).
        detail: more facts, for JSON; ``refusal`` is why this config would refuse the result.
    """

    path: str
    state: str
    detail: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"path": self.path, "state": self.state, **self.detail}


def _each(
    tree: str | os.PathLike[str],
    work: Callable[[Place], Done],
    doing: str,
    threads: int,
    shard: str | None,
    remote: Remote | None = None,
) -> Iterator[Done | Failure]:
    found = find_models(tree, shard=shard, remote=remote)
    return over_models(found, lambda _: work, doing, threads=threads)


def sign_tree(
    tree: str | os.PathLike[str],
    *,
    if_signed_by: Sequence[str | os.PathLike[str]],
    key: str | None = None,
    expires: datetime | None = None,
    unopened: bool = False,
    keys: Config | str | os.PathLike[str] | None = None,
    shard: str | None = None,
) -> Iterator[Done | Failure]:
    """Sign every model of a tree that an earlier key has signed, in parallel.

    The earlier key is required because anybody may have put a model into the tree. A killed run
    may be started again.

    Args:
        tree: the folder.
        if_signed_by: public key files (PEM), as for ``keymgmt.sign``; at least one.
        key: as for ``keymgmt.sign``.
        expires: likewise.
        unopened: likewise.
        keys: likewise.
        shard: as for ``keymgmt.rewrap_tree``.

    Raises:
        ConfigError: no earlier key is named, or the config, or ``shard``, is wrong.
    """
    if not if_signed_by:
        raise ConfigError(
            "signing a tree would vouch for whatever somebody put there",
            hint="say whose signature each model must have already: --if-signed-by OLD.pem",
        )
    with use_config(keys) as config:

        def one(path: Place) -> Done:
            made = sign(
                path,
                key=key,
                expires=expires,
                unopened=unopened,
                keys=config,
                if_signed_by=if_signed_by,
            )
            refused = refusal(path, config)
            detail = {"unopened": unopened, "refusal": str(refused) if refused else None}
            return Done(str(path), "signed" if made else "current", detail)

        yield from _each(tree, one, "sign", 4, shard)


def verify_tree(
    tree: str | os.PathLike[str],
    *,
    keys: Config | str | os.PathLike[str] | None = None,
    signature_only: bool = False,
    shard: str | None = None,
    progress: InTree | None = None,
) -> Iterator[Done | Failure]:
    """Verify every model of a tree, one after the other.

    Args:
        tree: the folder, or ``s3://BUCKET/PATH``.
        keys: as for ``keymgmt.verify``.
        signature_only: likewise.
        shard: as for ``keymgmt.rewrap_tree``.
        progress: told the model's folder, its bytes done, and those in all.

    Raises:
        ConfigError: the config, or ``shard``, is wrong.
    """
    with use_config(keys) as config:

        def one(path: Place) -> Done:
            told = partial(progress, str(path)) if progress else None
            proved = verify(path, keys=config, signature_only=signature_only, progress=told)
            return Done(str(path), "verified", proved.to_json())

        yield from _each(tree, one, "verify", 1, shard, config.remote)


def reseal_tree(
    tree: str | os.PathLike[str],
    *,
    to: Sequence[str] = (),
    sign: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
    fingerprints: Sequence[str] = (),
    expires: datetime | None = None,
    created_before: datetime | None = None,
    shard: str | None = None,
    progress: InTree | None = None,
) -> Iterator[Done | Failure]:
    """Reseal every model of a tree in its place, one after the other.

    A second run reseals all models again. Where ``created_before`` is the time at which the first
    run began, it leaves out the models that the first run finished.

    Args:
        tree: the folder.
        to: as for ``keymgmt.reseal``.
        sign: likewise.
        keys: likewise.
        fingerprints: likewise.
        expires: likewise.
        created_before: only models that were sealed or resealed before this time, with a time
            zone, by their manifest. A model that the config would refuse is not left out.
        shard: as for ``keymgmt.rewrap_tree``.
        progress: told the model's folder, its bytes done, and those in all.

    Raises:
        ConfigError: a time without a time zone; or the config, or ``shard``, is wrong.
    """
    if created_before is not None and created_before.tzinfo is None:
        raise ConfigError(f"{created_before:%Y-%m-%d %H:%M:%S} has no time zone")
    before = utc_text(created_before) if created_before is not None else None
    with use_config(keys) as config:

        def one(path: Place) -> Done:
            if before is not None:
                with Candidate.read(path) as candidate:
                    if candidate.manifest.created >= before:
                        candidate.trust(config)
                        return done(path, "current", candidate.manifest, None)
            made = reseal(
                path,
                to=to,
                sign=sign,
                keys=config,
                fingerprints=fingerprints,
                expires=expires,
                progress=partial(progress, str(path)) if progress else None,
            )
            return done(path, "resealed", made.manifest, made.refusal)

        def done(path: Place, state: str, manifest: Manifest, refused: object) -> Done:
            detail = {
                "name": manifest.name,
                "release": manifest.release,
                "id": manifest.id.hex(),
                "refusal": str(refused) if refused else None,
            }
            return Done(str(path), state, detail)

        yield from _each(tree, one, "reseal", 1, shard)
