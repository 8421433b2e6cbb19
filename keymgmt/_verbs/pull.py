"""Pull: download a sealed model from a registry, except the files that are here already.

The new model is downloaded into a folder beside the target, which outlives an interruption. The
small files come first, and by them the config decides whether the model is accepted. The payload
files follow; the artifact gives the digest of each, and the sealed manifest its size.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keymgmt import floe
from keymgmt._config.config import use_config
from keymgmt._remote.artifact import Blob, blob_of, hash_file
from keymgmt._remote.folder import RemoteFolder
from keymgmt._remote.location import need_folder
from keymgmt._remote.origin import Origin
from keymgmt._remote.parallel import Parallel
from keymgmt._remote.registry import Registry
from keymgmt._remote.storage import Part, Storage
from keymgmt._system.audit import audit
from keymgmt._system.files import (
    make_folder,
    new_directory,
    replace_file,
    resumable_directory,
    to_system,
)
from keymgmt._system.refused import translate
from keymgmt._trust.candidate import Candidate
from keymgmt._verbs.push import registry_location
from keymgmt._verbs.seal import replaceable
from keymgmt.errors import ConfigError, FormatError, KeymgmtError, RollbackError, SealedModelError
from keymgmt.sealed.folder import (
    KEYS,
    MANIFEST,
    MAX_ORIGIN,
    ORIGIN,
    PAYLOAD,
    SIGNATURES,
    SealedFolder,
    payload_name,
)
from keymgmt.sealed.keys import MAX_KEYS
from keymgmt.sealed.manifest import MAX_MANIFEST, Manifest
from keymgmt.sealed.signatures import MAX_SIGNATURES

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._remote.location import Location

__all__ = ["Pulled", "pull"]

Progress = Callable[[int, int], object]
_LIMITS = {MANIFEST: MAX_MANIFEST, KEYS: MAX_KEYS, SIGNATURES: MAX_SIGNATURES}


@dataclass(frozen=True)
class Pulled:
    """The result of a pull.

    Attributes:
        manifest: name, release, files and metadata.
        location: the location as it was given.
        digest: digest of the artifact that was at the location when the pull began.
        path: the folder.
        state: ``new``; ``replaced``: another model or release replaced the old; ``updated``: its
            recipients or signatures changed; ``current``: nothing changed.
        received: bytes of the files that were downloaded.
    """

    manifest: Manifest
    location: str
    digest: str
    path: str
    state: Literal["new", "replaced", "updated", "current"]
    received: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "location": self.location,
            "digest": self.digest,
            "path": self.path,
            "name": self.manifest.name,
            "release": self.manifest.release,
            "id": self.manifest.id.hex(),
            "state": self.state,
            "received": self.received,
        }


def pull(
    location: str,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    force: bool = False,
    keys: Config | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Download a sealed model from a registry: only the files that are not here yet.

    The folder appears at ``path`` when this config accepts the model and all files are there. An
    interrupted pull goes on where it ended when it is run again. Of a model that is here already,
    keys.json and signatures.json are replaced, each in one step.

    Args:
        location: ``oci://HOST/REPOSITORY:TAG``, or ``@DIGEST``. A tag is resolved once; if it is
            moved meanwhile, that has no effect.
        path: the folder; its parent exists. A sealed model there is updated.
        name: the model name that is expected; another one is refused.
        force: replace a model of another name, a later release, or a model that was changed here.
        keys: a loaded config, or the path of one.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ConfigError: the location has no artifact, or whatever is at ``path`` is not replaced.
        FormatError, IntegrityError: the artifact is not a sealed model, or it is damaged.
        UntrustedPublisher, ModelExpired, RollbackError: the config refuses the model, or a later
            release is here.
        ProviderError: the anchor of the release memory cannot be read.
        StorageError: the registry cannot be reached, or refuses access.
    """
    source = registry_location(location)
    need_folder(path, new=True)
    # Where ``path`` is a link to the model, the model is replaced and not the link.
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ConfigError(
            f"the folder {target.parent} for {target.name} does not exist",
            hint=f"make it with: mkdir -p {shlex.quote(str(target.parent))}",
        )
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} exists and is no folder", hint="name another one")
    with use_config(keys) as config, Registry(source, config.remote) as registry:
        artifact = registry.artifact
        try:
            with resumable_directory(target, artifact.blob(MANIFEST).digest) as folder:
                work = _Pull(source, target, registry, folder)
                work.admit(config, name)
                state = work.finish(force, progress)
        except OSError as error:
            raise translate(error, target) from error
        manifest = work.manifest
        audit("pull", model=manifest.id.hex(), name=manifest.name, digest=artifact.digest)
        return Pulled(manifest, str(source), artifact.digest, str(path), state, work.received)


