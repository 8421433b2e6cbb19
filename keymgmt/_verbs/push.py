"""Push: upload a sealed model to a registry, except the files that are there already."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keymgmt import floe
from keymgmt._config.config import use_config
from keymgmt._remote.artifact import Artifact, Blob, blob_of
from keymgmt._remote.location import Location
from keymgmt._remote.origin import Origin
from keymgmt._remote.parallel import Parallel
from keymgmt._remote.registry import Registry
from keymgmt._system.audit import audit
from keymgmt._system.refused import translate
from keymgmt._trust.candidate import Candidate, refusal, wrong_digest
from keymgmt.errors import ConfigError, IntegrityError, KeymgmtError
from keymgmt.sealed.folder import KEYS, MANIFEST, ORIGIN, SIGNATURES, payload_name
from keymgmt.sealed.keys import MAX_KEYS
from keymgmt.sealed.manifest import FileEntry, Manifest
from keymgmt.sealed.payload import digest_in_order
from keymgmt.sealed.signatures import MAX_SIGNATURES

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt.sealed.ciphertext import Ciphertext

__all__ = ["Pushed", "push", "registry_location"]

log = logging.getLogger("keymgmt")
Progress = Callable[[int, int], object]
Read = Callable[[int, int], bytes | memoryview]


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        manifest: name, release, files and metadata.
        location: the location of the model, with its tag.
        digest: digest of the artifact: ``oci://HOST/REPOSITORY@DIGEST`` never names another one.
        sent: bytes of the files that the registry did not have.
        moved: whether the tag was created or moved.
        refusal: why this config would refuse to open the model; None where it would open it.
    """

    manifest: Manifest
    location: str
    digest: str
    sent: int
    moved: bool
    refusal: KeymgmtError | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "location": self.location,
            "digest": self.digest,
            "name": self.manifest.name,
            "release": self.manifest.release,
            "id": self.manifest.id.hex(),
            "sent": self.sent,
            "moved": self.moved,
            "refusal": str(self.refusal) if self.refusal else None,
        }


