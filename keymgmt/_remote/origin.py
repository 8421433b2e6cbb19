"""Where a sealed model was last pulled from or pushed to: ``.keymgmt.origin`` in its folder.

Nothing connects to this address. It is compared with a location that a person gave, so that a push
does not move a tag over somebody else's change, and a pull does not lose a change made here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keymgmt._remote.location import DIGEST
from keymgmt._system.strict_json import dump_json
from keymgmt.sealed.folder import KEYS, MAX_ORIGIN, ORIGIN, SIGNATURES

if TYPE_CHECKING:
    from keymgmt._remote.artifact import Artifact
    from keymgmt._remote.location import Location
    from keymgmt.sealed.folder import ModelFolder

__all__ = ["Origin"]

Digest = Annotated[str, Field(pattern=f"^{DIGEST.pattern}$")]


class Origin(BaseModel):
    """The state in which a folder and a repository were equal.

    Attributes:
        format: of the file.
        repository: ``oci://HOST/REPOSITORY``.
        digest: digest of the artifact.
        files: digests of keys.json and signatures.json, which may change without a new model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["keymgmt-origin/1"] = "keymgmt-origin/1"
    repository: str
    digest: Digest
    files: dict[str, Digest]

    @classmethod
    def of(cls, location: Location, artifact: Artifact) -> Origin:
        """The origin of a model that was just pulled or pushed."""
        files = {n: artifact.files[n].digest for n in (KEYS, SIGNATURES) if n in artifact.files}
        repository = f"{location.origin}/{location.path}"
        return cls(repository=repository, digest=artifact.digest, files=files)

    @classmethod
    def read(cls, folder: ModelFolder) -> Origin | None:
        """The origin of a folder; None where the file is missing or cannot be used."""
        try:
            return cls.model_validate_json(folder.read(ORIGIN, MAX_ORIGIN, optional=True))
        except ValidationError:
            return None

    def to_bytes(self) -> bytes:
        """The content of the file."""
        return dump_json(self.model_dump())

    def at(self, location: Location) -> str | None:
        """The digest if this origin is in the location's repository, else None."""
        return self.digest if self.repository == f"{location.origin}/{location.path}" else None
