"""The contract between keymgmt and a key service: KeyProvider, its abilities, and their data.

Wrap and unwrap are the whole of it; a KEK never leaves its provider. Optional abilities are small
classes that a provider may also be. A backend imports all of this from ``keymgmt.backend``.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Literal, NoReturn, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from keymgmt._names import is_key, is_name, is_version
from keymgmt.errors import FormatError, ProviderError

if TYPE_CHECKING:
    from keymgmt._dek import Dek
    from keymgmt._recipient import Recipient

__all__ = [
    "API_VERSION",
    "MAX_BLOB",
    "MAX_PARAMS",
    "Finding",
    "Health",
    "KeyInfo",
    "KeyProvider",
    "KeyVersion",
    "Settings",
    "Signature",
    "SupportsBatchUnwrap",
    "SupportsKeyManagement",
    "SupportsOfflineRecipients",
    "SupportsSigning",
    "WrappedKey",
]

API_VERSION: Final = 1
MAX_BLOB: Final = 8192
MAX_PARAMS: Final = 8
_MECHANISM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_PARAM_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_PARAM_VALUE: Final = re.compile(r"[A-Za-z0-9._=+/-]{0,256}")


class Settings(BaseModel):
    """Base of a backend's settings: the strict model of its ``[providers.NAME]`` table.

    Unknown members are errors, values are not coerced, and an instance does not change.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class WrappedKey:
    """One data key (or share) encrypted under one version of one KEK.

    It names the key and never the place: no address, module path, mount or file. All of it is
    plain, and all of it is hostile when it was read from a file, so its grammar is checked here.

    Attributes:
        backend: kind of key service, such as ``vault``.
        key: the KEK's name there.
        version: the KEK's version as the provider counts it.
        mechanism: how it was wrapped; the provider allows a list of them for each key.
        blob: the ciphertext, 1 to 8192 bytes.
        params: at most 8 short public strings that unwrapping needs.

    Raises:
        FormatError: a member is not of its grammar or over its bound.
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
            raise FormatError(f"the blob of a recipient has 1 to {MAX_BLOB} bytes")
        if len(self.params) > MAX_PARAMS or not all(
            isinstance(name, str)
            and isinstance(value, str)
            and _PARAM_NAME.fullmatch(name)
            and _PARAM_VALUE.fullmatch(value)
            for name, value in self.params.items()
        ):
            raise FormatError(f"a recipient has at most {MAX_PARAMS} short plain parameters")

    def __str__(self) -> str:
        return f"{self.backend}:{self.key}@{self.version}"


Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check looked at: what, how it is, and the way out where it is not well."""

    name: str
    status: Status
    detail: str = ""
    hint: str | None = None


@dataclass(frozen=True)
class Health:
    """What ``KeyProvider.check`` found, in the order in which it looked."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings may be among the findings."""
        return all(finding.status != "failed" for finding in self.findings)


class KeyProvider(ABC, Generic[S]):
    """One configured key service.

    Making one is cheap and does no I/O; it connects on first use. It is safe to use from several
    threads, survives ``fork``, reconnects once on a lost session, and ends every call within a
    time limit. It raises only errors of ``keymgmt.errors``, with the library's own as
    ``__cause__``. It is a context manager that closes on exit, and is never pickled.
    """

    api_version: ClassVar[int] = API_VERSION
    backend: ClassVar[str]
    Settings: ClassVar[type[Any]]

    def __init__(self, name: str, settings: S) -> None:
        """Keep ``name`` (the operator's word for this provider) and its settings; no I/O."""
        self.name = name
        self.settings = settings

    @abstractmethod
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """Encrypt ``dek`` under the newest version of ``key``, bound to ``context``.

        Args:
            key: name of a KEK; a name outside the grammar is a ConfigError.
            dek: 32 bytes; not wiped here.
            context: 0 to 1024 bytes that ``unwrap`` must be given again.

        Raises:
            KeyNotFound: no such key; wrapping never creates one.
            UnsupportedOperation: the key does not wrap (a signing key, say).
            ProviderError: any other refusal or failure of the service.
        """

    @abstractmethod
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """Decrypt what ``wrap`` made, given the same ``context``.

        Raises:
            WrongKey: this provider does not hold that key or version, known without decrypting.
            UnwrapFailed: it holds it, and authentication failed, for whatever reason.
            ProviderError: any other refusal or failure of the service.
        """

    @abstractmethod
    def check(self, key: str | None = None) -> Health:
        """Look whether the service is reached and lets us in; with ``key``, make a round trip.

        Failures are findings, not exceptions.
        """

    def close(self) -> None:
        """Let go of everything held, and wipe what is secret; may be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key provider is not pickled: make one in each process")


@dataclass(frozen=True)
class KeyVersion:
    """One version of a key: ``state`` is active, retired (unwraps or verifies no more) or old."""

    version: str
    state: Literal["active", "old", "retired"]
    created: str | None = None


@dataclass(frozen=True)
class KeyInfo:
    """What a provider says of a key; nothing of it is secret.

    ``kind`` is the algorithm in the backend's words; ``versions`` run from oldest to newest;
    ``detail`` is whatever else the operator should see.
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


