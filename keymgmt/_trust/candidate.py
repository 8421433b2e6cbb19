"""Reading a sealed model's small files, and deciding whether this config lets it in.

The order of trust: parse within bounds, signature by a publisher trusted for this name and not
expired, expected name and release floor. Only then is a key service asked, elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from keymgmt._remote.location import is_location, need_folder
from keymgmt._trust.policy import (
    check_expiry,
    check_name,
    check_release,
    check_signature,
    load_publishers,
)
from keymgmt._trust.release_memory import release_memory
from keymgmt.errors import (
    ConfigError,
    IntegrityError,
    KeymgmtError,
    ProviderError,
    SealedModelError,
)
from keymgmt.sealed.folder import (
    KEYS,
    MANIFEST,
    SIGNATURES,
    ModelFolder,
    SealedFolder,
    payload_name,
)
from keymgmt.sealed.keys import MAX_KEYS, UnlockPolicy
from keymgmt.sealed.manifest import MAX_MANIFEST, Manifest, manifest_hash
from keymgmt.sealed.payload import digest_payload
from keymgmt.sealed.signatures import MAX_SIGNATURES, Signatures
from keymgmt.sealed.times import utc_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from keymgmt._config.config import Config
    from keymgmt._config.remote import Remote
    from keymgmt._trust.policy import Publisher, Vouched
    from keymgmt._trust.release_memory import ReleaseMemory, Remembered

__all__ = ["Candidate", "admit", "refusal", "step", "wrong_digest"]


@dataclass(frozen=True)
class Trust:
    """Why a model was let in, and where its release is remembered once it is open.

    Attributes:
        vouched: the publishers and until when they vouch; None where no signature is required.
        memory: the release memory; None where the config names none.
        known: the content of the memory; None where its anchor was not to be asked.
    """

    vouched: Vouched | None
    memory: ReleaseMemory | None
    known: Remembered | None

    def remember(self, candidate: Candidate) -> None:
        """Remember the release of ``candidate``, after all its digests were checked.

        A release that is damaged must not raise the floor: the machine would then open neither it
        nor the release before.

        Raises:
            IntegrityError: the digest of a file differs from the manifest.
            ConfigError, RollbackError, ProviderError: the release cannot be remembered.
        """
        if self.memory is None or self.known is None:
            return
        manifest = candidate.manifest
        if manifest.release != self.known.releases.get(manifest.name):
            candidate.check_digests()
        expires = self.vouched is not None and self.vouched.expires is not None
        self.memory.remember(manifest.name, manifest.release, time=expires, known=self.known)


@dataclass
class Candidate:
    """A sealed model as read from its folder: parsed, and not trusted yet.

    A context manager that closes the folder.
    """

    folder: ModelFolder
    data: bytes
    manifest: Manifest
    signatures: Signatures

    @classmethod
    def read(cls, path: str | os.PathLike[str], remote: Remote | None = None) -> Candidate:
        """Read manifest.json and signatures.json; SealedModelError where they violate SPEC.md.

        keys.json is read later, by ``policy``: most checks do not need it, and it may be large.

        Args:
            path: of the folder; or a location, for those who say how it is read.
            remote: how that is.

        Raises:
            ConfigError: there is no such folder; or it is a location, and ``remote`` is None.
            StorageError: it is not to be had from there.
        """
        return cls.of(_folder(path, remote))

    @classmethod
    def of(cls, folder: ModelFolder) -> Candidate:
        """What is in a folder that is open, and closed where this raises, as ``read`` does."""
        try:
            folder.expect(MANIFEST, SIGNATURES, KEYS)
            data = folder.read(MANIFEST, MAX_MANIFEST)
            manifest = Manifest.from_bytes(data)
            content = folder.read(SIGNATURES, MAX_SIGNATURES, optional=True)
            signatures = Signatures.from_bytes(content) if content else Signatures()
            folder.check_listing(manifest)
        except BaseException:
            folder.close()
            raise
        return cls(folder, data, manifest, signatures)

    @functools.cached_property
    def hash(self) -> bytes:
        """SHA-384 of manifest.json."""
        return manifest_hash(self.data)

    def policy(self) -> UnlockPolicy:
        """Read keys.json; SealedModelError where it is malformed or of another manifest."""
        policy = UnlockPolicy.from_bytes(self.folder.read(KEYS, MAX_KEYS))
        if policy.manifest != self.hash:
            raise IntegrityError(
                "keys.json belongs to another manifest.json",
                hint="files of two models were mixed; fetch the sealed model again",
            )
        policy.check_profile(self.manifest)
        return policy

    def trust(
        self,
        config: Config,
        name: str | None = None,
        *,
        ask: bool = True,
        publishers: list[Publisher] | None = None,
    ) -> Trust:
        """Check signature, expiry, name and release, in this order.

        Without ``ask`` no key service is asked, so a release memory with an anchor is left out.
        ``publishers`` are those of the config where somebody has read them already.

        Raises:
            UntrustedPublisher, ModelExpired, RollbackError, ConfigError: as the config demands.
            ProviderError: the anchor of the release memory cannot be read.
        """
        vouched, memory, known, policy = None, None, None, config.policy
        if policy.require_signature:
            manifest, signatures = self.manifest, self.signatures
            if publishers is None:
                publishers = load_publishers(config)
            count = policy.signatures.get(manifest.name, 1)
            signed = check_signature(manifest, self.data, signatures, publishers, count)
            memory = release_memory(config)
            known = memory.recall() if memory and (ask or memory.anchor is None) else None
            clock = utc_text(), known.time if known else None
            vouched = check_expiry(manifest, self.hash, signatures, signed, policy, clock)
        check_name(self.manifest, name, config)
        remembered = known.releases.get(self.manifest.name) if known else None
        check_release(self.manifest, config, remembered)
        return Trust(vouched, memory, known)

    def check_digests(self, progress: Callable[[int, int], object] | None = None) -> None:
        """IntegrityError unless every payload file has the digest of the manifest; needs no key.

        This proves something only after the signature of the manifest was checked.
        """
        manifest, done = self.manifest, 0
        for entry in manifest.files:
            with contextlib.closing(self.folder.open_payload(entry.path)) as source:
                root = digest_payload(
                    source,
                    entry.size,
                    segment_length=manifest.segment_length,
                    digest=manifest.digest,
                    progress=step(progress, done, manifest.size),
                )
            if root != entry.digest:
                raise wrong_digest(entry.path)
            done += entry.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()


def wrong_digest(path: str) -> IntegrityError:
    """The error for a payload file that is not the one of the manifest."""
    return IntegrityError(
        f"{payload_name(path)} does not have the digest that the manifest lists",
        hint="it was damaged or exchanged; fetch the sealed model again",
    )


def _folder(path: str | os.PathLike[str], remote: Remote | None) -> ModelFolder:
    if remote is None:
        need_folder(path)
    if remote is None or not is_location(path):
        return SealedFolder(path)
    from keymgmt._remote.folder import open_folder

    return open_folder(os.fspath(path), remote)


def step(
    progress: Callable[[int, int], object] | None, before: int, total: int
) -> Callable[[int], object] | None:
    """The progress of one file as progress of the whole model."""
    return None if progress is None else lambda done: progress(before + done, total)


def admit(
    path: str | os.PathLike[str],
    config: Config,
    name: str | None,
    publishers: list[Publisher] | None = None,
) -> tuple[Candidate, Trust]:
    """Read a sealed model and check that this config lets it in; else close it and raise."""
    candidate = Candidate.read(path, config.remote)
    try:
        return candidate, candidate.trust(config, name, publishers=publishers)
    except BaseException:
        candidate.folder.close()
        raise


def refusal(path: str | os.PathLike[str], config: Config) -> KeymgmtError | None:
    """Why this config would not let in the model that was just written; None where it would."""
    try:
        admit(path, config, None)[0].folder.close()
    except (SealedModelError, ConfigError, ProviderError) as error:
        return error
    return None
