"""The contract between keymgmt and a key service: KeyProvider, its abilities, and their data.

Wrap and unwrap are the whole of it; a KEK never leaves its provider. Optional abilities are small
classes that a provider may also be. A backend imports all of this from ``keymgmt.backend``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Final,
    Generic,
    Literal,
    NoReturn,
    Self,
    TypeVar,
)

from pydantic import AfterValidator, BaseModel, ConfigDict

from keymgmt._providers.names import is_key
from keymgmt.errors import ProviderError

if TYPE_CHECKING:
    from keymgmt._crypto.dek import Dek
    from keymgmt._providers.data import Health, KeyInfo, Signature, WrappedKey
    from keymgmt._providers.recipient_file import Recipient

__all__ = [
    "API_VERSION",
    "KeyName",
    "KeyProvider",
    "Settings",
    "SupportsBatchUnwrap",
    "SupportsKeyDeletion",
    "SupportsKeyManagement",
    "SupportsOfflineRecipients",
    "SupportsSigning",
]

API_VERSION: Final = 1


class Settings(BaseModel):
    """Base of a backend's settings: the strict model of its ``[providers.NAME]`` table.

    Unknown members are errors, values are not coerced, and an instance does not change.
    """

    secret_variables: ClassVar[frozenset[str]] = frozenset()
    """Variables of the environment that a table of this kind takes secrets from, besides those that
    it names itself (``SecretSource``). A program that is executed on a model does not get them."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )


def _key_name(text: str) -> str:
    if not is_key(text):
        raise ValueError(f"{text[:80]!r} is no key name")
    return text


KeyName = Annotated[str, AfterValidator(_key_name)]
"""The name of a key in settings, such as those of the table ``keys``."""

S = TypeVar("S", bound=Settings)


class KeyProvider(ABC, Generic[S]):
    """One configured key service.

    Making one is cheap and does no I/O; it connects on first use. It is safe to use from several
    threads, survives ``fork``, reconnects once on a lost session, and ends every call within a
    time limit. It raises only errors of ``keymgmt.errors``, with the library's own as
    ``__cause__``. It is a context manager that closes on exit, and is never pickled.
    """

    api_version: ClassVar[int] = API_VERSION
    backend: ClassVar[str]
    local: ClassVar[bool] = False
    """Whether ``unwrap`` asks nobody: no service, no device, no limit of wrong tries. Then as many
    recipients of a model are tried as it has; else a bounded number."""
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


class SupportsKeyManagement(ABC):
    """A provider that makes and looks after keys."""

    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]]
    """What ``create_key`` can make: kind -> purpose; the first of a purpose is its default."""
    rotates_unseen: ClassVar[bool] = False
    """Whether the service rotates inside of a key and says nothing of it: then a key has one
    version, which ``rotate_key`` keeps and ``retire_version`` refuses to retire."""

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


class SupportsKeyDeletion(ABC):
    """A provider that also deletes keys: what only such a key opens never opens again."""

    @abstractmethod
    def delete_key(self, key: str) -> str | None:
        """Delete a key with all its versions, and no other.

        Whether something needs it is for the caller to find out.

        Returns:
            None where it is gone; else the time (ISO 8601, UTC) at which the service will delete
            it, where the service waits: until then the key serves for nothing, and can be kept.

        Raises:
            KeyNotFound: there is no such key.
            UnsupportedOperation: it is not deleted from here; the hint says how else.
        """


class SupportsSigning(ABC):
    """A provider that signs with keys that never leave it.

    The algorithm follows from the public key: Ed25519 (RFC 8032), ML-DSA-65 (FIPS 204, empty
    context), ECDSA P-256 with SHA-256 and P-384 with SHA-384 (DER ``Ecdsa-Sig-Value``, RFC 3279),
    RSA of 2048 bits and more: PSS with SHA-256, MGF1-SHA-256 and a salt of 32 bytes (RFC 8017).
    """

    @abstractmethod
    def public_key(self, key: str, version: str | None = None) -> bytes:
        """A version's public key, by default the newest's, as DER SubjectPublicKeyInfo.

        Raises:
            KeyNotFound: there is no such key, or no such version of it any more.
        """

    @abstractmethod
    def sign(self, key: str, message: bytes) -> Signature:
        """Sign ``message`` (not a digest) with the newest version of ``key``."""


class SupportsOfflineRecipients(ABC):
    """A provider whose wrapping keys have a public part, to which others seal without it."""

    @abstractmethod
    def export_recipient(self, key: str) -> Recipient:
        """The public part of the newest version of ``key``, for a recipient file."""

    def holds(self, wrapped: WrappedKey) -> bool:  # noqa: ARG002 - a default
        """Whether the version that was wrapped to is one of its own, by its public key.

        Also where it opens no more, because its boot state is gone or its device was cleared: then
        ``rewrap`` moves to its newest version what another group opened. Nothing is asked that
        could fail; False where the provider cannot tell.
        """
        return False


class SupportsBatchUnwrap(ABC):
    """A provider that unwraps many keys in one call to its service."""

    @abstractmethod
    def unwrap_batch(
        self, items: Sequence[tuple[WrappedKey, bytes]]
    ) -> Sequence[Dek | ProviderError]:
        """One answer for each ``(wrapped, context)``, in order; one bad item fails alone."""
