"""One call to one node, over reused connections that neither environment nor server can redirect.

Rules: no proxy, no netrc, no CA bundle and no key log from the environment (http.client reads none
of them, and the TLS context is built here); no redirect is followed; an answer has at most
``MAX_ANSWER`` bytes and is never decompressed; a call ends by its deadline even if the server sends
a byte now and then. When the file of a certificate or an authority changes, the next connection
reads it again.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import certifi

from keymgmt.backend import (
    Deadline,
    ProviderError,
    ProviderUnavailable,
    is_loopback,
    read_file,
    wipe,
)
from keymgmt_vault._errors import NodeFailure

if TYPE_CHECKING:
    from keymgmt_vault._settings import Address, VaultSettings

__all__ = ["MAX_ANSWER", "Answer", "Endpoint", "Node", "Tls"]

MAX_ANSWER: Final = 4 << 20
_MAX_PEM: Final = 4 << 20
_KEPT: Final = 64  # idle connections
_IDLE: Final = 30.0  # seconds; a firewall may forget a connection that is idle for longer
_CLOSED: Final = (http.client.RemoteDisconnected, ConnectionError, ssl.SSLEOFError)
_VERIFY: Final = {9: "clock", 10: "expired"}  # X509_V_ERR_CERT_NOT_YET_VALID, _HAS_EXPIRED
log: Final = logging.getLogger("keymgmt.vault")


class Endpoint(NamedTuple):
    """The socket address that a name resolved to."""

    family: int
    where: Any


class Answer(NamedTuple):
    """The answer of a node, with any status; ``data`` may hold a secret."""

    status: int
    headers: Message
    data: bytes


class _Timed:
    """A socket whose timeout is what is left of the call's deadline, and starts not again."""

    deadline: Deadline

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        left = self.deadline.remaining
        if not left:
            raise TimeoutError("timed out")
        self.settimeout(left)  # type: ignore[attr-defined]
        return super().recv_into(*args, **kwargs)  # type: ignore[misc,no-any-return]


class _Socket(_Timed, socket.socket):
    pass


class _TlsSocket(_Timed, ssl.SSLSocket):
    pass


class Tls:
    """The TLS context of a provider: its own authorities and certificate, TLS 1.2 or newer."""

    def __init__(self, settings: VaultSettings) -> None:
        self._settings = settings
        self._current: tuple[object, ssl.SSLContext] | None = None

    def context(self) -> ssl.SSLContext:
        """The context from the present files; the last good one while they are being replaced.

        Raises:
            ProviderUnavailable: a file is missing, not private, or not PEM.
        """
        files = self._settings.ca_file, self._settings.client_cert, self._settings.client_key
        state = [_state(path) for path in files if path]
        current = self._current
        if current is None or current[0] != state:
            try:
                current = state, _context(self._settings)
            except ProviderError as error:
                if current is None:
                    raise
                log.warning("the certificates that were read before are used, because %s", error)
            else:
                self._current = current
        return current[1]


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size


