"""The processes of the service: a supervisor, and workers that answer requests.

Verification holds Python's lock, so threads do not make it faster, and processes do. uvicorn's
supervisor starts a worker again that ended, and replaces all of them one by one, the new before the
old, on SIGHUP and when a file changed. A new worker that cannot start leaves the old ones running.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from keymgmt_broker.protocol import MAX_REQUEST
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

import keymgmt
from keymgmt.backend import ConfigError, KeymgmtError, read_file, wipe
from keymgmt_broker_service._app import BODY_SECONDS, make_app
from keymgmt_broker_service._decide import Broker
from keymgmt_broker_service._nonces import NONCE_KEY_LENGTH
from keymgmt_broker_service._settings import (
    ServiceSettings,
    load_service_settings,
    read_nonce_key,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp

__all__ = ["serve"]

log = logging.getLogger("keymgmt.broker")
_HEAD_SECONDS: Final = 10.0
_MAX_HEAD: Final = 32 * 1024
# More than the application allows, so that it has said so before: chunks have lengths beside them.
_BODY_SECONDS: Final = BODY_SECONDS + 5
_MAX_BODY: Final = 4 * MAX_REQUEST
_LOOK_SECONDS: Final = 2.0
_START_SECONDS: Final = 60
_STOP_SECONDS: Final = 40
_BACKLOG: Final = 4096
_OF_CLIENTS: Final = ("Invalid HTTP request", "Unsupported upgrade", "No supported WebSocket")
_MAX_PEM: Final = 1 << 20


def serve(path: Path) -> None:
    """Answer until SIGTERM or SIGINT.

    Raises:
        ConfigError: the config of the service, or what it names, is wrong; nothing was begun.
    """
    settings = load_service_settings(path)
    # For all workers, which start at different times.
    made_here = os.urandom(NONCE_KEY_LENGTH)
    formatter = _formatter()
    Broker.load(settings, _nonce_key(settings, made_here)).close()
    config = uvicorn.Config(
        partial(_worker_app, path, made_here, formatter),
        factory=True,
        http=_Bounded,
        ws="none",
        loop=f"{__name__}:_Loop",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        workers=settings.processes,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_STOP_SECONDS,
        timeout_worker_healthcheck=_START_SECONDS,
        ssl_context_factory=partial(_worker_tls, path) if settings.certificate else None,
    )
    if settings.certificate:
        _tls(path)
    listening = _listen(settings)
    host, port = listening.getsockname()[:2]
    secure = "https" if settings.certificate else "http"
    shown = f"[{host}]" if ":" in host else host
    _log_to_stderr(formatter)
    log.info("listening on %s://%s:%d with %d workers", secure, shown, port, settings.processes)
    supervisor = Multiprocess(config, [listening])
    threading.Thread(target=_watch, args=(path, supervisor), daemon=True).start()
    supervisor.run()


def _nonce_key(settings: ServiceSettings, made_here: bytes) -> bytes:
    return made_here if settings.nonce_key is None else read_nonce_key(settings.nonce_key)


def _listen(settings: ServiceSettings) -> socket.socket:
    host, port = settings.address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"listen = {settings.listen!r}: {error.strerror or error}",
            hint="does another program listen there? choose another port, or stop that program",
        ) from error
    # Accepted connections inherit it. asyncio sets it only where a socket says that it is TCP's,
    # and these do not: an answer would wait 40 ms for the other side's acknowledgement.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _worker_app(path: Path, made_here: bytes, formatter: logging.Formatter) -> ASGIApp:
    """The application of one worker."""
    _log_to_stderr(formatter)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with _ended_by_errors():
        keymgmt.harden()
        settings = load_service_settings(path)
        if settings.unsafe_root:
            log.warning("unsafe_root is set: whoever has its key can make any evidence")
        return make_app(Broker.load(settings, _nonce_key(settings, made_here)))


def _end_with_parent() -> None:
    """A worker that nobody watches would keep the address, and never read a new config."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _worker_tls(path: Path, _config: object, _default: object) -> ssl.SSLContext:
    with _ended_by_errors():
        return _tls(path)