class _Pull:
    """The download of one model into ``folder``, which becomes ``target``."""

    def __init__(
        self,
        source: Location,
        target: Path,
        registry: Registry,
        folder: Path,
    ) -> None:
        self._source, self._target = source, target
        self._artifact, self._registry = registry.artifact, registry
        self._folder = folder
        self._origin = Origin.of(source, self._artifact).to_bytes()
        self.received = 0

    def admit(self, config: Config, name: str | None) -> None:
        """Let the config decide by the small files, and check that the artifact has all others."""
        self._small = self._read_small()
        with Candidate.of(RemoteFolder(str(self._source), _Read(self._small))) as candidate:
            candidate.trust(config, name)
            candidate.policy()
            self.manifest = candidate.manifest
        length = self.manifest.segment_length
        self._payload: dict[str, Blob] = {}
        for entry in self.manifest.files:
            blob = self._artifact.blob(payload_name(entry.path))
            size = floe.ciphertext_length(entry.size, length)
            if blob.size != size:
                raise FormatError(
                    f"{payload_name(entry.path)} has {blob.size} bytes in the registry, and by "
                    f"manifest.json it has {size}",
                    hint="files of two models were mixed: push the model again",
                )
            self._payload[entry.path] = blob

    def _read_small(self) -> dict[str, bytes]:
        """The small files: from the local model if it has the same ones, else downloaded."""
        wanted = [MANIFEST, KEYS, *([SIGNATURES] if SIGNATURES in self._artifact.files else [])]
        small = {}
        with contextlib.ExitStack() as stack:
            local = None
            if self._target.is_dir():
                local = stack.enter_context(SealedFolder(self._target))
            for name in wanted:
                blob = self._artifact.blob(name)
                content = local.read(name, _LIMITS[name], optional=True) if local else b""
                if blob_of(content) != blob:
                    content = self._registry.read(blob, _LIMITS[name], name)
                    self.received += blob.size
                small[name] = content
        return small

    def finish(
        self, force: bool, progress: Progress | None
    ) -> Literal["new", "replaced", "updated", "current"]:
        """Download the missing files, and put the model in its place."""
        size = sum(blob.size for blob in self._payload.values())
        self._transfers = Parallel(progress, size)
        if not os.path.lexists(self._target):
            self._fetch(self._payload)
            self._put_in_place(None)
            return "new"
        look = replaceable(self._target)
        with SealedFolder(self._target) as old:
            old.lock()
            same = old.read(MANIFEST, MAX_MANIFEST, optional=True) == self._small[MANIFEST]
            if not same:
                look(self._target)
            if not force:
                self._check_unchanged(old)
            missing = self._missing(old) if same else self._payload.keys()
            if not missing:
                return self._update(old)
            if same:
                missing |= self._keep(self._payload.keys() - missing)
            elif not force:
                self._check_succession()
            self._fetch(missing)
            old.check_place()
            self._put_in_place(look)
            return "updated" if same else "replaced"

    def _check_succession(self) -> None:
        """Refuse to replace another model, or a later release."""
        with Candidate.read(self._target) as candidate:
            old = candidate.manifest
        if old.name != self.manifest.name:
            raise ConfigError(
                f"{self._target} is {old.name}, and {self.manifest.name} would take its place",
                hint="name another folder, or replace it with --force",
            )
        if old.release > self.manifest.release:
            raise RollbackError(
                f"{self._target} is release {old.release}, and the registry has "
                f"{self.manifest.release}",
                hint="go back to the older one with --force",
            )

    def _check_unchanged(self, old: SealedFolder) -> None:
        """ConfigError where a change that was made here would be lost."""
        origin = Origin.read(old)
        for name in (KEYS, SIGNATURES):
            content = old.read(name, _LIMITS[name], optional=True)
            there = self._artifact.files.get(name)
            known = (origin.files.get(name) if origin else None, there.digest if there else None)
            if content and blob_of(content).digest not in known:
                raise ConfigError(
                    f"{name} of {self._target} was changed here, and is not in the registry",
                    hint="push it first, or take what the registry has with --force",
                )

    def _missing(self, old: SealedFolder) -> set[str]:
        """The payload files that the old folder lacks, or that are damaged there."""

        def whole(path: str) -> bool:
            blob, advance = self._payload[path], self._transfers.advance
            with (
                contextlib.suppress(SealedModelError),
                contextlib.closing(old.open_payload(path)) as source,
            ):
                if source.length() == blob.size:
                    if hash_file(source, advance) == blob:
                        return True
                    advance(-blob.size)
            return False

        looked_at = zip(self._payload, self._transfers.map(whole, self._payload), strict=True)
        return {path for path, same in looked_at if not same}

    def _keep(self, here: set[str]) -> set[str]:
        """Hard-link payload files of the old folder into the new one; those that cannot be."""
        left = set()
        for path in here:
            name = to_system(payload_name(path))
            make_folder((self._folder / name).parent)
            (self._folder / name).unlink(missing_ok=True)
            try:
                os.link(self._target / name, self._folder / name, follow_symlinks=False)
            except OSError:
                left.add(path)
        return left

    def _update(self, old: SealedFolder) -> Literal["updated", "current"]:
        changed = False
        for name in (SIGNATURES, KEYS):
            content = self._small.get(name)
            if content is not None and content != old.read(name, _LIMITS[name], optional=True):
                old.replace(name, content)
                changed = True
        if old.read(ORIGIN, MAX_ORIGIN, optional=True) != self._origin:
            old.replace(ORIGIN, self._origin)
        return "updated" if changed else "current"

    def _fetch(self, paths: Collection[str]) -> None:
        make_folder(self._folder / PAYLOAD)
        missing = sum(self._payload[path].size for path in paths)
        there = sum(
            file.stat().st_size for file in (self._folder / PAYLOAD).rglob("*") if file.is_file()
        )
        free = shutil.disk_usage(self._folder).free
        if missing - there > free:
            raise KeymgmtError(
                f"{self._target} needs {missing - there} bytes more, and the disk has {free}",
                hint="make room there, and run it again: what came so far is kept",
            )
        self.received += sum(self._transfers.map(self._fetch_one, paths))

    def _fetch_one(self, path: str) -> int:
        name = payload_name(path)
        file = self._folder / to_system(name)
        make_folder(file.parent)
        # After a killed pull this may be a link to a file of the old model, which stays unwritten.
        if file.exists() and file.lstat().st_nlink > 1:
            file.unlink()
        return self._registry.download(self._payload[path], file, name, self._transfers.advance)

    def _put_in_place(self, look: Callable[[Path], object] | None) -> None:
        with new_directory(self._target, replaceable=look) as made:
            (self._folder / PAYLOAD).rename(made / PAYLOAD)
            for name, content in (*self._small.items(), (ORIGIN, self._origin)):
                replace_file(made / name, content)


class _Read(Storage):
    """Small files that were downloaded from a registry."""

    def __init__(self, small: Mapping[str, bytes]) -> None:
        self._small = small

    def part(self, name: str, start: int, end: int, pin: str = "") -> Part | None:
        content = self._small.get(name)
        if content is None:
            return None
        return Part(memoryview(content)[start:end], len(content), pin)