def _context(settings: VaultSettings) -> ssl.SSLContext:
    # ssl.create_default_context would follow SSL_CERT_FILE and SSLKEYLOGFILE of the environment.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = _TlsSocket
    path = settings.ca_file
    try:
        if path is None:
            context.load_verify_locations(cafile=certifi.where())
        else:
            pem = _read(path, "ca_file", private=False)
            context.load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:
        raise ProviderUnavailable(f"{path} holds no certificate in PEM") from error
    certificate, key = settings.client_cert, settings.client_key
    if certificate is None or key is None:
        return context
    _read(certificate, "client_cert", private=False)
    wipe(_read(key, "client_key", private=True))
    source = settings.client_key_password
    password = source.read() if source else bytearray()
    try:
        # An empty password stops OpenSSL from asking on the terminal.
        context.load_cert_chain(certificate, key, password=password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ProviderUnavailable(
            f"{certificate} and {key} are not a certificate and its private key in PEM",
            hint="if the key has a password, name it as client_key_password",
        ) from error
    finally:
        wipe(password)
    return context


def _read(path: Path, label: str, *, private: bool) -> bytearray:
    access: Any = "private" if private else "trusted"
    return read_file(path, label=label, limit=_MAX_PEM, access=access, error=ProviderUnavailable)


class Node:
    """One endpoint of one configured address, and the connections to it; shared between threads."""

    def __init__(self, address: Address, endpoint: Endpoint, tls: Tls, name: str | None) -> None:
        """``name`` is the name in the server's certificate, if not the host of the address."""
        self.address: Final = address
        self._endpoint, self._tls, self._name = endpoint, tls, name or address.host
        self._idle: deque[tuple[float, socket.socket]] = deque()

    def __str__(self) -> str:
        return str(self.address)

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        seconds: float,
        *,
        answer: float | None = None,
        fresh: bool = False,
    ) -> Answer:
        """Send one request and read its whole answer, with any status.

        Args:
            method: HTTP method.
            path: from ``/v1/`` on.
            body: JSON, or None.
            headers: all headers but ``Host``.
            seconds: for the connection and the answer together.
            answer: seconds for sending and the answer, in place of the rest of ``seconds``.
            fresh: open a new connection, which fails before the request is sent if the node hangs.

        Raises:
            NodeFailure: no whole answer of allowed size in that time.
            ProviderUnavailable: the files for TLS cannot be used.
        """
        deadline = Deadline(seconds, str(self))
        data = self._encode(method, path, body, headers)
        if not fresh and (kept := self._take()):
            with contextlib.suppress(*_CLOSED):
                # With these errors the connection was closed while it was idle, so the request is
                # sent again.
                return self._exchange(kept, method, data, deadline)
        connection = self._connect(deadline)
        if answer is not None:
            deadline = Deadline(answer, str(self))
        try:
            return self._exchange(connection, method, data, deadline)
        except _CLOSED as error:
            raise NodeFailure("broken") from error

    def _encode(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> bytes:
        """The request as it is sent, in one piece (RFC 9112); no value can hold a line end."""
        fields = {**headers, "Host": self.address.netloc, "Content-Length": str(len(body or b""))}
        lines = [f"{method} {self.address.path}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        text = "".join(lines)
        if not text.isascii() or not text.isprintable():
            raise NodeFailure("broken", sent=False)
        return "\r\n".join((*lines, "\r\n")).encode() + (body or b"")

    def _exchange(self, connection: Any, method: str, data: bytes, deadline: Deadline) -> Answer:
        kept = False
        connection.deadline = deadline
        try:
            connection.settimeout(max(0.001, deadline.remaining))
            connection.sendall(data)
            with http.client.HTTPResponse(connection, method=method) as response:
                response.begin()
                # Without a length, a truncated answer looks like a whole one.
                endless = response.length is None and not response.chunked
                content = response.read(MAX_ANSWER + 1)
                if len(content) > MAX_ANSWER or (response.length or 0) > MAX_ANSWER:
                    raise NodeFailure("oversized", MAX_ANSWER)
                if endless or response.length:
                    raise NodeFailure("broken")
                kept = not response.will_close
                return Answer(response.status, response.headers, content)
        except _CLOSED:
            raise
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise _failure(error, deadline, sent=True) from error
        finally:
            if kept and len(self._idle) < _KEPT:
                self._idle.append((time.monotonic(), connection))
            else:
                # The unread rest of this answer must never be read as the next answer.
                connection.close()

    def _take(self) -> socket.socket | None:
        while True:
            try:
                since, idle = self._idle.pop()
            except IndexError:
                return None
            if time.monotonic() - since < _IDLE and not _readable(idle):
                return idle
            idle.close()

    def _connect(self, deadline: Deadline) -> socket.socket:
        secure = self.address.scheme == "https"
        context = self._tls.context() if secure else None
        family, where = self._endpoint
        connection: socket.socket = _Socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.001, deadline.remaining))
            connection.connect(where)
            if family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.address.scheme == "http":
                _check_loopback(connection)
            if context:
                connection.settimeout(max(0.001, deadline.remaining))
                connection = context.wrap_socket(connection, server_hostname=self._name)
        except OSError as error:
            connection.close()
            raise _failure(error, deadline, sent=False) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def certificate(self, seconds: float) -> dict[str, Any] | None:
        """The server's certificate as ``SSLSocket.getpeercert`` gives it; None without TLS."""
        if self.address.scheme != "https":
            return None
        try:
            with self._connect(Deadline(seconds, str(self))) as connection:
                certificate: dict[str, Any] | None = connection.getpeercert()  # type: ignore[attr-defined]
                return certificate
        except (NodeFailure, ProviderError):
            return None

    def close(self) -> None:
        """Close the idle connections."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop()[1].close()


def _readable(idle: socket.socket) -> bool:
    """Whether an idle connection has something to read, such as its end: then it is not reused."""
    poll = select.poll()
    poll.register(idle, select.POLLIN)
    return bool(poll.poll(0))


def _check_loopback(connection: socket.socket) -> None:
    # The name localhost may resolve to any address; without TLS only loopback is used.
    if not is_loopback(connection.getpeername()[0]):
        raise NodeFailure("refused", "the address is not on loopback", sent=False)


def _failure(error: Exception, deadline: Deadline, *, sent: bool) -> NodeFailure:
    if isinstance(error, TimeoutError):
        return NodeFailure("stalled", f"{deadline.seconds:.3g}", sent=sent)
    if isinstance(error, ssl.SSLCertVerificationError):
        kind = _VERIFY.get(error.verify_code, "certificate")
        return NodeFailure(kind, error.verify_message, sent=False)
    if isinstance(error, ssl.SSLError) and not isinstance(error, _CLOSED):
        return NodeFailure("tls", str(error.reason or error)[:120], sent=sent)
    reset = isinstance(error, _CLOSED) and not isinstance(error, ConnectionRefusedError)
    if isinstance(error, OSError) and not sent and not reset:
        return NodeFailure("refused", error.strerror or error, sent=False)
    return NodeFailure("broken", sent=sent)