def push(
    path: str | os.PathLike[str],
    location: str,
    *,
    force: bool = False,
    keys: Config | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Upload a sealed model to a registry: only the files that are not there yet.

    An existing tag must have the digest with which the model was pulled from it or pushed to it.
    That is checked before anything is sent, and again before the tag is moved. Registries cannot
    check and move in one step: of two that push at the same moment, the second one wins.

    Args:
        path: the sealed model's folder.
        location: ``oci://HOST/REPOSITORY:TAG``.
        force: move the tag whatever its digest is.
        keys: a loaded config, or the path of one, with the login at the registry.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ConfigError: the config or the location is wrong, or the tag was moved meanwhile.
        SealedModelError: the model is damaged, as far as that can be seen without a key; or a file
            of it changed during the push.
        StorageError: the registry cannot be reached, or refuses the upload.
    """
    destination = registry_location(location)
    if destination.reference.startswith("sha256:"):
        raise ConfigError(
            f"{destination} is a digest, and a model is pushed to a tag",
            hint="write oci://HOST/REPOSITORY:TAG",
        )
    with (
        use_config(keys) as config,
        Candidate.read(path) as candidate,
        Registry(destination, config.remote, push=True) as registry,
    ):
        candidate.policy()
        before = registry.digest()
        upload = _Upload(candidate, registry, progress)
        artifact = upload.artifact
        origin = Origin.read(candidate.folder)
        moved = before != artifact.digest
        allowed = {None, artifact.digest, origin.at(destination) if origin else None}
        if before not in allowed and not force:
            raise _moved(destination, before, origin)
        # Also if the tag has this digest already: the registry may have lost a blob.
        sent = upload.run()
        if moved:
            now = registry.digest()
            if now != before and not force:
                raise _moved(destination, now, origin)
            registry.tag(artifact)
        try:
            candidate.folder.replace(ORIGIN, Origin.of(destination, artifact).to_bytes())
        except (OSError, ConfigError) as error:
            log.warning(
                "%s: cannot note what was pushed, so the next push to this tag needs --force: %s",
                path,
                error,
            )
        manifest = candidate.manifest
        audit("push", model=manifest.id.hex(), name=manifest.name, digest=artifact.digest)
        refused = refusal(path, config)
        return Pushed(manifest, str(destination), artifact.digest, sent, moved, refused)


def registry_location(location: str) -> Location:
    """Read a location in a registry; ConfigError where it is not one."""
    destination = Location.parse(location)
    if destination.scheme != "oci":
        raise ConfigError(f"{destination} is no registry", hint="write oci://HOST/REPOSITORY:TAG")
    return destination


def _moved(destination: Location, now: str | None, origin: Origin | None) -> ConfigError:
    was = origin.at(destination) if origin else None
    before = f"and was {was} when this model was pulled" if was else "and this model is not from it"
    return ConfigError(
        f"{destination} is {now or 'gone'} by now, {before}",
        hint="pull it and do the work again, push to another tag, or move the tag with --force",
    )


class _Upload:
    """The upload of one sealed model."""

    def __init__(self, candidate: Candidate, registry: Registry, progress: Progress | None) -> None:
        """Read and hash all files of the model."""
        folder, manifest = candidate.folder, candidate.manifest
        self._candidate, self._registry = candidate, registry
        self._small = {MANIFEST: candidate.data, KEYS: folder.read(KEYS, MAX_KEYS)}
        if signatures := folder.read(SIGNATURES, MAX_SIGNATURES, optional=True):
            self._small[SIGNATURES] = signatures
        self._paths = {payload_name(entry.path): entry.path for entry in manifest.files}
        size = sum(
            floe.ciphertext_length(entry.size, manifest.segment_length) for entry in manifest.files
        )
        self._transfers = Parallel(progress, 2 * size + sum(map(len, self._small.values())))
        blobs = {name: blob_of(content) for name, content in self._small.items()}
        hashed = self._transfers.map(self._hash, manifest.files)
        blobs |= zip(self._paths, hashed, strict=True)
        self.artifact = Artifact.make(manifest, blobs)

    def _hash(self, entry: FileEntry) -> Blob:
        """The blob of a payload file, which is the one of the manifest."""
        manifest, digest = self._candidate.manifest, hashlib.sha256()

        def each(part: memoryview) -> None:
            digest.update(part)
            self._transfers.advance(len(part))

        with self._open(entry.path) as source:
            try:
                root = digest_in_order(
                    source,
                    entry.size,
                    each,
                    segment_length=manifest.segment_length,
                    digest=manifest.digest,
                )
            except IntegrityError as error:
                raise IntegrityError(
                    f"{payload_name(entry.path)}: {error}", hint=error.hint
                ) from error
            if root != entry.digest:
                raise wrong_digest(entry.path)
            return Blob(f"sha256:{digest.hexdigest()}", source.length())

    @contextlib.contextmanager
    def _open(self, path: str) -> Iterator[Ciphertext]:
        try:
            with contextlib.closing(self._candidate.folder.open_payload(path)) as source:
                yield source
        except OSError as error:
            raise translate(error, payload_name(path)) from error

    def run(self) -> int:
        """Send the files that the registry does not have; returns their bytes."""
        artifact = self.artifact
        sent = sum(self._transfers.map(self._put, artifact.files))
        config = blob_of(artifact.config)
        if not self._registry.has(config):
            self._registry.put(config, lambda: io.BytesIO(artifact.config))
        return sent

    def _put(self, name: str) -> int:
        blob, advance = self.artifact.files[name], self._transfers.advance
        if self._registry.has(blob):
            advance(blob.size)
            return 0
        with contextlib.ExitStack() as stack:
            small = self._small.get(name)
            if small is None:
                source = stack.enter_context(self._open(self._paths[name]))
                self._registry.put(blob, lambda: _Body(source.parts().read, blob, advance))
            else:
                self._registry.put(
                    blob, lambda: _Body(lambda start, count: small[start:][:count], blob, advance)
                )
        return blob.size


class _Body:
    """A file as the body of a request; it is not sent to its end if it has changed."""

    def __init__(self, read: Read, blob: Blob, advance: Callable[[int], object]) -> None:
        """``read`` gives bytes by position and number."""
        self._read, self._blob, self._advance = read, blob, advance
        self._done, self._digest = 0, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        left = self._blob.size - self._done
        try:
            part = bytes(self._read(self._done, min(size, left) if size >= 0 else left))
        except OSError as error:
            # Otherwise urllib3 would report a fault of the connection.
            raise translate(error, "the file that is sent") from error
        self._done += len(part)
        self._digest.update(part)
        if self._done == self._blob.size and self._digest.hexdigest() not in self._blob.digest:
            raise IntegrityError(
                "a payload file changed while it was sent",
                hint="look who writes to the sealed model, and push it again",
            )
        self._advance(len(part))
        return part
