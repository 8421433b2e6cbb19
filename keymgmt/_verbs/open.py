"""Open a sealed model: check that it is trusted, unlock it, and read it in memory."""

from __future__ import annotations

import contextlib
import hmac
import os
import threading
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING

from keymgmt._config.config import use_config
from keymgmt._crypto.dek import Dek, wipe
from keymgmt._system.audit import audit
from keymgmt._system.closing import Closing
from keymgmt._system.fork import ForkSafe
from keymgmt._system.pages import unwritten
from keymgmt._trust.candidate import admit
from keymgmt._trust.unlock import Opened, Unlocker
from keymgmt._verbs.device_file import DeviceFile
from keymgmt.errors import IntegrityError, KeymgmtError, SealedModelError
from keymgmt.sealed.derive import commitment, device_key, file_key, payload_aad
from keymgmt.sealed.payload import CheckedLeaves, PayloadReader

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from typing_extensions import Buffer

    from keymgmt._config.config import Config
    from keymgmt._trust.candidate import Candidate, Trust
    from keymgmt._trust.policy import Vouched
    from keymgmt.sealed.manifest import Manifest

__all__ = ["SealedModel", "open_model"]


class SealedModel(ForkSafe, Closing):
    """An open sealed model; a context manager that wipes its keys on exit.

    Every read is verified before it returns: each segment is authenticated, and where the config
    requires signatures the digests that the publisher signed are checked on the same bytes. Reads
    may run in several threads.

    Attributes:
        manifest: name, release, files and metadata.
        publisher: file names of the publishers' keys that signed, or None where none was required.
        vouched: whose signatures count and until when, or None where none was required.
        group: index of the group of recipients that opened it; None if a cached key did.
        opened_by: names of the providers of that group's keys; empty if a cached key did.
        failed: the providers of earlier groups that failed, each once, with its error.
    """

    def __init__(
        self,
        candidate: Candidate,
        dek: Dek,
        *,
        publisher: Vouched | None = None,
        opened: Opened | None = None,
        check_digests: bool = True,
    ) -> None:
        self.manifest: Manifest = candidate.manifest
        self.publisher = publisher.name if publisher else None
        self.vouched = publisher
        self.group = opened.group if opened else None
        self.opened_by = opened.providers if opened else ()
        self.failed = opened.failed if opened else ()
        self._folder, self._hash = candidate.folder, candidate.hash
        self._dek = dek
        self._check_digests = check_digests
        self._files: weakref.WeakSet[io.RawIOBase] = weakref.WeakSet()
        self._checked_leaves: defaultdict[str, CheckedLeaves] = defaultdict(CheckedLeaves)
        self._closed = False
        super().__init__()

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def read_into(
        self, path: str, buffer: Buffer, progress: Callable[[int], object] | None = None
    ) -> None:
        """Decrypt a whole file into a writable buffer, on all cores.

        Args:
            path: as the manifest lists it.
            buffer: contiguous and exactly as long as the file.
            progress: called with the number of bytes done.

        Raises:
            FileNotFoundError: no such file in the model.
            ValueError: the buffer has another length, or the model is closed.
            IntegrityError: damaged or forged; the buffer was wiped.
            SealedModelError: the disk cannot be read; the buffer was wiped.
        """
        with self.naming(path), self.reader(path) as reader:
            reader.read_into(buffer, progress)

    def read(self, path: str) -> bytearray:
        """Decrypt a whole file into new memory, for the caller to wipe; raises as ``read_into``."""
        with self.naming(path), self.reader(path) as reader:
            # The reader has checked the length of the file for this size. In a file with holes that
            # costs no disk; the memory is taken but not written to, which is cheap too.
            content = unwritten(reader.size)
            reader.read_into(content)
            return content

    def verify(self, path: str, progress: Callable[[int], object] | None = None) -> None:
        """Authenticate a whole file without keeping its plaintext; raises as ``read_into``."""
        with self.naming(path), self.reader(path) as reader:
            reader.verify(progress)

    def open(self, path: str) -> io.RawIOBase:
        """A read-only seekable file that decrypts as it is read; closed with the model."""
        reader = self.reader(path)
        with self._lock:
            if self._closed:
                reader.close()
                raise ValueError("this sealed model is closed")
            file = reader.open(owned=True)
            self._files.add(file)
            return file

    def device_file(self, folder: Path, name: str, bound_to: bytes) -> DeviceFile:
        """A file in ``folder`` that only this device with this model's key can write and read.

        Args:
            folder: created if it is missing, private to this user; its parent exists.
            name: name of the file.
            bound_to: everything on which its content depends, besides this manifest.

        Raises:
            ConfigError: the folder is not private, or cannot be created.
        """
        return DeviceFile(
            folder,
            name,
            bound_to,
            lambda secret: device_key(self._dek, self._hash, secret, name.encode()),
        )

    @contextlib.contextmanager
    def naming(self, path: str) -> Iterator[None]:
        """Add the name of a payload file to its errors."""
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
        """A new payload reader of one file, with a descriptor of its own; the caller closes it."""
        entry, manifest = self.manifest.file(path), self.manifest
        # Under the lock: if another thread closed the folder, its descriptor could be reused.
        with contextlib.ExitStack() as stack:
            with self._lock:
                key = file_key(self._dek, manifest.id, entry.path)
                stack.callback(wipe, key)
                source = self._folder.open_payload(entry.path)
            return PayloadReader(
                source,
                entry.size,
                key=key,
                aad=payload_aad(manifest.id, entry.path),
                segment_length=manifest.segment_length,
                digest=manifest.digest,
                root=entry.digest if self._check_digests else None,
                checked_leaves=self._checked_leaves[entry.path],
            )

    def close(self) -> None:
        """Wipe the keys and close the files; may be called again.

        A ``read`` in another thread goes on to its end, and wipes its own keys.
        """
        with self._lock:
            self._closed = True
            self._dek.wipe()
            self._folder.close()
            files = list(self._files)
        for file in files:
            file.close()

    def __repr__(self) -> str:
        return f"<SealedModel {self.manifest.name} release {self.manifest.release}>"


