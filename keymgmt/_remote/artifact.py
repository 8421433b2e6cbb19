"""A sealed model as an OCI 1.1 artifact: one blob for each file, in ModelPack's media types.

Registries, scanners and Kubernetes see a model of the CNCF ModelPack, whose format is keymgmt's.
Each layer is one file of the folder, neither packed nor compressed, with the file's name as title.
The names and sizes that a registry gives may be forged: they only lead to the blob of a name that
is known from elsewhere, in the end from the sealed manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from keymgmt._remote.location import DIGEST
from keymgmt._system.strict_json import JsonReader, load_json
from keymgmt.errors import ConfigError, FormatError
from keymgmt.sealed.folder import PAYLOAD
from keymgmt.sealed.manifest import FORMAT, Manifest

if TYPE_CHECKING:
    from keymgmt.sealed.ciphertext import Ciphertext

__all__ = ["MEDIA_TYPE", "Artifact", "Blob", "blob_of", "hash_file"]

MEDIA_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
# https://github.com/modelpack/model-spec
_ARTIFACT: Final = "application/vnd.cncf.model.manifest.v1+json"
_CONFIG: Final = "application/vnd.cncf.model.config.v1+json"
_WEIGHT: Final = "application/vnd.cncf.model.weight.v1.raw"
_WEIGHT_CONFIG: Final = "application/vnd.cncf.model.weight.config.v1.raw"
_FILE: Final = "org.cncf.model.filepath"
_TITLE: Final = "org.opencontainers.image.title"
_CHUNK: Final = 1 << 20
MAX_ARTIFACT: Final = 4 << 20  # what registries take, by the distribution specification


@dataclass(frozen=True)
class Blob:
    """The digest (``sha256:`` and hex) of a file in a registry, and its size in bytes."""

    digest: str
    size: int


def blob_of(content: bytes | memoryview) -> Blob:
    """The digest and size of some bytes."""
    return Blob(f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))


def hash_file(source: Ciphertext, progress: Callable[[int], object]) -> Blob:
    """The digest and size of a payload file; ``progress`` is called with the bytes of each part."""
    digest, size, parts = hashlib.sha256(), source.length(), source.parts()
    for start in range(0, size, _CHUNK):
        part = parts.read(start, min(_CHUNK, size - start), size)
        digest.update(part)
        progress(len(part))
    return Blob(f"sha256:{digest.hexdigest()}", size)


@dataclass(frozen=True)
class Artifact:
    """The manifest of an artifact, and the blob of each file that it names.

    Attributes:
        data: the manifest as it is stored.
        files: blob of each title.
        config: the content of the configuration blob, of an artifact that is to be pushed.
    """

    data: bytes
    files: Mapping[str, Blob]
    config: bytes = b""

    @cached_property
    def digest(self) -> str:
        """The digest of the manifest, which names this artifact and no other."""
        return blob_of(self.data).digest

    @classmethod
    def make(cls, manifest: Manifest, files: Mapping[str, Blob]) -> Artifact:
        """The artifact of a sealed model; the same files give the same bytes.

        Raises:
            ConfigError: there are so many files that registries do not take the manifest.
        """
        config = _dump(
            {
                "descriptor": {
                    "createdAt": manifest.created,
                    "name": manifest.name,
                    "version": str(manifest.release),
                },
                "config": {"format": FORMAT},
                "modelfs": {"type": "layers", "diffIds": [blob.digest for blob in files.values()]},
            }
        )
        data = _dump(
            {
                "schemaVersion": 2,
                "mediaType": MEDIA_TYPE,
                "artifactType": _ARTIFACT,
                "config": _descriptor(_CONFIG, blob_of(config)),
                "layers": [
                    _descriptor(_WEIGHT if name.startswith(f"{PAYLOAD}/") else _WEIGHT_CONFIG, blob)
                    | {"annotations": {_FILE: name, _TITLE: name}}
                    for name, blob in files.items()
                ],
                "annotations": {
                    "org.opencontainers.image.created": manifest.created,
                    "org.opencontainers.image.title": manifest.name,
                    "org.opencontainers.image.version": str(manifest.release),
                },
            }
        )
        if len(data) > MAX_ARTIFACT:
            raise ConfigError(
                f"{manifest.name} has {len(manifest.files)} files, which makes a manifest of "
                f"{len(data)} bytes, and registries take {MAX_ARTIFACT}",
                hint="seal it as fewer and larger files",
            )
        return cls(data, files, config)

    @classmethod
    def parse(cls, data: bytes) -> Artifact:
        """Read a manifest from a registry; FormatError where it is not one of a sealed model."""
        reader = load_json(data, "the artifact", MAX_ARTIFACT, canonical=False)
        fields = reader.rest()
        if "manifests" in fields or fields.get("mediaType", MEDIA_TYPE) != MEDIA_TYPE:
            raise _not_ours("it is an index, or an image of another kind")
        layers = fields.get("layers")
        if not isinstance(layers, list):
            raise _not_ours("it has no layers")
        files: dict[str, Blob] = {}
        for layer in layers:
            layer_reader = JsonReader(layer, "a layer of the artifact")
            blob = Blob(layer_reader.text("digest", limit=256), layer_reader.integer("size"))
            annotations = layer_reader.rest().get("annotations")
            title = annotations.get(_TITLE) if isinstance(annotations, dict) else None
            if not isinstance(title, str) or not DIGEST.fullmatch(blob.digest):
                raise _not_ours("a layer has no title, or no digest of SHA-256")
            if title in files:
                raise FormatError(f"the artifact has {title[:120]!r} twice")
            files[title] = blob
        return cls(data, files)

    def blob(self, name: str) -> Blob:
        """The blob of the file ``name``; FormatError where the artifact has no such file."""
        if name not in self.files:
            raise _not_ours(f"it has no {name}")
        return self.files[name]


def _descriptor(media_type: str, blob: Blob) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": blob.digest, "size": blob.size}


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _not_ours(why: str) -> FormatError:
    return FormatError(
        f"what the registry has there is no sealed model: {why}",
        hint="look at the repository and the tag: what is pulled, keymgmt pushed there",
    )
