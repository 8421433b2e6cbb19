"""Reseal: encrypt a model under a new data key, with a new id, to take access away from a party.

The plaintext goes from the old segments to the new ones through one buffer per thread and touches
no disk.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from keymgmt._config.config import use_config
from keymgmt._crypto.dek import Dek
from keymgmt._remote.location import need_folder
from keymgmt._system.audit import audit
from keymgmt._system.files import new_directory, replace_file
from keymgmt._trust.candidate import Candidate, refusal
from keymgmt._trust.recipients import resolve_groups
from keymgmt._verbs.inspect import Inspection, inspect
from keymgmt._verbs.open import open_model
from keymgmt._verbs.seal import Content, check_target, exists, replaceable, write_sealed
from keymgmt._verbs.sign import Signer, expiry_text
from keymgmt.errors import ConfigError
from keymgmt.sealed.folder import MAX_ORIGIN, ORIGIN
from keymgmt.sealed.times import utc_text

if TYPE_CHECKING:
    from datetime import datetime

    from keymgmt._config.config import Config
    from keymgmt.sealed.profiles import Profile

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
    expires: datetime | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Inspection:
    """Encrypt a sealed model anew, under a new data key, for these recipients and no others.

    Args:
        path: the sealed model's folder.
        target: a new folder; by default ``path`` is replaced atomically, and keeps its owner,
            group and mode.
        to: groups of recipients, written as for ``keymgmt.seal``; by default ``[seal] to``.
            The old groups are not copied, so that a party does not keep its access by default.
        sign: the publisher's key; by default ``[seal] sign``, if the config required the old
            model's signature. Old signatures are not valid for the new data key and are dropped.
        keys: a loaded config, or the path of one.
        name: the model name that is expected; the new one has the same.
        release: release number; by default that of the old model.
        fingerprints: of recipient files that no trusted signer vouches for.
        expires: until when the signature counts; by default like that of the old model.
        progress: called with (bytes done, bytes in all).

    Raises:
        ConfigError: no recipients; no signer where this config requires signatures, or none named
            where it does not; ``target`` exists; the folder to replace holds what is not of the
            model; or somebody else changes it for a minute.
        IntegrityError: ``path`` is another folder by now, which is left as it was.
        KeymgmtError: as ``keymgmt.open`` and ``keymgmt.seal``; the old model is as it was.
    """
    need_folder(path)
    until = expiry_text(expires)
    # Where ``path`` is a link to the model, the model is replaced and not the link.
    output = Path(target) if target is not None else Path(os.path.realpath(path))
    with use_config(keys) as config:
        # Read before the key service is asked for the old key; its content is checked below.
        with Candidate.read(path) as candidate:
            candidate.policy()
            rules = candidate.manifest.rules
        if target is not None:
            check_target(output)
        else:
            replaceable(output)(output)
        groups = resolve_groups(list(to) or config.seal.to, config, fingerprints, rules)
        signer = _signer(sign, config, rules)
        try:
            with (
                open_model(path, name=name, keys=config) as model,
                new_directory(
                    output, replaceable=replaceable(output) if target is None else None
                ) as folder,
                Dek.generate() as dek,
            ):
                old, old_folder = model.manifest, model._folder
                if until is None and signer is not None and model.vouched is not None:
                    until = model.vouched.expires
                if target is None:
                    old_folder.lock()
                manifest = write_sealed(
                    folder,
                    {
                        entry.path: Content(
                            entry.path, entry.size, partial(model.reader, entry.path)
                        )
                        for entry in old.files
                    },
                    dek,
                    groups,
                    signer,
                    template=dataclasses.replace(
                        old,
                        id=os.urandom(16),
                        release=old.release if release is None else release,
                        created=utc_text(),
                    ),
                    expires=until,
                    progress=progress,
                )
                if target is None:
                    # The origin is kept: a push that follows needs it.
                    if origin := old_folder.read(ORIGIN, MAX_ORIGIN, optional=True):
                        replace_file(folder / ORIGIN, origin)
                    old_folder.check_place()
        except FileExistsError as error:
            raise exists(output) from error
        audit("reseal", model=manifest.id.hex(), name=manifest.name, was=old.id.hex())
        return dataclasses.replace(inspect(output), refusal=refusal(output, config))


def _signer(sign: str | None, config: Config, profile: Profile) -> Signer | None:
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
    return Signer(config, key, profile) if key is not None else None
