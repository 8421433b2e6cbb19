"""The key directory: one JSON file per key, with all its versions, and the approvals.

    keys/NAME.json              public and private parts as the TPM gave them, and the policy
    keys/approvals/HEX.json     approved boot states, found by what they approve
    keys/.attestation.json      the attestation key, made by `keymgmt tpm enroll request`

The private parts are encrypted under the TPM's storage root key and useless elsewhere; the
directory is still private, because whoever can change it can put a weaker key in place of one. What
a file says of a key is compared with the key's public area when it is read.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from keymgmt.backend import (
    ConfigError,
    KeyInfo,
    KeyNotFound,
    KeyVersion,
    ProviderUnavailable,
    is_key,
    private_file_problem,
    replace_file,
)
from keymgmt_tpm2._policy import Policy
from keymgmt_tpm2._structures import Public
from keymgmt_tpm2._templates import KINDS, problem_with

__all__ = ["KeyDirectory", "TpmKey", "TpmKeyVersion", "read_json"]

FORMAT: Final = "keymgmt.tpm2-key/1"
MAX_FILE: Final = 1 << 20
State = Literal["active", "old", "retired"]


@dataclass(frozen=True)
class TpmKeyVersion:
    """One key in the TPM: its public area, its private part under the storage root key, policy."""

    version: str
    created: str
    public: Public
    private: bytes = field(repr=False)
    policy: Policy
    retired: bool = False

    def public_key(self) -> bytes:
        """As recipients carry it: the point of an ECC key, DER SubjectPublicKeyInfo for RSA."""
        return self.public.der() if self.public.curve is None else self.public.point


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
        """The version of that number, if it is there."""
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
        """What ``keys show`` prints."""

        def state(version: TpmKeyVersion) -> State:
            if version.retired:
                return "retired"
            return "active" if version is self.newest else "old"

        newest = self.newest
        detail = {"policy": str(newest.policy), "name": newest.public.name.hex()}
        detail["dictionary_attack_protection"] = "yes" if newest.policy.pin else "no (no PIN)"
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
    def from_json(cls, data: dict[str, Any], key: str) -> TpmKey:
        """Read the file of ``key``; ValueError, KeyError or TypeError where it is wrong."""
        kind = data["kind"]
        if data["format"] != FORMAT or kind not in KINDS or not data["versions"]:
            raise ValueError(f"its format is not {FORMAT}, or its kind not known")
        versions = []
        for number, entry in enumerate(data["versions"], 1):
            policy = Policy.from_json(entry["policy"])
            public = Public.parse(base64.b64decode(entry["public"], validate=True))
            if entry["version"] != str(number):
                raise ValueError("its versions are not numbered from 1")
            if problem := problem_with(public, kind, policy):
                raise ValueError(f"version {number} is refused: {problem}")
            public.key()  # a point off the curve is refused here
            private = base64.b64decode(entry["private"], validate=True)
            retired = entry["retired"] is True
            versions.append(
                TpmKeyVersion(str(number), str(entry["created"]), public, private, policy, retired)
            )
        if data["key"] != key:
            raise ValueError("it is the file of another key")
        return cls(key, kind, tuple(versions))


class KeyDirectory:
    """The directory of one provider; nothing is read before it is asked for."""

    def __init__(self, path: Path, provider: str) -> None:
        self.path = path
        self._provider = provider

    def names(self) -> list[str]:
        """Names of the keys in it, sorted; none where the directory is missing."""
        if not self.path.is_dir():
            return []
        self._refuse_shared()
        stems = (p.name.removesuffix(".json") for p in self.path.iterdir() if p.suffix == ".json")
        return sorted(name for name in stems if is_key(name))

    def read(self, key: str) -> TpmKey:
        """Read a key; the caller has checked its name.

        Raises:
            KeyNotFound: no such key.
            ConfigError: the file is not private, or not of its format, or not what it says.
        """
        path = self.path / f"{key}.json"
        self._refuse_shared()
        data = read_json(path)
        if data is None:
            raise KeyNotFound(
                f"no key {key!r} in {self.path}",
                hint=f"make it with: keymgmt keys create {self._provider}:{key}",
            )
        try:
            found = TpmKey.from_json(data, key)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the key file {path} is refused: {error}",
                hint="restore it from a backup of this machine's key directory",
            ) from error
        return found

    def write(self, key: TpmKey) -> None:
        """Write a key's file whole."""
        replace_file(self.path / f"{key.key}.json", key.to_bytes(), mode=0o600)

    @contextlib.contextmanager
    def changing(self, seconds: float) -> Iterator[None]:
        """Hold the directory for a change; it is made if it is missing."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {self.path}: {error.strerror}") from error
        self._refuse_shared()
        with self.locked(seconds):
            yield

    @contextlib.contextmanager
    def locked(self, seconds: float) -> Iterator[None]:
        """Hold the directory against other processes; ProviderUnavailable after ``seconds``."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"cannot open {self.path}: {error.strerror}") from error
        try:
            end = time.monotonic() + seconds
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise ProviderUnavailable(
                            f"another process has used the TPM of {self.path} for {seconds:g} s",
                            hint="look what it is doing; the TPM may hang",
                        ) from None
                    # Short, because whoever works in a loop lets go for less than a millisecond.
                    time.sleep(0.0005)
            yield
        finally:
            os.close(descriptor)

    def _refuse_shared(self) -> None:
        try:
            info = self.path.stat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigError(f"cannot use {self.path}: {error.strerror}") from error
        if not stat.S_ISDIR(info.st_mode):
            raise ConfigError(f"the key directory {self.path} is no directory")
        if problem := private_file_problem(info):
            raise ConfigError(
                f"the key directory {self.path} is refused: {problem}",
                hint=f"chmod 700 {self.path}",
            )


def read_json(path: Path) -> dict[str, Any] | None:
    """A private JSON file, or None where there is none.

    Raises:
        ConfigError: others can write it, or it is no JSON object of at most 1 MiB.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_mode & 0o022:
                raise ConfigError(f"{path} is refused: others can write it, or it is no file")
            content = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        data = json.loads(content) if len(content) <= MAX_FILE else None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is no JSON object of at most {MAX_FILE} bytes")
    return data


_HEX: Final = re.compile(r"[0-9a-f]{64}\.json")


def approval_files(directory: Path) -> list[Path]:
    """The files of installed approvals; none where there is no such directory."""
    folder = directory / "approvals"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _HEX.fullmatch(path.name))
