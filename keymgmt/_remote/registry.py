"""One repository of a registry: manifests by tag or digest, blobs by digest.

https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

from keymgmt._remote.artifact import MAX_ARTIFACT, MEDIA_TYPE, Artifact, Blob, blob_of
from keymgmt._remote.download import Download
from keymgmt._remote.http import Http
from keymgmt._remote.login import Login
from keymgmt._remote.patience import Patience
from keymgmt._remote.storage import Part
from keymgmt._remote.url import redirected
from keymgmt._remote.web import total_of
from keymgmt._system.fork import ForkSafe
from keymgmt.errors import ConfigError, IntegrityError, StorageUnavailable

if TYPE_CHECKING:
    from pathlib import Path

    from _typeshed import SupportsRead

    from keymgmt._config.remote import Remote
    from keymgmt._remote.location import Location

__all__ = ["Registry"]

# Also what is none of ours is asked for: else a registry converts it, or says that it is broken.
_ACCEPT: Final = ", ".join(
    [
        MEDIA_TYPE,
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    ]
)


class Registry(ForkSafe):
    """The repository of a location, for any thread, and the files of the model that is there.

    A context manager: at its end, transfers in threads that were abandoned end too.
    """

    def __init__(self, location: Location, settings: Remote, *, push: bool = False) -> None:
        """Make a client; nothing is sent yet. ConfigError where the config is wrong."""
        self._location = location
        self._patience = Patience(settings.deadline, str(location))
        access = settings.access_to(location.origin)
        scheme = "http" if access.plain_http else "https"
        self._base = f"{scheme}://{location.host}/v2/{location.path}"
        scope = "pull,push" if push else "pull"
        login = Login(location, settings, access, self._patience, scope)
        self._http = Http(self._base, settings, access, self._patience, login)
        self._artifact: Artifact | None = None
        super().__init__()

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._patience.end()  # for threads that were abandoned

    @property
    def artifact(self) -> Artifact:
        """The artifact at the location; a tag is looked up once, so that it cannot move meanwhile.

        Raises:
            ConfigError: there is none.
            FormatError: the artifact is not a sealed model.
            IntegrityError: the manifest does not have the digest that was announced or requested.
            StorageError: it is not to be had.
        """
        with self._lock:
            if self._artifact is None:
                data = self._manifest()
                if data is None:
                    raise ConfigError(
                        f"{self._location} is not there: the registry knows no such repository or "
                        "tag",
                        hint="a registry may also say so to who may not read it: look at its name, "
                        'and at [remote.access."oci://HOST"] in the config',
                    )
                self._artifact = Artifact.parse(data)
            return self._artifact

    def digest(self) -> str | None:
        """The digest of the manifest that is at the location now; None where there is none."""
        data = self._manifest()
        return None if data is None else blob_of(data).digest

    def _manifest(self) -> bytes | None:
        reference = self._location.reference
        reply = self._http.request(
            "GET",
            f"{self._base}/manifests/{reference}",
            headers={"Accept": _ACCEPT},
            good=(200, 404),
            limit=MAX_ARTIFACT,
        )
        if reply.status == 404:
            return None
        if not reply.whole:
            raise StorageUnavailable(
                f"{self._location} is larger than {MAX_ARTIFACT} bytes",
                hint="it is no sealed model: look at the repository and the tag",
            )
        data = bytes(reply.body)
        digest = blob_of(data).digest
        announced = reply.headers.get("docker-content-digest", digest)
        if announced != digest or (reference.startswith("sha256:") and reference != digest):
            raise IntegrityError(
                f"the registry gave another manifest for {self._location} than it says",
                hint="the registry, or a cache on the way, is broken or hostile",
            )
        return data

    def read(self, blob: Blob, limit: int, name: str) -> bytes:
        """The content of a small blob, the file ``name`` of a sealed model.

        Raises:
            IntegrityError: it is missing, or another.
            StorageError: it is not to be had.
        """
        size = min(limit, blob.size)
        reply = self._http.request("GET", self._blob(blob), good=(200, 404), limit=size)
        if reply.status == 404:
            raise self._missing(name)
        content = bytes(reply.body)
        if not reply.whole or blob_of(content) != blob:
            raise self._another(name)
        return content

    def download(self, blob: Blob, file: Path, name: str, advance: Callable[[int], object]) -> int:
        """Download a large blob, or what an earlier try left of it, into a file; bytes that came.

        ``advance`` as for ``Download``.

        Raises:
            IntegrityError: it is missing, or another; of another one nothing is left.
            StorageError: it is not to be had; what came is kept.
            OSError: the file cannot be written.
        """
        with Download(file, blob, advance) as download:
            received = 0
            # What an earlier try left may be of another content: then all of it comes once more.
            for _ in range(2 if download.done else 1):
                before = download.done
                if not self._http.fetch(self._blob(blob), download):
                    raise self._missing(name)
                received += download.done - before
                if download.whole:
                    return received
                download.restart()
        file.unlink()
        raise self._another(name)

    def part(self, name: str, start: int, end: int, pin: str = "") -> Part | None:  # noqa: ARG002
        """A part of a file, as ``Storage.part``; raises also as ``artifact``.

        Only of a whole blob the digest is checked.
        """
        blob = self.artifact.files.get(name)
        if blob is None:
            return None
        end = min(end, blob.size)
        if not start and end == blob.size:
            return Part(memoryview(self.read(blob, end, name)), blob.size, blob.digest)
        headers = {"Range": f"bytes={start}-{end - 1}"}
        reply = self._http.request(
            "GET", self._blob(blob), headers=headers, good=(200, 206, 404), limit=end - start
        )
        if reply.status == 404:
            raise self._missing(name)
        if total_of(reply, start, end) != blob.size:
            raise self._another(name)
        return Part(reply.body, blob.size, blob.digest)

    def replace(self, name: str, content: bytes, pin: str) -> str:  # noqa: ARG002
        """Refuse with ConfigError: only a push changes a registry."""
        raise ConfigError(
            f"{self._location} is in a registry, where nothing is changed",
            hint="pull the model, change it, and push it",
        )

    def has(self, blob: Blob) -> bool:
        """Whether the repository has the blob."""
        reply = self._http.request("HEAD", self._blob(blob), good=(200, 404), limit=0)
        return reply.status == 200

    def put(self, blob: Blob, body: Callable[[], SupportsRead[bytes]]) -> None:
        """Upload a blob; ``body`` opens its content, once for each try.

        Raises:
            StorageDenied, StorageUnavailable: the registry does not take it.
        """
        begin = f"{self._base}/blobs/uploads/"

        def work() -> None:
            reply = self._http.once("POST", begin, body=b"", good=(202, 404))
            if reply.status == 404:
                raise StorageUnavailable(
                    f"{self._location.origin} has no repository {self._location.path}",
                    hint="make it there: some registries make none by themselves",
                )
            address = redirected(begin, reply.headers.get("location", ""))
            joint = "&" if "?" in address else "?"
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(blob.size),
            }
            url = f"{address}{joint}digest={blob.digest.replace(':', '%3A')}"
            self._http.once("PUT", url, headers=headers, body=body, good=(201,))

        self._http.retry(work)

    def tag(self, artifact: Artifact) -> None:
        """Store an artifact's manifest at the location; its blobs are there already."""
        self._http.request(
            "PUT",
            f"{self._base}/manifests/{self._location.reference}",
            headers={"Content-Type": MEDIA_TYPE},
            body=artifact.data,
            good=(201,),
            limit=0,
        )

    def _missing(self, name: str) -> IntegrityError:
        """The error for a blob that the registry lacks."""
        return IntegrityError(
            f"{self._location} is not whole: the registry lacks its {name}",
            hint="it was deleted there, or never came: push the model again",
        )

    def _another(self, name: str) -> IntegrityError:
        """The error for a blob whose content does not have its digest."""
        return IntegrityError(
            f"the registry gave another {name} of {self._location} than its digest says",
            hint="the registry, or a cache on the way, is broken or hostile",
        )

    def _blob(self, blob: Blob) -> str:
        return f"{self._base}/blobs/{blob.digest}"
