"""manifest.json: the description of a sealed model.

It is written once, and every other file is bound to its hash.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from keymgmt import floe
from keymgmt._providers.names import is_key
from keymgmt._system.strict_json import JsonReader, dump_json, load_json
from keymgmt.errors import FormatError
from keymgmt.sealed.digests import digest_length
from keymgmt.sealed.paths import check_paths
from keymgmt.sealed.profiles import PROFILES
from keymgmt.sealed.times import check_time

if TYPE_CHECKING:
    from keymgmt.sealed.digests import DigestName
    from keymgmt.sealed.profiles import Profile

__all__ = ["FORMAT", "MAX_FILES", "MAX_MANIFEST", "SEGMENT", "FileEntry", "Manifest"]

FORMAT: Final = "keymgmt-sealed/1"
MAX_MANIFEST: Final = 16 << 20
MAX_FILES: Final = 16384
# An entry of ``files`` has four parts, the metadata at most 64, and the manifest itself 12. A
# hostile manifest, whose signature is checked only after it was parsed, must not cost more than a
# real one.
MAX_PARTS: Final = 4 * MAX_FILES + 100
MIN_SEGMENT: Final = 4096
MAX_SEGMENT: Final = 4 << 20
SEGMENT: Final = 1 << 20

_KIND: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")


@dataclass(frozen=True)
class FileEntry:
    """One file of a model: its path, its plain size in bytes, the digest of its ciphertext."""

    path: str
    size: int
    digest: bytes = field(repr=False)


@dataclass(frozen=True)
class Manifest:
    """The description of a sealed model; nothing in it is secret.

    Attributes:
        id: 16 random bytes that no other sealed model has.
        name: the name for which publishers are trusted, in the grammar of key names.
        release: a number from 0 upwards, which guards against rollback.
        created: when the model was sealed, UTC, RFC 3339 with seconds; shown, never trusted.
        profile: the name of the profile, which decides the algorithms.
        segment_length: bytes of one encrypted FLOE segment, a power of two.
        commitment: 48 bytes that can be computed from this model's data key alone.
        kind: the kind of model, such as ``openvino-ir``.
        main: path of the file that a loader reads first, or None.
        files: every file, sorted by path.
        metadata: at most 64 short strings for people and tools.
    """

    id: bytes
    name: str
    release: int
    created: str
    profile: str
    segment_length: int
    commitment: bytes = field(repr=False)
    kind: str
    main: str | None
    files: tuple[FileEntry, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def rules(self) -> Profile:
        """The algorithms that the profile allows."""
        return PROFILES[self.profile]

    @property
    def digest(self) -> DigestName:
        """The hash of the digest trees, which the profile decides."""
        return self.rules.digest

    @property
    def size(self) -> int:
        """Plain size of all files together, bytes."""
        return sum(entry.size for entry in self.files)

    def file(self, path: str) -> FileEntry:
        """The entry of ``path``; FileNotFoundError if the model has no such file."""
        try:
            return self.by_path[path]
        except KeyError:
            raise FileNotFoundError(f"{path!r} is not in the sealed model {self.name}") from None

    @functools.cached_property
    def by_path(self) -> Mapping[str, FileEntry]:
        """The entry of each path."""
        return {entry.path: entry for entry in self.files}

    def to_json(self) -> dict[str, Any]:
        """The members of manifest.json."""
        return {
            "format": FORMAT,
            "id": self.id.hex(),
            "name": self.name,
            "release": self.release,
            "created": self.created,
            "profile": self.profile,
            "segment_length": self.segment_length,
            "commitment": self.commitment.hex(),
            "kind": self.kind,
            "main": self.main,
            "files": [
                {"path": entry.path, "size": entry.size, "digest": entry.digest.hex()}
                for entry in self.files
            ],
            "metadata": dict(self.metadata),
        }

    def to_bytes(self) -> bytes:
        """The canonical bytes of manifest.json; FormatError if a reader would refuse them."""
        data = dump_json(self.to_json())
        # The checks of a reader are made here too, so they are written only once.
        self.from_bytes(data)
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read manifest.json within its bounds; FormatError where it violates SPEC.md."""
        reader = load_json(data, "manifest.json", MAX_MANIFEST, MAX_PARTS)
        reader.version(FORMAT, "another version of keymgmt sealed it: upgrade the older of the two")
        profile = reader.text("profile", limit=32)
        if profile not in PROFILES:
            raise FormatError(
                f"manifest.json has the unknown profile {profile!r}",
                hint=f"this reader knows {', '.join(PROFILES)}",
            )
        length = digest_length(PROFILES[profile].digest)
        manifest = cls(
            id=reader.hex("id", length=16),
            name=reader.text("name", limit=64),
            release=reader.integer("release"),
            created=reader.text("created", limit=20),
            profile=profile,
            segment_length=reader.integer("segment_length", least=MIN_SEGMENT, most=MAX_SEGMENT),
            commitment=reader.hex("commitment", length=48),
            kind=reader.text("kind", limit=32),
            main=reader.text_or_none("main", limit=1024),
            files=tuple(
                _file(item, length) for item in reader.array("files", least=1, most=MAX_FILES)
            ),
            metadata=reader.texts("metadata", most=64, key_limit=64, limit=4096),
        )
        reader.end()
        manifest._check()
        return manifest

    def _check(self) -> None:
        if not is_key(self.name):
            raise FormatError(f"manifest.json has no valid model name: {self.name[:80]!r}")
        check_time(self.created, "created in manifest.json")
        if self.segment_length & (self.segment_length - 1):
            raise FormatError("segment_length in manifest.json is not a power of two")
        if not _KIND.fullmatch(self.kind):
            raise FormatError(f"kind in manifest.json is not a short word: {self.kind!r}")
        paths = [entry.path for entry in self.files]
        check_paths(paths)
        for entry in self.files:
            try:
                floe.segment_count(entry.size, self.segment_length)
            except ValueError as error:
                raise FormatError(
                    f"the size of {entry.path[:120]!r} is refused: {error}"
                ) from error
        if self.main is not None and self.main not in paths:
            raise FormatError("main in manifest.json is not one of its files")


def manifest_hash(data: bytes) -> bytes:
    """SHA-384 over the bytes of manifest.json, to which keys.json is bound."""
    return hashlib.sha384(data).digest()


def _file(item: Any, length: int) -> FileEntry:
    reader = JsonReader(item, "a file in manifest.json")
    entry = FileEntry(
        path=reader.text("path", limit=1024),
        size=reader.integer("size"),
        digest=reader.hex("digest", length=length),
    )
    reader.end()
    return entry
