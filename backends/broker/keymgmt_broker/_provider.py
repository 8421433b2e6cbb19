"""BrokerProvider: unwrap by a service that gives a share to a proven machine alone."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import ClassVar, Final

from keymgmt.backend import (
    Deadline,
    Dek,
    Finding,
    FormatError,
    Health,
    JsonReader,
    KeymgmtError,
    KeyNotFound,
    KeyProvider,
    ProviderError,
    ProviderUnavailable,
    Recipient,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    bare,
    check_backend,
    check_key,
    hpke_generate,
    hpke_open,
    hpke_public,
    read_file,
    try_key,
    wipe,
    within,
    wrap_for,
)
from keymgmt_broker._connection import Connection
from keymgmt_broker._settings import Address, BrokerSettings
from keymgmt_broker.protocol import (
    ANSWER,
    BACKEND,
    HEALTH,
    HEALTH_PATH,
    MAX_EVIDENCE,
    NONCE,
    NONCE_PATH,
    UNWRAP_PATH,
    Request,
    answer_info,
)

__all__ = ["BrokerProvider"]

_MAX_RECIPIENT: Final = 32768
_MAX_SEALED: Final = 4096
# Seconds before each round of all addresses: an instance that ends, or is busy, is asked again.
_PAUSES: Final = (0.0, 0.3, 1.0)
_WHAT: Final = "the key broker"


class BrokerProvider(KeyProvider[BrokerSettings]):
    """Keys of a key broker, which a machine uses by proving what runs on it.

    Example::

        [providers.proven]
        backend = "broker"
        service = "https://broker.example:8443"
        ca_file = "site-ca.pem"
        evidence = "sgx"
        recipients = { resnet50 = "resnet50.recipient" }

    ``wrap`` needs only the recipient file. Each ``unwrap`` makes a new key for its answer, which is
    used once; the provider keeps no state.
    """

    backend: ClassVar[str] = BACKEND
    Settings: ClassVar[type[BrokerSettings]] = BrokerSettings

    @bare
    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; offline, to the recipient file that the settings name for the key."""
        return wrap_for(self._recipient(check_key(key)), dek, context)

    def _recipient(self, key: str) -> Recipient:
        path = self.settings.recipients.get(key)
        if path is None:
            raise KeyNotFound(
                f"[providers.{self.name}] names no recipient file for the key {key!r}",
                hint="have it exported at the broker, and name the file in recipients",
            )
        content = read_file(
            path,
            label="recipient file",
            limit=_MAX_RECIPIENT,
            access="trusted",
            error=ProviderUnavailable,
        )
        try:
            recipient = Recipient.from_bytes(bytes(content))
        except FormatError as error:
            raise ProviderUnavailable(f"{path}: {error}", hint=error.hint) from error
        if (recipient.backend, recipient.key) != (BACKEND, key):
            raise ProviderUnavailable(
                f"{path} is of {recipient}, not of {BACKEND}:{key}",
                hint="have it exported at the broker again, for this key",
            )
        return recipient

    @bare
    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider; two requests, and evidence between them."""
        check_backend(wrapped, BACKEND)
        deadline = Deadline(self.settings.timeout, _WHAT)
        return deadline.run(lambda: self._unwrap(wrapped, context, deadline))

    def _unwrap(self, wrapped: WrappedKey, context: bytes, deadline: Deadline) -> Dek:
        doing = f"unwrapping with the key {wrapped.key!r}"
        addresses = self.settings.addresses
        failed: ProviderError | None = None
        for pause in _PAUSES:
            time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - no secret
            for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
                share = deadline.share(left)
                try:
                    with Connection(address, self.settings.ca_file, share) as connection:
                        return self._ask(connection, wrapped, context, doing)
                except ProviderError as error:
                    if not error.passing:
                        raise
                    failed = error
        assert failed is not None  # noqa: S101 - there is an address
        raise failed

    def _ask(self, connection: Connection, wrapped: WrappedKey, context: bytes, doing: str) -> Dek:
        kind, settings = self.settings.hpke, self.settings
        private = hpke_generate(kind)
        try:
            nonce = _base64(connection.call("POST", NONCE_PATH, b"", NONCE, doing), "nonce", doing)
            public = hpke_public(kind, private)
            request = Request(nonce, kind, public, wrapped, context, settings.evidence.kind)
            evidence = settings.evidence.make().quote(request.report_data)
            if len(evidence) > MAX_EVIDENCE:
                raise UnsupportedOperation(
                    f"{doing}: the evidence has {len(evidence)} bytes, and a broker takes "
                    f"{MAX_EVIDENCE}"
                )
            body = request.with_evidence(evidence).to_bytes()
            answer = connection.call("POST", UNWRAP_PATH, body, ANSWER, doing)
            sealed = _base64(answer, "sealed", doing)
            try:
                return hpke_open(kind, private, sealed, answer_info(request.report_data))
            except UnwrapFailed as error:
                raise _not_ours(doing, "is not for this request") from error
        finally:
            wipe(private)

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider; each address, this machine's evidence, and a round trip."""
        seconds = self.settings.timeout
        try:
            return Health(tuple(within(seconds, _WHAT, lambda: [*self._findings(key)])))
        except KeymgmtError as error:
            return Health((Finding.failure("service", error),))

    def _findings(self, key: str | None) -> Iterator[Finding]:
        found = [self._reach(address) for address in self.settings.addresses]
        yield from found
        name = f"evidence {self.settings.evidence.kind}"
        try:
            evidence = self.settings.evidence.make().quote(bytes(32))
        except KeymgmtError as error:
            yield Finding.failure(name, error)
            return
        yield Finding(name, "ok", f"{len(evidence)} bytes")
        # The service judges evidence when it is asked for a key, and has no other login.
        asked = next(iter(self.settings.recipients), None) if key is None else key
        if all(finding.status == "failed" for finding in found):
            return
        if asked is None:
            yield Finding("login", "skipped", "recipients names no key to ask the broker for")
            return
        try:
            try_key(self, asked)
        except KeymgmtError as error:
            yield Finding.failure(f"round trip {asked}", error)
        else:
            yield Finding(f"round trip {asked}", "ok", "wrapped and unwrapped")

    def _reach(self, address: Address) -> Finding:
        seconds = self.settings.timeout / (2 * len(self.settings.addresses))
        try:
            with Connection(address, self.settings.ca_file, seconds) as connection:
                connection.call("GET", HEALTH_PATH, b"", HEALTH, "looking whether it is well")
        except ProviderError as error:
            return Finding.failure(str(address), error)
        return Finding(str(address), "ok", "it answers")


def _base64(answer: JsonReader, name: str, doing: str) -> bytes:
    try:
        data = answer.base64(name, limit=_MAX_SEALED)
        answer.end()
    except FormatError as error:
        raise _not_ours(doing, "cannot be read") from error
    return data


def _not_ours(doing: str, what: str) -> ProviderUnavailable:
    return ProviderUnavailable(
        f"{doing}: the broker's answer {what}",
        hint="look whether service is its address, and what stands between that may answer for it",
        passing=True,
    )