@contextlib.contextmanager
def _ended_by_errors() -> Iterator[None]:
    """End this worker with the reason in the log; the supervisor goes on with the others."""
    try:
        yield
    except KeymgmtError as error:
        log.error("a worker cannot start: %s%s", error, f"; {error.hint}" if error.hint else "")  # noqa: TRY400
        sys.exit(1)


def _tls(path: Path) -> ssl.SSLContext:
    """The TLS of the service, as its files are now."""
    settings = load_service_settings(path)
    certificate, private_key = settings.certificate, settings.private_key
    if certificate is None or private_key is None:
        raise ConfigError(
            f"{path}: certificate was taken out", hint="stop the service and start it again"
        )
    wipe(read_file(private_key, label="private key", limit=_MAX_PEM, access="private"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        # An empty password stops OpenSSL from asking on the terminal.
        context.load_cert_chain(certificate, private_key, password="")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{certificate} and {private_key} are no certificate and its private key in PEM",
            hint="the key has no passphrase, and the certificate is that of this key",
        ) from error
    return context


def _formatter() -> logging.Formatter:
    """How the command line was told to write logs (``--log-json``), else lines with a time."""
    handlers = logging.getLogger().handlers
    told = handlers[0].formatter if handlers else None
    return told or logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def _log_to_stderr(formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], force=True)
    ours = logging.getLogger("keymgmt")
    ours.handlers.clear()  # the command line's, which prints warnings for a person
    ours.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(_is_of_the_service)


def _is_of_the_service(record: logging.LogRecord) -> bool:
    """Not what uvicorn says of a client, without its address and as often as that client likes."""
    return not record.getMessage().startswith(_OF_CLIENTS)


def _watch(path: Path, supervisor: Multiprocess) -> None:
    """Ask for new workers when a file changed, once it is as it was a moment before."""
    loaded = seen = _state(path)
    while not supervisor.should_exit.wait(_LOOK_SECONDS):
        now = _state(path)
        if now == seen and now != loaded:
            log.info("a file of the config changed: reading it again")
            supervisor.signal_queue.append(signal.SIGHUP)
            loaded = now
        seen = now


def _state(path: Path) -> list[object]:
    try:
        named = load_service_settings(path).paths
    except KeymgmtError:
        named = set()  # the change itself asks for the reload, which says what is wrong
    state: list[object] = []
    for file in (path, *sorted(named)):
        for each in (file, *_listed(file)):
            with contextlib.suppress(OSError):
                info = each.stat()
                state.append((str(each), info.st_ino, info.st_size, info.st_mtime_ns))
    return state


def _listed(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it is a file, gone, or not to be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


class _Loop(asyncio.SelectorEventLoop):
    """A loop whose TLS handshakes have the time limit of a request's head."""

    async def create_server(self, *args: Any, **kwargs: Any) -> asyncio.Server:
        if kwargs.get("ssl"):
            kwargs["ssl_handshake_timeout"] = _HEAD_SECONDS
        return await super().create_server(*args, **kwargs)


class _Bounded(HttpToolsProtocol):
    """uvicorn's HTTP, which does not bound the time and size of a request by itself.

    The bounds hold whatever the application does with a request: one that is answered before its
    body was read goes on arriving, and what follows a chunked body is kept as headers.
    """

    _timer: asyncio.TimerHandle | None = None
    _size = 0
    _most = 0

    def _begin(self, seconds: float, most: int) -> None:
        """From now on: so much time, and so many bytes."""
        self._end()
        self._timer = self.loop.call_later(seconds, self.transport.abort)
        self._size, self._most = 0, most

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin(_HEAD_SECONDS, _MAX_HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._begin(_HEAD_SECONDS, _MAX_HEAD)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._begin(_BODY_SECONDS, _MAX_BODY)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._end()
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        if self._timer is None:  # line ends between two requests begin none, and go on for ever
            self._begin(_HEAD_SECONDS, _MAX_HEAD)
        super().data_received(data)
        if self._timer is not None:
            self._size += len(data)
            if self._size > self._most:
                self.transport.abort()
