"""Opening a sealed model: trusted, unlocked, and read in memory."""

from __future__ import annotations

import contextlib
import hmac
import os
import threading
from typing import TYPE_CHECKING, Self

from keymgmt._admit import admit
from keymgmt._audit import audit
from keymgmt._config import use_config
from keymgmt._dek import Dek, wipe
from keymgmt._releases import remember_release, remembered_release
from keymgmt._unlock import Unlocker
from keymgmt.errors import IntegrityError, KeymgmtError, SealedModelError
from keymgmt.sealed.derive import commitment, file_key, payload_aad
from keymgmt.sealed.payload import PayloadReader

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from typing_extensions import Buffer

    from keymgmt._admit import Candidate
    from keymgmt._config import Config
    from keymgmt._trust import Publisher
    from keymgmt.sealed.manifest import FileEntry, Manifest

__all__ = ["SealedModel", "open_model"]


class SealedModel:
    """An open sealed model; a context manager that wipes its keys on exit.

    Every read is verified before it returns: each segment is authenticated, and where the config
    requires signatures the digests that the publisher signed are checked on the same bytes. Reads
    may run in several threads.

    Attributes:
        manifest: what the model is, its files and metadata.
        publisher: file name of the trusted publisher's key, or None where none was required.
        group: index of the group of recipients that opened it; None if a cached key did.
    """

    def __init__(
        self,
        candidate: Candidate,
        dek: Dek,
        *,
        publisher: Publisher | None = None,
        group: int | None = None,
        check_digests: bool = True,
    ) -> None:
        self.manifest: Manifest = candidate.manifest
        self.publisher = publisher.file.name if publisher else None
        self.group = group
        self._folder = candidate.folder
        self._dek = dek
        self._check_digests = check_digests
        self._readers: dict[str, tuple[int, PayloadReader]] = {}
        self._lock = threading.Lock()

    def read_into(
        self, path: str, buffer: Buffer, progress: Callable[[int], object] | None = None
    ) -> None:
        """Decrypt a whole file into a writable buffer, on all cores.

        Args:
            path: as the manifest lists it.
            buffer: contiguous and exactly as long as the file.
            progress: told the number of bytes done.

        Raises:
            FileNotFoundError: no such file in the model.
            ValueError: the buffer has another length, or the model is closed.
            IntegrityError: damaged or forged; the buffer was wiped.
            SealedModelError: the disk does not read; the buffer was wiped.
        """
        with self.naming(path):
            self.reader(path).read_into(buffer, progress)

    def read(self, path: str) -> bytearray:
        """Decrypt a whole file into new memory, which the caller may wipe; raises alike."""
        content = bytearray(self.manifest.file(path).size)
        self.read_into(path, content)
        return content

    def verify(self, path: str, progress: Callable[[int], object] | None = None) -> None:
        """Authenticate a whole file and keep nothing of it; raises as ``read_into``."""
        with self.naming(path):
            self.reader(path).verify(progress)

    def open(self, path: str) -> io.RawIOBase:
        """A read-only seekable file that decrypts what is read of it; closed with the model."""
        return self.reader(path).open()

    @contextlib.contextmanager
    def naming(self, path: str) -> Iterator[None]:
        """What is wrong with a payload file is said with its name."""
        try:
            yield
        except IntegrityError as error:
            raise IntegrityError(
                f"{path} of {self.manifest.name}: {error}",
                hint=error.hint or "it was damaged on its way or changed; fetch it again",
            ) from error
        except OSError as error:
            raise SealedModelError(
                f"cannot read {path} of {self.manifest.name}: {error.strerror}",
                hint="look at the disk that it is on",
            ) from error

    def reader(self, path: str) -> PayloadReader:
        """The payload reader of one file; it is the model's, and closed with it."""
        entry = self.manifest.file(path)
        with self._lock:
            if path not in self._readers:
                self._readers[path] = self._make_reader(entry)
            return self._readers[path][1]

    def _make_reader(self, entry: FileEntry) -> tuple[int, PayloadReader]:
        manifest = self.manifest
        key = file_key(self._dek, manifest.id, entry.path)
        descriptor = -1
        try:
            descriptor = self._folder.open_payload(entry.path)
            return descriptor, PayloadReader(
                descriptor,
                entry.size,
                key=key,
                aad=payload_aad(manifest.id, entry.path),
                segment_length=manifest.segment_length,
                digest=manifest.digest,
                root=entry.digest if self._check_digests else None,
            )
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise
        finally:
            wipe(key)

    def close(self) -> None:
        """Wipe the keys and close the files; may be called again."""
        with self._lock:
            readers, self._readers = self._readers, {}
            for descriptor, reader in readers.values():
                reader.close()
                os.close(descriptor)
            self._dek.wipe()
            self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SealedModel {self.manifest.name} release {self.manifest.release}>"


def open_model(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
) -> SealedModel:
    """Open a sealed model: check who made it, unlock it, and give its files.

    Args:
        path: the sealed model's folder.
        name: the model name that is expected; another one is refused.
        keys: a loaded config, or the path of one; by default the one that ``load_config`` finds.

    Raises:
        ConfigError: the config, or a secret source of it, is wrong.
        FormatError, IntegrityError: the model is not of the format, or damaged or forged.
        UntrustedPublisher, RollbackError: the config does not let it in.
        CannotUnlock: no recipient opens here; ``attempts`` says why, one by one.
    """
    with use_config(keys) as config:
        candidate, publisher = admit(path, config, name)
        try:
            return _unlock(candidate, publisher, config)
        except KeymgmtError as error:
            audit("load", error=error, model=candidate.manifest.id.hex())
            candidate.folder.close()
            raise
        except BaseException:
            candidate.folder.close()
            raise


def _unlock(candidate: Candidate, publisher: Publisher | None, config: Config) -> SealedModel:
    manifest = candidate.manifest
    dek, group = _data_key(candidate, config)
    try:
        if config.policy.remember_releases:
            _remember(candidate, config.policy.remember_releases)
    except BaseException:
        dek.wipe()
        raise
    audit("load", model=manifest.id.hex(), name=manifest.name, release=manifest.release)
    return SealedModel(
        candidate,
        dek,
        publisher=publisher,
        group=group,
        check_digests=config.policy.require_signature,
    )


def _data_key(candidate: Candidate, config: Config) -> tuple[Dek, int | None]:
    """The data key, from the config's cache if it has one, and the group that opened."""
    manifest, policy, cache = candidate.manifest, candidate.policy(), config.cache
    if cache is None:
        return Unlocker(config, manifest, policy).unlock()
    # Any change of the manifest or of who may open it is another name, and asks again.
    name = policy.manifest + policy.mac
    dek = cache.get(name)
    if dek is not None and hmac.compare_digest(commitment(dek, manifest.id), manifest.commitment):
        policy.check_mac(dek, manifest.id)
        return dek, None
    dek, group = Unlocker(config, manifest, policy).unlock()
    cache.put(name, dek)
    return dek, group


def _remember(candidate: Candidate, memory: Path) -> None:
    """Raise the floor, but only for a release that is whole: its digests are checked first."""
    manifest = candidate.manifest
    if manifest.release != remembered_release(memory, manifest.name):
        candidate.check_digests()
        remember_release(memory, manifest.name, manifest.release)
