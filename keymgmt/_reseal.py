"""Reseal: a new data key and a new id, the answer to a party that must lose access.

The plaintext goes from the old segments to the new ones through one buffer per thread and touches
no disk.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keymgmt._audit import audit
from keymgmt._config import use_config
from keymgmt._dek import Dek
from keymgmt._files import new_directory
from keymgmt._inspect import Inspection, inspect
from keymgmt._open import SealedModel, open_model
from keymgmt._recipients import resolve_groups
from keymgmt._seal import check_target, exists, write_sealed
from keymgmt._sign import Signer
from keymgmt.errors import ConfigError
from keymgmt.sealed.payload import seal_payload

if TYPE_CHECKING:
    from keymgmt._config import Config
    from keymgmt.sealed.manifest import FileEntry

__all__ = ["reseal"]


def reseal(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    to: Sequence[str] = (),
    sign: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
    name: str | None = None,
    release: int | None = None,
    fingerprints: Sequence[str] = (),
    progress: Callable[[int, int], object] | None = None,
) -> Inspection:
    """Encrypt a sealed model anew, under a new data key, for these recipients and no others.

    Args:
        path: the sealed model's folder.
        target: a new folder; by default ``path`` is replaced atomically.
        to: groups of recipients, written as for ``keymgmt.seal``; by default ``[seal] to``.
            The old groups are not taken over: who is to lose access must not stay by default.
        sign: the publisher's key; by default ``[seal] sign``, if the config had the old model's
            signature checked. Old signatures are not valid for the new data key: none is kept.
        keys: a loaded config, or the path of one.
        name: the model name that is expected; the new one has the same.
        release: its number; by default the old one.
        fingerprints: of recipient files that no trusted signer vouches for.
        progress: called with (bytes done, bytes in all).

    Raises:
        ConfigError: no recipients; no signer where this config requires signatures, or none named
            where it does not; ``target`` exists; or somebody else changes ``path`` for a minute.
        IntegrityError: another folder is at ``path`` by now; it is as it was.
        KeymgmtError: as ``keymgmt.open`` and ``keymgmt.seal``; the old model is as it was.
    """
    # Where a link leads to the model, the model is replaced and not the link.
    output = Path(target) if target is not None else Path(os.path.realpath(path))
    with use_config(keys) as config:
        if target is not None:
            check_target(output)
        groups = resolve_groups(list(to) or config.seal.to, config, fingerprints)
        signer = _signer(sign, config)
        try:
            with (
                open_model(path, name=name, keys=config) as model,
                new_directory(output, replace=target is None) as folder,
                Dek.generate() as dek,
            ):
                old, place = model.manifest, model._folder
                if target is None:
                    place.lock()
                manifest = write_sealed(
                    folder,
                    {entry.path: _SealedContent(model, entry) for entry in old.files},
                    dek,
                    groups,
                    signer,
                    template=dataclasses.replace(
                        old,
                        id=os.urandom(16),
                        release=old.release if release is None else release,
                        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                    ),
                    progress=progress,
                )
                if target is None:
                    place.check_place()
        except FileExistsError as error:
            raise exists(output) from error
        audit("reseal", model=manifest.id.hex(), name=manifest.name, was=old.id.hex())
        return inspect(output)


def _signer(sign: str | None, config: Config) -> Signer | None:
    required, default = config.policy.require_signature, config.seal.sign
    if sign is None and required and default is None:
        raise ConfigError(
            "no key to sign with, and this config opens only signed models",
            hint="name one with --sign PROVIDER:KEY, or in [seal] sign",
        )
    if sign is None and not required and default is not None:
        raise ConfigError(
            "this config accepts models with nobody's signature, so [seal] sign does not vouch for "
            "what comes out of them",
            hint=f"say so if you do: --sign {default}",
        )
    key = sign if sign is not None else default
    return Signer(config, key) if key is not None else None


class _SealedContent:
    def __init__(self, model: SealedModel, entry: FileEntry) -> None:
        self._model, self._path = model, entry.path
        self.size = entry.size

    def seal(self, target_fd: int, **parameters: Any) -> bytes:
        with self._model.reader(self._path) as reader:
            return seal_payload(reader, self.size, target_fd, **parameters)
