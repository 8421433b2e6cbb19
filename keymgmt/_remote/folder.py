"""A sealed model that is not on this machine: its files are requested by name, part by part."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt._remote.bucket import bucket_storage
from keymgmt._remote.cache import CachedStorage
from keymgmt._remote.location import BUCKETS, Location
from keymgmt._remote.patience import Patience
from keymgmt._remote.registry import Registry
from keymgmt._remote.storage import changed
from keymgmt._remote.web import web_storage
from keymgmt._system.deadline import begin
from keymgmt.errors import FormatError, IntegrityError, StorageUnavailable
from keymgmt.sealed.folder import MANIFEST, ModelFolder, payload_name

if TYPE_CHECKING:
    from keymgmt._config.remote import Remote
    from keymgmt._remote.storage import Part, Storage
    from keymgmt._system.steps import Wait
    from keymgmt.sealed.ciphertext import Ciphertext

__all__ = ["RemoteFolder", "has_model", "open_folder"]

_THREADS: Final = 8  # requests at once: most of the time is network latency
_HEAD: Final = 1 << 16  # the first request of a payload file; a small file ends within it
_SMALL: Final = 1 << 20  # the first request of another file


class RemoteFolder(ModelFolder):
    """A sealed model at a location.

    The folder is not listed: only files that the manifest names are requested. It is not locked: of
    two processes that replace a file at the same time, the second is refused.
    """

    def __init__(self, path: str, storage: Storage) -> None:
        """``path`` is the location as messages show it."""
        self.path = path
        self._storage = storage
        self._pins: dict[str, str] = {}
        self._begun: dict[str, Callable[[], Part | None]] = {}

    def expect(self, *names: str) -> None:
        """Begin to read small files that are read soon, or their beginnings if they are large."""
        for name in names:
            if name not in self._begun:
                self._begun[name] = begin(partial(self._storage.part, name, 0, _SMALL))

    def has(self, name: str) -> bool:
        """Whether there is a small file; what was read of it is not read again."""
        part = self._storage.part(name, 0, _SMALL)
        self._begun[name] = lambda: part
        return part is not None

    def read(self, name: str, limit: int, *, optional: bool = False) -> bytes:
        """Read a small file; raises as ``SealedFolder.read``, and StorageError."""
        part = self._begun.pop(name, partial(self._storage.part, name, 0, _SMALL))()
        if part is None:
            if optional:
                return b""
            raise FormatError(
                f"{self.path} has no {name}", hint="it is no sealed model, or not all of one"
            )
        if part.total > limit:
            raise FormatError(f"{name} is larger than {limit} bytes")
        self._pins[name] = part.pin
        content = bytes(part.content)
        if part.total > _SMALL:
            content += self._part(name, _SMALL, part.total).content
        _check_length(content, 0, part.total)
        return content

    def replacing(self, name: str, content: bytes) -> Generator[Wait, None, None]:
        """Replace a small file unless it was replaced since it was read; raises as ``Storage``."""
        yield partial(self._replace, name, content)

    def _replace(self, name: str, content: bytes) -> None:
        self._pins[name] = self._storage.replace(name, content, self._pins.get(name, ""))
        self.check_written(name, content)

    def stamp(self, name: str) -> str:
        """The ETag of a small file that was read."""
        return self._pins.get(name, "")

    def open_payload(self, path: str) -> Ciphertext:
        """The ciphertext of a model's file; raises as ``SealedFolder``, and StorageError."""
        return _RemoteCiphertext(self._part, payload_name(path))

    def _part(self, name: str, start: int, end: int) -> Part:
        """A part of a payload file; IntegrityError where the file was replaced meanwhile."""
        pin = self._pins.get(name, "")
        part = self._storage.part(name, start, end, pin)
        if part is None:
            raise IntegrityError(f"{name} is missing", hint="upload the sealed model again")
        if self._pins.setdefault(name, part.pin) != part.pin:
            raise changed(name)
        return part


class _RemoteCiphertext:
    """One payload file; each thread requests as many segments at once as it decrypts."""

    threads: int | None = _THREADS

    def __init__(self, fetch_part: Callable[[str, int, int], Part], name: str) -> None:
        """``fetch_part`` requests a part of the file ``name``; nothing is requested yet."""
        self._fetch_part, self._name = fetch_part, name
        self._first: Part | None = None

    @property
    def _head(self) -> Part:
        """The beginning of the file, which is the whole of a small file."""
        # Not a cached_property, of which all objects share one lock before Python 3.12.
        if self._first is None:
            self._first = self._fetch_part(self._name, 0, _HEAD)
        return self._first

    def length(self) -> int:
        """The length of the file in bytes, by its first part."""
        return self._head.total

    def parts(self) -> _Parts:
        """A reader of the file for one thread."""
        return _Parts(self._fetch, self._head.content)

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def _fetch(self, start: int, end: int) -> memoryview:
        part = self._fetch_part(self._name, start, end)
        if part.total != self._head.total:
            raise changed(self._name)
        _check_length(part.content, start, end)
        return part.content


class _Parts:
    def __init__(self, fetch: Callable[[int, int], memoryview], head: memoryview) -> None:
        self._fetch = fetch
        self._start, self._held = 0, head

    def read(self, offset: int, length: int, until: int = 0) -> memoryview:
        skip = offset - self._start
        if skip < 0 or skip + length > len(self._held):
            self._held = memoryview(b"")  # released first, so that there are never two parts
            self._start, skip = offset, 0
            self._held = self._fetch(offset, max(until, offset + length))
        return self._held[skip : skip + length]


def open_folder(text: str, settings: Remote) -> RemoteFolder:
    """The sealed model at a location; nothing is requested yet.

    Raises:
        ConfigError: ``text`` is not a location, a package is not installed, or a secret is missing.
    """
    location = Location.parse(text)
    looked_at: RemoteFolder | None = settings.kept.pop(("folder", location))
    return looked_at or _open(location, settings)


def has_model(location: Location, settings: Remote) -> bool:
    """Whether a location has a manifest, with which the next ``open_folder`` of it goes on.

    Raises as ``open_folder``, and StorageError.
    """
    folder = _open(location, settings)
    if not folder.has(MANIFEST):
        return False
    settings.kept.get(("folder", location), folder, lambda: folder)
    return True


def _open(location: Location, settings: Remote) -> RemoteFolder:
    storage: Storage
    if location.scheme == "oci":
        storage = Registry(location, settings)
    else:
        make = bucket_storage if location.scheme in BUCKETS else web_storage
        storage = make(location, settings, Patience(settings.deadline, str(location)))
    if settings.cache is not None:
        storage = CachedStorage(storage, str(location), Path(settings.cache), settings.cache_limit)
    return RemoteFolder(str(location), storage)


def _check_length(content: bytes | memoryview, start: int, end: int) -> None:
    if len(content) != end - start:
        raise StorageUnavailable(
            f"{len(content)} bytes came in the place of {end - start}",
            hint="the server, or a proxy on the way, cuts answers short",
        )
