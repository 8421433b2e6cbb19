"""AcmeHsmProvider: wrap and unwrap with an AES-256 key that stays in the HSM."""

from __future__ import annotations

import contextlib
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import ClassVar, Final, NoReturn, TypeVar

from kmip.core.enums import ResultReason
from kmip.pie.exceptions import ClientConnectionNotOpen, KmipOperationFailure
from kmip.services.kmip_protocol import RequestLengthMismatch
from pydantic import Field

from acme_keymgmt_hsm.client import BLOCK, Session
from keymgmt.backend import (
    DEK_LENGTH,
    AccessDenied,
    ConfigPath,
    Dek,
    Finding,
    Health,
    KeymgmtError,
    KeyNotFound,
    KeyProvider,
    KeyRetired,
    ProviderUnavailable,
    Settings,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    check_key,
    check_trusted,
    inner_unwrap,
    inner_wrap,
    is_version,
    wipe,
)

__all__ = ["AcmeHsmProvider", "AcmeHsmSettings"]

MECHANISM: Final = "KMIP-A256CTR+A256GCM"
LOST: Final = (OSError, EOFError, RequestLengthMismatch, ClientConnectionNotOpen)
SESSIONS: Final = 4
"""How many sessions are open at most; an HSM has a number of its own."""
R = TypeVar("R")


class AcmeHsmSettings(Settings):
    """``[providers.NAME]`` with ``backend = "acme-hsm"``.

    Attributes:
        host: name of the HSM, as in its certificate.
        port: KMIP port.
        ca_file: certificates (PEM) that vouch for the HSM.
        certificate: our client certificate (PEM); its common name is our login.
        private_key: its key (PEM), in a file 0600.
        keys: our key names -> names of key objects, where they differ.
        timeout: seconds within which every call ends.
    """

    host: str = Field(min_length=1)
    port: int = Field(default=5696, gt=0, lt=65536)
    ca_file: ConfigPath
    certificate: ConfigPath
    private_key: ConfigPath
    keys: dict[str, str] = Field(default_factory=dict)
    timeout: float = Field(default=10.0, gt=0, le=300)


