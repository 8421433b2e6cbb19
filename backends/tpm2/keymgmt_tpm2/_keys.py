"""The key directory: one JSON file per key, with all its versions, and the approvals.

    keys/NAME.json              public and private parts as the TPM gave them, and the policy
    keys/approvals/HEX.json     approved boot states; HEX is a digest of the approved state
    keys/.lock, keys/.next      locked by who uses the directory or a bare TPM, and by who is next
    keys/.loaded-HEX            the objects that an operation has loaded in a bare TPM

The private parts are encrypted under the TPM's storage root key, so no other machine can use them.
The directory is private all the same, because whoever can change it can replace a key by a weaker
one. On reading, kind and policy in a file are compared with the key's public area.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from keymgmt.backend import (
    FormatError,
    JsonReader,
    KeyInfo,
    KeyNotFound,
    KeyVersion,
    ProviderUnavailable,
    check_trusted,
    is_key,
    load_json,
    lock_file,
    read_file,
    replace_file,
    sync_directory,
)
from keymgmt_tpm2._structures import Public
from keymgmt_tpm2._templates import KINDS, problem_with
from keymgmt_tpm2.policy._policy import Policy

__all__ = ["KeyDirectory", "TpmKey", "TpmKeyVersion", "read_if_there", "read_json"]

FORMAT: Final = "keymgmt.tpm2-key/1"
MAX_FILE: Final = 1 << 20
MAX_VERSIONS: Final = 1000
MAX_PART: Final = 4096
State = Literal["active", "old", "retired"]


@dataclass(frozen=True)
class TpmKeyVersion:
    """One version of a key: public area, private part under the storage root key, and policy."""

    version: str
    created: str
    public: Public
    private: bytes = field(repr=False)
    policy: Policy
    retired: bool = False


@dataclass(frozen=True)
class TpmKey:
    """A key and its versions, oldest first."""

    key: str
    kind: str
    versions: tuple[TpmKeyVersion, ...]

    @property
    def purpose(self) -> Literal["wrap", "sign"]:
        """What the key is for."""
        return KINDS[self.kind]

    @property
    def newest(self) -> TpmKeyVersion:
        """The version that new wraps and signatures use."""
        return self.versions[-1]

    def find(self, version: str) -> TpmKeyVersion | None:
        """The version of that number, or None."""
        return next((v for v in self.versions if v.version == version), None)

    def with_version(self, private: bytes, public: Public, policy: Policy) -> TpmKey:
        """The key with one more version."""
        number = str(int(self.newest.version) + 1 if self.versions else 1)
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        added = TpmKeyVersion(number, created, public, private, policy)
        return replace(self, versions=(*self.versions, added))

    def with_retired(self, version: str) -> TpmKey:
        """The key with that version retired."""
        return replace(
            self,
            versions=tuple(
                replace(v, retired=True) if v.version == version else v for v in self.versions
            ),
        )

    def info(self) -> KeyInfo:
        """The key as a KeyInfo."""

        def state(version: TpmKeyVersion) -> State:
            if version.retired:
                return "retired"
            return "active" if version is self.newest else "old"

        newest = self.newest
        detail = {"policy": str(newest.policy), "name": newest.public.name.hex()}
        detail["dictionary_attack_protection"] = "yes" if newest.policy.pin else "no (no PIN)"
        if weak := newest.policy.weakness:
            detail["warning"] = weak
        versions = tuple(KeyVersion(v.version, state(v), v.created) for v in self.versions)
        return KeyInfo(self.key, self.purpose, self.kind, versions, detail)

    def to_bytes(self) -> bytes:
        """The content of the key's file."""
        versions = [
            {
                "version": v.version,
                "created": v.created,
                "retired": v.retired,
                "public": base64.b64encode(v.public.raw).decode(),
                "private": base64.b64encode(v.private).decode(),
                "policy": v.policy.to_json(),
            }
            for v in self.versions
        ]
        data = {"format": FORMAT, "key": self.key, "kind": self.kind, "versions": versions}
        return json.dumps(data, indent=2).encode() + b"\n"

    @classmethod
    def read(cls, file: JsonReader, key: str) -> TpmKey:
        """Read the file of ``key``; FormatError or ValueError if it is wrong."""
        file.version(FORMAT, "a newer keymgmt may have written it")
        kind = file.text("kind", limit=32)
        if kind not in KINDS:
            raise ValueError(f"no kind {kind!r} is known")
        if file.text("key", limit=64) != key:
            raise ValueError("it is the file of another key")
        versions = []
        for number, entry in enumerate(file.array("versions", least=1, most=MAX_VERSIONS), 1):
            version = JsonReader(entry, f"version {number}")
            if version.text("version", limit=8) != str(number):
                raise ValueError("its versions are not numbered from 1")
            policy = Policy.read(JsonReader(version.members("policy"), "the policy"))
            public = Public.parse(version.base64("public", limit=MAX_PART))
            if problem := problem_with(public, kind, policy):
                raise ValueError(f"version {number} is refused: {problem}")
            public.key()  # refuses a point off the curve
            created, private = (
                version.text("created", limit=64),
                version.base64("private", limit=MAX_PART),
            )
            retired = version.flag("retired")
            version.end()
            versions.append(TpmKeyVersion(str(number), created, public, private, policy, retired))
        file.end()
        return cls(key, kind, tuple(versions))


