"""Where a sealed model was last pulled from or pushed to: ``.keymgmt.origin`` in its folder.

Nothing connects to this address. It is compared with a location that a person gave, so that a push
does not move a tag over somebody else's change, and a pull does not lose a change made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from keymgmt._remote.location import DIGEST
from keymgmt._system.strict_json import dump_json, load_json
from keymgmt.errors import FormatError
from keymgmt.sealed.folder import KEYS, MAX_ORIGIN, ORIGIN, SIGNATURES

if TYPE_CHECKING:
    from keymgmt._remote.artifact import Artifact
    from keymgmt._remote.location import Location
    from keymgmt.sealed.folder import ModelFolder

__all__ = ["Origin"]

_FORMAT: Final = "keymgmt-origin/1"


@dataclass(frozen=True)
class Origin:
    """The state in which a folder and a repository were equal.

    Attributes:
        repository: ``oci://HOST/REPOSITORY``.
        digest: digest of the artifact.
        files: digests of keys.json and signatures.json, which may change without a new model.
    """

    repository: str
    digest: str
    files: Mapping[str, str]

    @classmethod
    def of(cls, location: Location, artifact: Artifact) -> Origin:
        """The origin of a model that was just pulled or pushed."""
        files = {n: artifact.files[n].digest for n in (KEYS, SIGNATURES) if n in artifact.files}
        return cls(f"{location.origin}/{location.path}", artifact.digest, files)

    @classmethod
    def read(cls, folder: ModelFolder) -> Origin | None:
        """The origin of a folder; None where the file is missing or cannot be used."""
        content = folder.read(ORIGIN, MAX_ORIGIN, optional=True)
        if not content:
            return None
        try:
            reader = load_json(content, ORIGIN, MAX_ORIGIN)
            reader.version(_FORMAT, "another version of keymgmt wrote it")
            origin = cls(
                reader.text("repository", limit=1024),
                reader.text("digest", limit=80),
                reader.texts("files", most=2, key_limit=32, limit=80),
            )
            reader.end()
        except FormatError:
            return None
        whole = all(map(DIGEST.fullmatch, (origin.digest, *origin.files.values())))
        return origin if whole else None

    def to_bytes(self) -> bytes:
        """The content of the file."""
        return dump_json(
            {
                "format": _FORMAT,
                "repository": self.repository,
                "digest": self.digest,
                "files": dict(self.files),
            }
        )

    def at(self, location: Location) -> str | None:
        """The digest if this origin is in the location's repository, else None."""
        return self.digest if self.repository == f"{location.origin}/{location.path}" else None