class SupportsKeyManagement(ABC):
    """A provider that makes and looks after keys."""

    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]]
    """What ``create_key`` can make: kind -> purpose; the first of a purpose is its default."""

    @abstractmethod
    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """Make a key; ConfigError if it exists or an option is unknown."""

    @abstractmethod
    def list_keys(self) -> list[KeyInfo]:
        """All keys that this provider would use, sorted by name."""

    @abstractmethod
    def describe_key(self, key: str) -> KeyInfo:
        """One key; KeyNotFound where it is missing."""

    @abstractmethod
    def rotate_key(self, key: str) -> KeyInfo:
        """Add a version that new wraps use; old versions still unwrap."""

    @abstractmethod
    def retire_version(self, key: str, version: str) -> KeyInfo:
        """Stop a version from being used; ConfigError for the newest."""


@dataclass(frozen=True)
class Signature:
    """A detached signature and the public key (DER SubjectPublicKeyInfo) that verifies it."""

    signature: bytes
    public_key: bytes


class SupportsSigning(ABC):
    """A provider that signs with keys that never leave it.

    The algorithm follows from the public key: Ed25519 (RFC 8032), ML-DSA-65 (FIPS 204, empty
    context), ECDSA P-256 with SHA-256 and P-384 with SHA-384 (DER ``Ecdsa-Sig-Value``, RFC 3279),
    RSA of 2048 bits and more: PSS with SHA-256, MGF1-SHA-256 and a salt of 32 bytes (RFC 8017).
    """

    @abstractmethod
    def public_key(self, key: str) -> bytes:
        """The newest version's public key as DER SubjectPublicKeyInfo; KeyNotFound if missing."""

    @abstractmethod
    def sign(self, key: str, message: bytes) -> Signature:
        """Sign ``message`` (not a digest) with the newest version of ``key``."""


class SupportsOfflineRecipients(ABC):
    """A provider whose wrapping keys have a public part, to which others seal without it."""

    @abstractmethod
    def export_recipient(self, key: str) -> Recipient:
        """The public part of the newest version of ``key``, for a recipient file."""


class SupportsBatchUnwrap(ABC):
    """A provider that unwraps many keys in one call to its service."""

    @abstractmethod
    def unwrap_batch(
        self, items: Sequence[tuple[WrappedKey, bytes]]
    ) -> Sequence[Dek | ProviderError]:
        """One answer for each ``(wrapped, context)``, in order; one bad item fails alone."""


R = TypeVar("R")


def within(seconds: float, what: str, call: Callable[[], R]) -> R:
    """Run ``call`` and give up on it after ``seconds``, leaving its thread behind.

    For C libraries that cannot be interrupted: whatever ``call`` uses must not be used again
    after ProviderUnavailable was raised here.
    """
    from keymgmt.errors import ProviderUnavailable

    box: list[R] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            box.append(call())
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread below
            failure.append(error)

    thread = threading.Thread(target=run, name=f"keymgmt {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not box:
        raise ProviderUnavailable(
            f"{what} gave no answer within {seconds:g} seconds",
            hint="look whether the service hangs; the call was abandoned",
        )
    return box[0]
