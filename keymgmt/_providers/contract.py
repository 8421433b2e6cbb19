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
    TypeVar,
)

from pydantic import AfterValidator, BaseModel, ConfigDict

from keymgmt._providers.names import is_key
from keymgmt._system.closing import Closing
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
    "SupportsBatchWrap",
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
    """Environment variables from which a provider of this backend reads secrets by itself, besides
    those that its table names (``SecretSource``). The verb ``exec`` does not pass them on."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )


def _key_name(text: str) -> str:
    if not is_key(text):
        raise ValueError(f"{text[:80]!r} is not a key name")
    return text


KeyName = Annotated[str, AfterValidator(_key_name)]
"""The name of a key in settings, such as those of the table ``keys``."""

S = TypeVar("S", bound=Settings)


class KeyProvider(Closing, Generic[S]):
    """One configured key service.

    To construct a provider is cheap and does no I/O; it connects on first use. It is safe to use
    from several threads, survives ``fork``, reconnects once on a lost session, and ends every call
    within a time limit. It raises only errors of ``keymgmt.errors``, with the error of the library
    underneath as ``__cause__``. It is a context manager that closes on exit, and is never pickled.
    """

    api_version: ClassVar[int] = API_VERSION
    backend: ClassVar[str]
    local: ClassVar[bool] = False
    """Whether ``unwrap`` computes everything in this process and asks no service and no device that
    could count wrong tries. Then all recipients of a model are tried; else a bounded number."""
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
        """Decrypt the result of ``wrap``, given the same ``context``.

        Raises:
            WrongKey: this provider does not hold that key or version, which it knows without
                decrypting.
            UnwrapFailed: this provider holds the key, and authentication failed: the context is
                another, the blob was changed, or another key has that name. No cipher can tell
                these apart.
            ProviderError: any other refusal or failure of the service.
        """

    @abstractmethod
    def check(self, key: str | None = None) -> Health:
        """See whether the service is reached and the login works; with ``key``, make a round trip.

        Failures are findings, not exceptions.
        """

    def close(self) -> None:
        """End sessions and connections, and wipe all secrets; may be called again."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key provider is not pickled: make one in each process")


class SupportsKeyManagement(ABC):
    """A provider that makes and looks after keys."""

    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]]
    """The kinds of ``create_key``: kind -> purpose; the first of a purpose is its default."""
    rotates_unseen: ClassVar[bool] = False
    """Whether the service rotates the material inside of a key and shows no versions. Then a key
    has one version, which ``rotate_key`` keeps and ``retire_version`` refuses to retire."""

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
    """A provider that also deletes keys. A model that only such a key opens never opens again."""

    @abstractmethod
    def delete_key(self, key: str) -> str | None:
        """Delete this key with all its versions, and no other key.

        The caller has to find out before whether a model still needs the key.

        Returns:
            None where the key is gone. Where the service deletes a key only after a delay, the time
            of the deletion (ISO 8601, UTC): until then the key cannot be used, and the deletion can
            be cancelled.

        Raises:
            KeyNotFound: there is no such key.
            UnsupportedOperation: this key cannot be deleted from here; the hint says how else.
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
    """A provider whose wrapping keys have a public part, to which others seal without asking it."""

    @abstractmethod
    def export_recipient(self, key: str) -> Recipient:
        """The public part of the newest version of ``key``, for a recipient file."""

    def holds(self, wrapped: WrappedKey) -> bool:  # noqa: ARG002 - a default
        """Whether ``wrapped`` is for a key version of this provider, judged by the public key.

        This is also true of a version that cannot unwrap any more, because the boot state that it
        is bound to is gone or its device was cleared. Then ``rewrap``, which opened the model with
        another group, wraps to the newest version of this key instead. The answer is False where
        the provider cannot tell; no device is asked.
        """
        return False


class SupportsBatchUnwrap(ABC):
    """A provider that unwraps many keys in one call to its service."""

    @abstractmethod
    def unwrap_batch(
        self, items: Sequence[tuple[WrappedKey, bytes]]
    ) -> Sequence[Dek | ProviderError]:
        """One answer for each ``(wrapped, context)``, in order; one bad item fails alone."""


class SupportsBatchWrap(ABC):
    """A provider that wraps many data keys in one call to its service."""

    @abstractmethod
    def wrap_batch(
        self, key: str, items: Sequence[tuple[Dek, bytes]]
    ) -> Sequence[WrappedKey | ProviderError]:
        """Wrap each ``(dek, context)`` under the newest version of ``key``; one answer each.

        Raises as ``wrap`` where nothing can be wrapped under that key.
        """
