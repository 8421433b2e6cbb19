"""One call to one node: pooled connections that the environment and the server cannot steer.

Rules: no proxy, no netrc, no CA bundle and no key log from the environment (urllib3's pools read
none of it, and the TLS context is made here); no redirect is followed; an answer has at most
``MAX_ANSWER`` bytes and is never decompressed; a call ends by its deadline even if the server sends
a byte now and then.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import certifi
import urllib3
from urllib3 import exceptions as broken
from urllib3.connection import HTTPConnection, HTTPSConnection

from keymgmt.backend import ConfigError, ProviderUnavailable, private_file_problem, wipe, within

if TYPE_CHECKING:
    from keymgmt_vault._settings import Address, VaultSettings

__all__ = ["MAX_ANSWER", "Node", "NodeFailure", "Reply", "tls_context"]

MAX_ANSWER: Final = 4 << 20
_POOL: Final = 32
_LENGTH: Final = {"content-length", "transfer-encoding"}
_deadline = threading.local()


class _Deadline:
    """A socket whose every read ends by the deadline of the call, not so long after the last byte.

    A connection serves one thread at a time, so the thread knows the deadline.
    """

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        left = getattr(_deadline, "at", float("inf")) - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        if left != float("inf"):
            self.settimeout(left)  # type: ignore[attr-defined]
        return super().recv_into(*args, **kwargs)  # type: ignore[misc,no-any-return]


class _Socket(_Deadline, socket.socket):
    pass


class _TlsSocket(_Deadline, ssl.SSLSocket):
    pass


def _connect(connection: HTTPConnection) -> socket.socket:
    host, port = connection._dns_host, connection.port
    left = max(0.001, _deadline.at - time.monotonic())
    try:
        found = within(
            left,
            f"the name look-up of {host}",
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
        )
    except socket.gaierror as error:
        raise broken.NameResolutionError(host, connection, error) from error
    except ProviderUnavailable as error:
        raise broken.ConnectTimeoutError(connection, str(error)) from error
    failure: OSError = OSError("the name has no address")
    for tried, (family, kind, protocol, _, place) in enumerate(found):
        # An address that never answers leaves time for the others.
        left = (_deadline.at - time.monotonic()) / (len(found) - tried)
        if left <= 0:
            failure = TimeoutError("timed out")
            break
        opened = _Socket(family, kind, protocol)
        try:
            opened.settimeout(left)
            opened.connect(place)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            opened.close()
            failure = error
        else:
            return opened
    if isinstance(failure, TimeoutError):
        raise broken.ConnectTimeoutError(connection, "no connection in time") from failure
    raise broken.NewConnectionError(connection, failure.strerror or str(failure)) from failure


class _PlainConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        opened = _connect(self)
        # The name localhost may resolve to anything; nothing is sent in clear to another machine.
        if not ipaddress.ip_address(opened.getpeername()[0]).is_loopback:
            opened.close()
            raise broken.NewConnectionError(self, "the address is not on loopback")
        return opened


class _TlsConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _connect(self)


class _UnixConnection(HTTPConnection):
    path = ""

    def _new_conn(self) -> socket.socket:
        opened = _Socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            opened.settimeout(max(0.001, _deadline.at - time.monotonic()))
            opened.connect(self.path)
        except TimeoutError as error:
            opened.close()
            raise broken.ConnectTimeoutError(self, "no connection in time") from error
        except OSError as error:
            opened.close()
            raise broken.NewConnectionError(self, error.strerror or str(error)) from error
        return opened


Kind = Literal[
    "name",
    "refused",
    "stalled",
    "tls",
    "broken",
    "oversized",
    "status",
    "sealed",
    "redirect",
    "limited",
]


@dataclass(frozen=True)
class Reply:
    """What a node answered; ``data`` may hold a secret, and who reads it wipes it."""

    status: int
    headers: Mapping[str, str]
    data: bytearray = field(repr=False)


class NodeFailure(Exception):
    """No answer that can be used from one node.

    Attributes:
        kind: what is wrong; ``name`` and ``tls`` do not go away by waiting.
        sent: whether the node may have carried out what it was asked.
        cut: whether the operation's end made the call shorter than a call may be.
    """

    cut = False

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        sent: bool = True,
    ) -> None:
        super().__init__(message)
        self.kind: Final = kind
        self.sent: Final = sent


def tls_context(settings: VaultSettings) -> ssl.SSLContext:
    """The TLS of a provider: its own authorities and certificate, TLS 1.2 or newer.

    Raises:
        ConfigError: a file is missing, not private, or not what it should be.
    """
    # Not ssl.create_default_context: that follows SSL_CERT_FILE and SSLKEYLOGFILE.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = _TlsSocket
    authorities = settings.ca_file or certifi.where()
    try:
        context.load_verify_locations(cafile=authorities)
    except ssl.SSLError as error:
        raise ConfigError(f"{authorities} holds no certificate in PEM") from error
    except OSError as error:
        raise ConfigError(f"cannot read ca_file {authorities}: {error.strerror}") from error
    if settings.client_cert and settings.client_key:
        _load_client(context, settings)
    return context


def _load_client(context: ssl.SSLContext, settings: VaultSettings) -> None:
    certificate, key = settings.client_cert, settings.client_key
    assert certificate is not None and key is not None  # noqa: S101, PT018 - for the type checker
    try:
        problem = private_file_problem(key.stat())
        certificate.stat()
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
    if problem:
        raise ConfigError(f"the client key {key} is refused: {problem}", hint=f"chmod 600 {key}")
    source = settings.client_key_password
    password = source.read() if source else bytearray()
    try:
        # An empty password stops OpenSSL from asking on the terminal.
        context.load_cert_chain(certificate, key, password=password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"{certificate} and {key} are no certificate and its private key in PEM",
            hint="if the key has a password, name it as client_key_password",
        ) from error
    finally:
        wipe(password)


class Node:
    """One configured address and the connections to it; safe to share between threads."""

    def __init__(self, address: Address, context: ssl.SSLContext | None, name: str | None) -> None:
        """``context`` is for https; ``name`` is whom its certificate must be for, if given."""
        self.address: Final = address
        self._pool = _pool(address, context, name)

    def call(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], seconds: float
    ) -> Reply:
        """Send one request and read its whole answer, whatever its status.

        Raises:
            NodeFailure: no whole answer of allowed size within ``seconds``.
        """
        _deadline.at = time.monotonic() + seconds
        try:
            return self._call(method, path, body, headers, seconds)
        except broken.NameResolutionError as error:
            raise NodeFailure("name", "its name is not known", sent=False) from error
        except broken.NewConnectionError as error:
            cause = error.__cause__
            reason = (cause.strerror if isinstance(cause, OSError) else None) or "refused"
            raise NodeFailure("refused", f"no connection: {reason}", sent=False) from error
        except broken.ConnectTimeoutError as error:
            raise NodeFailure("stalled", f"no connection in {seconds:.3g} s", sent=False) from error
        except broken.SSLError as error:
            raise NodeFailure("tls", _tls_reason(error), sent=False) from error
        except (broken.TimeoutError, TimeoutError) as error:
            raise NodeFailure("stalled", f"no answer in {seconds:.3g} s") from error
        except (broken.HTTPError, OSError, ValueError) as error:
            raise NodeFailure("broken", "the connection broke") from error

    def _call(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], seconds: float
    ) -> Reply:
        response = self._pool.urlopen(
            method,
            path,
            body=body,
            headers=headers,
            retries=False,
            redirect=False,
            timeout=seconds,
            preload_content=False,
            decode_content=False,
        )
        clean = False
        try:
            data = bytearray()
            while chunk := response.read(MAX_ANSWER + 1 - len(data)):
                data += chunk
                if len(data) > MAX_ANSWER:
                    raise NodeFailure("oversized", f"an answer of more than {MAX_ANSWER} bytes")
            if response.status != 204 and not _LENGTH & {name.lower() for name in response.headers}:
                # Without a length, an answer that was cut off looks like a whole one.
                raise NodeFailure("broken", "the connection broke")
            clean = True
            return Reply(response.status, response.headers, data)
        finally:
            if clean:
                response.release_conn()
            else:
                # What is left of this answer must never be taken for the next one.
                response.close()

    def certificate(self, seconds: float) -> dict[str, Any] | None:
        """The server's certificate as ``SSLSocket.getpeercert`` gives it; None without TLS."""
        if not isinstance(self._pool, urllib3.HTTPSConnectionPool):
            return None
        _deadline.at = time.monotonic() + seconds
        connection: Any = self._pool._new_conn()
        try:
            connection.timeout = seconds
            connection.connect()
            certificate: dict[str, Any] | None = connection.sock.getpeercert()
        except (broken.HTTPError, OSError):
            certificate = None
        finally:
            with contextlib.suppress(OSError):
                connection.close()
        return certificate

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close()


def _pool(
    address: Address, context: ssl.SSLContext | None, name: str | None
) -> urllib3.HTTPConnectionPool:
    pool: urllib3.HTTPConnectionPool
    if address.scheme == "https":
        pool = urllib3.HTTPSConnectionPool(
            address.host, address.port, maxsize=_POOL, ssl_context=context, server_hostname=name
        )
        pool.ConnectionCls = _TlsConnection
        return pool
    if address.scheme == "http":
        pool = urllib3.HTTPConnectionPool(address.host, address.port, maxsize=_POOL)
        pool.ConnectionCls = _PlainConnection
        return pool
    pool = urllib3.HTTPConnectionPool("localhost", maxsize=_POOL)
    pool.ConnectionCls = type("_Unix", (_UnixConnection,), {"path": address.host})
    return pool


def _tls_reason(error: BaseException) -> str:
    inner = error.args[0] if error.args and isinstance(error.args[0], ssl.SSLError) else error
    if isinstance(inner, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {inner.verify_message}"
    reason = getattr(inner, "reason", None)
    return f"no TLS: {str(reason or inner)[:120]}"
