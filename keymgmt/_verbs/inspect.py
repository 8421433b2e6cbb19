"""Inspect a sealed model without any key, config or trust."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from keymgmt._config.config import use_config
from keymgmt._remote.location import is_location
from keymgmt._trust.candidate import Candidate
from keymgmt.errors import KeymgmtError
from keymgmt.sealed.keys import recipient_name
from keymgmt.sealed.manifest import Manifest

if TYPE_CHECKING:
    from keymgmt._config.config import Config

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """The description that a sealed model gives of itself; nothing of it was verified.

    Attributes:
        path: the folder.
        manifest: name, release, files and the rest.
        groups: the recipients of each group; any one group opens the model.
        signers: ids of the keys that claim to have signed (SHA-384 of the DER public key, hex).
        expiries: the times until which they claim that their signatures count, by the same ids.
        refusal: after a seal, why the same config would refuse to open the model, or None.
    """

    path: str
    manifest: Manifest
    groups: tuple[tuple[str, ...], ...]
    signers: tuple[str, ...]
    expiries: Mapping[str, str] = field(default_factory=dict)
    refusal: KeymgmtError | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "path": self.path,
            "verified": False,
            "manifest": self.manifest.to_json(),
            "size": self.manifest.size,
            "groups": [list(group) for group in self.groups],
            "signers": list(self.signers),
            "expiries": dict(self.expiries),
            "refusal": str(self.refusal) if self.refusal else None,
        }


def inspect(
    path: str | os.PathLike[str], *, keys: Config | str | os.PathLike[str] | None = None
) -> Inspection:
    """Read a sealed model's small files.

    Args:
        path: the sealed model's folder, or its location (``https://HOST/PATH``).
        keys: the config of whose ``[remote]`` a location is read; a folder needs none.

    Raises:
        SealedModelError: the files are not of the format.
        ConfigError: there is no such folder; or the config is wrong.
        StorageError: the location cannot be reached, or refuses access.
    """
    with contextlib.ExitStack() as stack:
        remote = stack.enter_context(use_config(keys)).remote if is_location(path) else None
        candidate = stack.enter_context(Candidate.read(path, remote))
        policy = candidate.policy()
        return Inspection(
            str(path),
            candidate.manifest,
            tuple(
                tuple(recipient_name(wrapped) for wrapped in group.recipients)
                for group in policy.groups
            ),
            tuple(signed.key_id for signed in candidate.signatures.signatures),
            {one.key_id: one.expires or "" for one in candidate.signatures.expiries},
        )
