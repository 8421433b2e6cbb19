"""Reading a sealed model's small files, and deciding whether this config lets it in.

The order of trust: parse within bounds, signature by a publisher trusted for this name, expected
name and release floor. Only then is a key service asked, elsewhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from keymgmt._releases import remembered_release
from keymgmt._trust import check_name, check_release, check_signature, load_publishers
from keymgmt.errors import IntegrityError
from keymgmt.sealed.folder import KEYS, MANIFEST, SIGNATURES, SealedFolder, payload_name
from keymgmt.sealed.keys import MAX_KEYS, UnlockPolicy
from keymgmt.sealed.manifest import MAX_MANIFEST, Manifest, manifest_hash
from keymgmt.sealed.payload import digest_payload
from keymgmt.sealed.signatures import MAX_SIGNATURES, Signatures

if TYPE_CHECKING:
    from collections.abc import Callable

    from keymgmt._config import Config
    from keymgmt._trust import Publisher

__all__ = ["Candidate", "admit", "step"]


@dataclass
class Candidate:
    """A sealed model as read from its folder, parsed but trusted in nothing yet.

    A context manager that closes the folder.
    """

    folder: SealedFolder
    data: bytes
    manifest: Manifest
    signatures: Signatures

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Candidate:
        """Read manifest.json and signatures.json; SealedModelError where they are not as SPEC says.

        keys.json is read later, by ``policy``: most checks need none of it, and it may be large.
        """
        folder = SealedFolder(path)
        try:
            data = folder.read(MANIFEST, MAX_MANIFEST)
            manifest = Manifest.from_bytes(data)
            content = folder.read(SIGNATURES, MAX_SIGNATURES, optional=True)
            signatures = Signatures.from_bytes(content) if content else Signatures()
            folder.check_listing(manifest)
        except BaseException:
            folder.close()
            raise
        return cls(folder, data, manifest, signatures)

    @property
    def hash(self) -> bytes:
        """SHA-256 of manifest.json."""
        return manifest_hash(self.data)

    def policy(self) -> UnlockPolicy:
        """Read keys.json; SealedModelError where it is malformed or of another manifest."""
        policy = UnlockPolicy.from_bytes(self.folder.read(KEYS, MAX_KEYS))
        if policy.manifest != self.hash:
            raise IntegrityError(
                "keys.json belongs to another manifest.json",
                hint="files of two models were mixed; fetch the sealed model again",
            )
        return policy

    def trust(self, config: Config, name: str | None = None) -> Publisher | None:
        """Check signature, name and release; the publisher, or None if none is required.

        Raises:
            UntrustedPublisher, RollbackError, ConfigError: as the config demands.
        """
        publisher = None
        if config.policy.require_signature:
            publishers = load_publishers(config)
            publisher = check_signature(self.manifest, self.data, self.signatures, publishers)
        check_name(self.manifest, name, config)
        memory = config.policy.remember_releases
        known = remembered_release(memory, self.manifest.name) if memory else None
        check_release(self.manifest, config, known)
        return publisher

    def check_digests(self, progress: Callable[[int, int], object] | None = None) -> None:
        """IntegrityError unless every payload file has the digest of the manifest; needs no key.

        Says something only once the signature was checked.
        """
        manifest, done = self.manifest, 0
        for entry in manifest.files:
            descriptor = self.folder.open_payload(entry.path)
            try:
                root = digest_payload(
                    descriptor,
                    entry.size,
                    segment_length=manifest.segment_length,
                    digest=manifest.digest,
                    progress=step(progress, done, manifest.size),
                )
            finally:
                os.close(descriptor)
            if root != entry.digest:
                raise IntegrityError(
                    f"{payload_name(entry.path)} has not the digest that the manifest lists",
                    hint="it was damaged or exchanged; fetch the sealed model again",
                )
            done += entry.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()


def step(
    progress: Callable[[int, int], object] | None, before: int, total: int
) -> Callable[[int], object] | None:
    """The progress of one file as progress of the whole model."""
    return None if progress is None else lambda done: progress(before + done, total)


def admit(
    path: str | os.PathLike[str], config: Config, name: str | None
) -> tuple[Candidate, Publisher | None]:
    """Read a sealed model and check that this config lets it in; closed again if it does not."""
    candidate = Candidate.read(path)
    try:
        return candidate, candidate.trust(config, name)
    except BaseException:
        candidate.folder.close()
        raise