class KeyDirectory:
    """The directory of one provider; nothing is read before it is needed.

    Every fault of the directory is ProviderUnavailable: another group may open the model.
    """

    def __init__(self, path: Path, provider: str) -> None:
        self.path = path
        self._provider = provider

    def names(self) -> list[str]:
        """Names of the keys in it, sorted; empty where the directory is missing."""
        try:
            files = list(self.path.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ProviderUnavailable(f"cannot list {self.path}: {error.strerror}") from error
        self._refuse_shared()
        return sorted(file.stem for file in files if file.suffix == ".json" and is_key(file.stem))

    def read(self, key: str) -> TpmKey:
        """Read a key; the caller has checked its name.

        Raises:
            KeyNotFound: no such key.
            ProviderUnavailable: the file is not private, not of its format, or contradicts the
                public area of its key.
        """
        self._refuse_shared()
        path = self.path / f"{key}.json"
        file = read_json(path, "key file")
        if file is None:
            raise KeyNotFound(
                f"no key {key!r} in {self.path}",
                hint=f"make it with: keymgmt keys create {self._provider}:{key}",
            )
        try:
            return TpmKey.read(file, key)
        except (FormatError, ValueError) as error:
            raise ProviderUnavailable(
                f"the key file {path} is refused: {error}",
                hint="restore it from a backup of this machine's key directory",
            ) from error

    def check_there(self) -> None:
        """ProviderUnavailable where the directory is missing: it may have held the key."""
        if not os.path.lexists(self.path):
            raise ProviderUnavailable(
                f"the key directory {self.path} does not exist",
                hint="mount it, correct `keys`, or make it with: "
                f"keymgmt keys create {self._provider}:KEY",
            )

    def write(self, key: TpmKey) -> None:
        """Write a key's file whole."""
        replace_file(self.path / f"{key.key}.json", key.to_bytes(), mode=0o600)

    def remove(self, key: str) -> None:
        """Delete a key's file, without which the TPM cannot load the key."""
        path = self.path / f"{key}.json"
        try:
            path.unlink()
            sync_directory(self.path)
        except OSError as error:
            raise ProviderUnavailable(f"cannot delete {path}: {error.strerror}") from error

    @contextlib.contextmanager
    def changing(self, seconds: float) -> Iterator[None]:
        """Hold the directory for a change; a missing directory is created."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ProviderUnavailable(f"cannot make {self.path}: {error.strerror}") from error
        with self.locked(seconds):
            yield

    @contextlib.contextmanager
    def locked(self, seconds: float) -> Iterator[None]:
        """Hold the directory against other processes; ProviderUnavailable after ``seconds``."""
        self._refuse_shared()
        with contextlib.ExitStack() as stack:
            try:
                # The second lock makes the first fair: a waiting process comes before one that
                # works in a loop.
                with lock_file(self.path / ".next", seconds):
                    stack.enter_context(lock_file(self.path / ".lock", seconds))
            except TimeoutError as error:
                raise ProviderUnavailable(
                    f"another process has used the TPM of {self.path} for {seconds:g} s",
                    hint="look what it is doing; the TPM may hang",
                ) from error
            except OSError as error:
                raise ProviderUnavailable(f"cannot lock {self.path}: {error.strerror}") from error
            yield

    def _refuse_shared(self) -> None:
        try:
            check_trusted(self.path, label="key directory", private=True, error=ProviderUnavailable)
        except ProviderUnavailable as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise


def read_json(path: Path, label: str) -> JsonReader | None:
    """A trusted JSON file, or None where the file is missing.

    Raises:
        ProviderUnavailable: others can write it, or it is not a JSON object of at most 1 MiB.
    """
    content = read_if_there(path, label, "trusted")
    try:
        label = f"the {label} {path}"
        return None if content is None else load_json(content, label, MAX_FILE, canonical=False)
    except FormatError as error:
        raise ProviderUnavailable(str(error), hint="restore it from a backup") from error


def read_if_there(path: Path, label: str, access: Literal["any", "trusted"]) -> bytes | None:
    """A file of at most 1 MiB, or None where it is missing; ProviderUnavailable."""
    try:
        content = read_file(
            path, label=label, limit=MAX_FILE, access=access, error=ProviderUnavailable
        )
    except ProviderUnavailable as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    return bytes(content)
