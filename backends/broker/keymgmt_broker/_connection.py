"""One connection to one address of the service, which nothing in the environment steers.

No proxy and no authority comes from the environment, no redirect is followed, and an answer has a
bound. Who calls sets the time limit of the whole exchange.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from keymgmt.backend import (
    FormatError,
    JsonReader,
    ProviderError,
    ProviderUnavailable,
    is_name,
    read_file,
)
from keymgmt_broker._errors import FAULTS
from keymgmt_broker.protocol import MAX_ANSWER, REFUSAL, STATUS, read

if TYPE_CHECKING:
    from types import TracebackType

    from keymgmt_broker._settings import Address

__all__ = ["Connection"]

_MAX_PEM: Final = 4 << 20
_CLOSED: Final = (http.client.RemoteDisconnected, ConnectionError, ssl.SSLEOFError)


class Connection:
    """A context manager that closes on exit; connects on first use."""

    def __init__(self, address: Address, ca_file: Path | None, seconds: float) -> None:
        """``seconds`` bound each step: connecting, and each wait for a part of an answer."""
        self._address = address
        if address.secure:
            context = _context(ca_file)
            self._http: http.client.HTTPConnection = http.client.HTTPSConnection(
                address.host, address.port, timeout=seconds, context=context
            )
        else:
            self._http = http.client.HTTPConnection(address.host, address.port, timeout=seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def call(self, method: str, path: str, body: bytes, expected: str, doing: str) -> JsonReader:
        """Send one request; the answer's JSON, of the format ``expected``.

        Raises:
            ProviderError: no whole answer, or the service refuses; ``doing`` begins the message.
        """
        try:
            status, data = self._exchange(method, path, body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error, doing) from error
        label = f"the answer of {self._address}"
        if status == 200:
            with contextlib.suppress(FormatError):
                return read(data, expected, label, MAX_ANSWER)
        raise self._refusal(status, data, label, doing)

    def _exchange(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"} if body else {}
        fresh = self._http.sock is None
        try:
            self._http.request(method, path, body or None, headers)
            return self._answer()
        except _CLOSED:
            # A server may close a connection that is idle at any time, as one does that ends.
            self._http.close()
            if fresh:
                raise
        self._http.request(method, path, body or None, headers)
        return self._answer()

    def _answer(self) -> tuple[int, bytes]:
        response = self._http.getresponse()
        data = response.read(MAX_ANSWER + 1)
        # Without a length, an answer that was cut off looks like a whole one.
        endless = response.length is None and not response.chunked
        if len(data) > MAX_ANSWER or response.length or endless:
            raise http.client.HTTPException("an answer that is too long, or was cut off")
        return response.status, data

    def _refusal(self, status: int, data: bytes, label: str, doing: str) -> ProviderError:
        word = ""
        with contextlib.suppress(FormatError):
            reader = read(data, REFUSAL, label, MAX_ANSWER)
            word = reader.text("refused", limit=32)
        if STATUS.get(word) != status or not is_name(word):
            word = f"status {status}"
        return FAULTS.error(word, doing)

    def _unreachable(self, error: Exception, doing: str) -> ProviderError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return ProviderUnavailable(
                f"{doing}: the certificate of {self._address} is not accepted: "
                f"{error.verify_message}",
                hint="look at ca_file, at the name in service, and at the clock of this machine",
                passing=True,
            )
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return ProviderUnavailable(
            f"{doing}: {self._address} cannot be reached: {reason or type(error).__name__}",
            hint="look whether the service runs there, and at service in the config",
            passing=True,
        )


def _context(ca_file: Path | None) -> ssl.SSLContext:
    # ssl.create_default_context would follow SSL_CERT_FILE and SSLKEYLOGFILE.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    assert ca_file is not None  # noqa: S101 - the settings require it with https
    pem = read_file(
        ca_file, label="ca_file", limit=_MAX_PEM, access="trusted", error=ProviderUnavailable
    )
    try:
        context.load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:
        raise ProviderUnavailable(
            f"{ca_file} holds no certificate in PEM", hint="name the PEM file of the authority"
        ) from error
    return context