class AcmeHsmProvider(KeyProvider[AcmeHsmSettings]):
    """AES-256 keys of an HSM that speaks KMIP 1.2, over TLS with a client certificate.

    Example::

        [providers.site]
        backend = "acme-hsm"
        host = "hsm.acme.example"
        ca_file = "acme-ca.pem"
        certificate = "line7.pem"
        private_key = "line7.key"

    A key is every symmetric AES-256 object of its name; a version is one object, by its unique
    identifier. The newest active one wraps; each active one unwraps. The HSM's own tools make,
    rotate (another object of the name) and revoke them. Our certificate needs Locate, Get
    Attributes, Encrypt and Decrypt.

    KMIP servers disagree on AES-GCM, so the HSM encrypts a random inner key with AES-CTR, and
    AES-256-GCM under that key, here, carries the data key and the context. CTR has no padding to
    ask an oracle about, and an inner key that was changed on the way opens nothing.
    """

    backend: ClassVar[str] = "acme-hsm"
    Settings: ClassVar[type[AcmeHsmSettings]] = AcmeHsmSettings

    def __init__(self, name: str, settings: AcmeHsmSettings) -> None:
        super().__init__(name, settings)
        self._idle: list[Session] = []
        self._process = os.getpid()
        self._free = threading.Semaphore(SESSIONS)

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; the newest active object of that name."""
        name = self._native(key)

        def call(session: Session, end: float) -> tuple[str, bytes]:
            found = session.versions(name, end)
            active = [version for version in found if version.active]
            if not found:
                raise KeyNotFound(f"{self.name!r} has no AES-256 key named {name!r}")
            if not active:
                raise KeyRetired(f"no version of {name!r} is active")
            uid = active[-1].uid
            return uid, inner_wrap(
                dek, context, lambda inner: session.encrypt(uid, inner.view(), end)
            )

        uid, blob = self._ask(call)
        if not is_version(uid):
            raise UnsupportedOperation(f"the unique identifier {uid[:40]!r} is no version here")
        return WrappedKey(self.backend, key, uid, MECHANISM, blob)

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider."""
        name = self._native(wrapped.key)
        if wrapped.backend != self.backend:
            raise WrongKey(f"{wrapped} is not of the backend {self.backend!r}")

        def call(session: Session, end: float) -> Dek:
            # The identifier comes from a file: only one that carries the key's name is used.
            known = {version.uid: version for version in session.versions(name, end)}
            version = known.get(wrapped.version)
            if version is None:
                raise WrongKey(f"{wrapped} is not held by {self.name!r}")
            if not version.active:
                raise KeyRetired(f"{wrapped} is not active any more")
            if wrapped.mechanism != MECHANISM or wrapped.params:
                raise UnsupportedOperation(f"{wrapped.key!r} does not unwrap {wrapped.mechanism}")

            def decrypt(blob: bytes) -> Dek:
                if len(blob) != BLOCK + DEK_LENGTH:
                    raise UnwrapFailed(f"{wrapped} is malformed")
                inner = session.decrypt(version.uid, blob, end)
                try:
                    return Dek(inner)
                finally:
                    wipe(inner)

            return inner_unwrap(wrapped.blob, context, decrypt)

        return self._ask(call)

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider."""
        try:
            self._ask(lambda session, end: session.versions("keymgmt-check", end))
            found = [Finding("service", "ok", f"{self.settings.host}: reached, logged in")]
            if key is not None:
                with Dek.generate() as dek:
                    self.unwrap(self.wrap(key, dek, b"check"), b"check").wipe()
                found.append(Finding("key", "ok", f"{key}: wraps and unwraps"))
        except KeymgmtError as error:
            return Health((Finding.failure("service", error),))
        return Health(tuple(found))

    def close(self) -> None:
        """See KeyProvider; the next call connects again."""
        idle, self._idle = self._idle, []
        for session in idle:
            _hang_up(session)

    def _native(self, key: str) -> str:
        return self.settings.keys.get(check_key(key), key)

    def _ask(self, call: Callable[[Session, float], R]) -> R:
        """Run one call before the time limit; connect again once where the session was lost."""
        end = time.monotonic() + self.settings.timeout
        with self._turn(end):
            for again in (True, False):
                idle = self._idle
                session = idle.pop() if idle else None
                fresh = session is None
                try:
                    session = session or self._connect(end)
                    answer = call(session, end)
                except (KeymgmtError, KmipOperationFailure) as error:
                    self._give_back(session, idle)
                    if isinstance(error, KmipOperationFailure):
                        self._refused(error)
                    raise
                except Exception as error:  # noqa: BLE001 - PyKMIP has many; all are translated
                    _hang_up(session)
                    # What happened to one session happened to all that were open before.
                    self.close()
                    if isinstance(error, TimeoutError) or fresh or not again:
                        self._failed(error)
                else:
                    self._give_back(session, idle)
                    return answer
        raise AssertionError("unreachable")

    def _give_back(self, session: Session | None, idle: list[Session]) -> None:
        # Another list means that close() came in between.
        if session is not None and idle is self._idle:
            idle.append(session)
        else:
            _hang_up(session)

    def _connect(self, end: float) -> Session:
        told = self.settings
        # What this machine lacks is the provider's failure: another group may open the model.
        check_trusted(
            told.private_key, label="private key", private=True, error=ProviderUnavailable
        )
        arguments = (told.host, told.port, told.ca_file, told.certificate, told.private_key)
        return Session(*arguments, end)

    def _refused(self, error: KmipOperationFailure) -> NoReturn:
        """The HSM answered, and it was no."""
        reason = error.reason
        if reason == ResultReason.ITEM_NOT_FOUND:
            raise KeyNotFound(f"the key went away from {self.name!r} meanwhile") from error
        if reason in (
            ResultReason.PERMISSION_DENIED,
            ResultReason.AUTHENTICATION_NOT_SUCCESSFUL,
        ):
            raise AccessDenied(
                f"{self.name!r} refuses: {reason.name}",
                hint="ask for Locate, Get Attributes, Encrypt and Decrypt for our certificate",
            ) from error
        if reason in (ResultReason.CRYPTOGRAPHIC_FAILURE, ResultReason.INVALID_FIELD):
            raise UnwrapFailed("the HSM does not decrypt what was wrapped") from error
        raise ProviderUnavailable(f"{self.name!r} failed: {reason.name}") from error

    def _failed(self, error: Exception) -> NoReturn:
        """The HSM did not answer."""
        place = f"{self.settings.host}:{self.settings.port}"
        if isinstance(error, ssl.SSLCertVerificationError):
            raise ProviderUnavailable(
                f"{place} is not the HSM that ca_file vouches for: {error.verify_message}",
                hint="compare host and ca_file with the HSM's certificate",
            ) from error
        if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
            raise AccessDenied(
                f"{place} does not accept our certificate: {error.reason}",
                hint="have the certificate of this machine enrolled, or renewed",
            ) from error
        if isinstance(error, LOST):
            raise ProviderUnavailable(
                f"{place} is not reached: {error}", hint="is the HSM up, and the port open?"
            ) from error
        raise ProviderUnavailable(
            f"{place} answered something else: {type(error).__name__}"
        ) from error

    @contextlib.contextmanager
    def _turn(self, end: float) -> Iterator[None]:
        if self._process != os.getpid():
            # The child of a fork: turns were held by threads that it lacks, sessions by its parent.
            self._free = threading.Semaphore(SESSIONS)
            idle, self._idle = self._idle, []
            for session in idle:
                with contextlib.suppress(Exception):
                    session.abandon()
            self._process = os.getpid()
        free = self._free
        if not free.acquire(timeout=max(0.0, end - time.monotonic())):
            raise ProviderUnavailable(f"{self.name!r} is busy with other calls")
        try:
            yield
        finally:
            free.release()


def _hang_up(session: Session | None) -> None:
    if session is not None:
        with contextlib.suppress(Exception):
            session.close()
