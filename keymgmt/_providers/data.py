"""The data between keymgmt and a key service: wraps, keys, signatures, findings of a check."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from keymgmt._providers.names import is_key, is_name, is_version
from keymgmt.errors import AccessDenied, FormatError, KeymgmtError

__all__ = [
    "MAX_BLOB",
    "MAX_PARAMS",
    "Finding",
    "Health",
    "KeyInfo",
    "KeyVersion",
    "Signature",
    "Status",
    "WrappedKey",
]

MAX_BLOB: Final = 8192
MAX_PARAMS: Final = 8
_MECHANISM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_PARAM_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_PARAM_VALUE: Final = re.compile(r"[A-Za-z0-9._=+/-]{0,256}")


@dataclass(frozen=True)
class WrappedKey:
    """One data key (or share) encrypted under one version of one KEK.

    A wrap names the key and never where the key service is: no address, module path, mount or file.
    Nothing in it is secret. When it was read from a file, all of it is hostile, so the grammar of
    each member is checked here.

    Attributes:
        backend: kind of key service, such as ``vault``.
        key: the KEK's name there.
        version: the KEK's version as the provider counts it.
        mechanism: how it was wrapped; for each key the provider has a list of those it allows.
        blob: the ciphertext, 1 to 8192 bytes.
        params: at most 8 short public strings that unwrapping needs.

    Raises:
        FormatError: a member does not have its grammar, or is too long.
    """

    backend: str
    key: str
    version: str
    mechanism: str
    blob: bytes = field(repr=False)
    params: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_name(self.backend):
            raise FormatError(f"a recipient has no valid backend name: {str(self.backend)[:40]!r}")
        if not is_key(self.key):
            raise FormatError(f"a recipient has no valid key name: {str(self.key)[:80]!r}")
        if not is_version(self.version):
            raise FormatError(f"a recipient has no valid key version: {str(self.version)[:40]!r}")
        if not isinstance(self.mechanism, str) or not _MECHANISM.fullmatch(self.mechanism):
            raise FormatError(f"a recipient has no valid mechanism: {str(self.mechanism)[:40]!r}")
        if not isinstance(self.blob, bytes) or not 1 <= len(self.blob) <= MAX_BLOB:
            raise FormatError(f"the blob of a recipient does not have 1 to {MAX_BLOB} bytes")
        if len(self.params) > MAX_PARAMS or not all(
            isinstance(name, str)
            and isinstance(value, str)
            and _PARAM_NAME.fullmatch(name)
            and _PARAM_VALUE.fullmatch(value)
            for name, value in self.params.items()
        ):
            raise FormatError(
                f"the parameters of a recipient are not at most {MAX_PARAMS} short plain texts"
            )

    def __str__(self) -> str:
        return f"{self.backend}:{self.key}@{self.version}"


Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one step of a check: name, status and detail, and the way out of a fault."""

    name: str
    status: Status
    detail: str = ""
    hint: str | None = None

    @classmethod
    def failure(cls, name: str, error: KeymgmtError, *, may_lack: bool = False) -> Finding:
        """The finding for a failure; a right that this machine ``may_lack`` is only skipped."""
        skipped = may_lack and isinstance(error, AccessDenied)
        return cls(name, "skipped" if skipped else "failed", str(error), error.hint)


@dataclass(frozen=True)
class Health:
    """The findings of ``KeyProvider.check``, in the order of its steps."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings may be among the findings."""
        return all(finding.status != "failed" for finding in self.findings)


@dataclass(frozen=True)
class KeyVersion:
    """One version of a key.

    ``state`` is active (new wraps and signatures use it), old (it still unwraps or verifies) or
    retired (it does neither any more).
    """

    version: str
    state: Literal["active", "old", "retired"]
    created: str | None = None


@dataclass(frozen=True)
class KeyInfo:
    """The description of a key by its provider; nothing in it is secret.

    ``kind`` is the algorithm, as the backend names it; ``versions`` run from oldest to newest;
    ``detail`` holds all else that the operator should see.
    """

    key: str
    purpose: Literal["wrap", "sign"]
    kind: str
    versions: tuple[KeyVersion, ...]
    detail: Mapping[str, str] = field(default_factory=dict)

    @property
    def newest(self) -> str:
        """The version that new wraps or signatures use."""
        return self.versions[-1].version


@dataclass(frozen=True)
class Signature:
    """A detached signature and the public key (DER SubjectPublicKeyInfo) that verifies it."""

    signature: bytes
    public_key: bytes