def open_model(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
) -> SealedModel:
    """Open a sealed model: check its publishers, unlock it, and give access to its files.

    Args:
        path: the sealed model's folder, or its location (``https://HOST/PATH``).
        name: the model name that is expected; another one is refused.
        keys: a loaded config, or the path of one; by default the one that ``load_config`` finds.

    Raises:
        ConfigError: the config, or a secret source of it, is wrong.
        FormatError, IntegrityError: the model is not of the format, or damaged or forged.
        UntrustedPublisher, ModelExpired, RollbackError: the config refuses the model.
        CannotUnlock: no recipient opens here; ``attempts`` has the reason of each.
        StorageError: the location cannot be reached, or refuses access.
    """
    with use_config(keys) as config:
        candidate, trust = admit(path, config, name)
        try:
            return _unlock(candidate, trust, config)
        except BaseException as error:
            candidate.folder.close()
            if isinstance(error, KeymgmtError):
                audit("load", error=error, model=candidate.manifest.id.hex())
            raise


def _unlock(candidate: Candidate, trust: Trust, config: Config) -> SealedModel:
    manifest = candidate.manifest
    dek, opened = _data_key(candidate, config)
    try:
        trust.remember(candidate)
    except BaseException:
        dek.wipe()
        raise
    audit("load", model=manifest.id.hex(), name=manifest.name, release=manifest.release)
    return SealedModel(
        candidate,
        dek,
        publisher=trust.vouched,
        opened=opened,
        check_digests=config.policy.require_signature,
    )


def _data_key(candidate: Candidate, config: Config) -> tuple[Dek, Opened | None]:
    """The data key, from the config's cache if it is there, and the group that opened it."""
    manifest, policy, cache = candidate.manifest, candidate.policy(), config.cache
    unlocker = Unlocker(config, manifest, policy)
    if cache is None:
        return unlocker.open()
    # Any change of the manifest or of the recipients changes the name, so providers are asked.
    name = policy.manifest + policy.mac
    dek = cache.get(name)
    if dek is not None and hmac.compare_digest(commitment(dek, manifest.id), manifest.commitment):
        policy.check_mac(dek, manifest.id)
        return dek, None
    dek, opened = unlocker.open()
    cache.put(name, dek)
    return dek, opened
