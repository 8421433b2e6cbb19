"""Connections to servers, which all models of a command share; and the faults of connections."""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from keymgmt._remote.url import need_urllib3, shown
from keymgmt._system.fork import ForkSafe
from keymgmt.errors import ConfigError, KeymgmtError, StorageUnavailable

if TYPE_CHECKING:
    import urllib3

    from keymgmt._config.remote import Access, Remote
    from keymgmt._remote.patience import Patience

__all__ = ["CHUNK", "Again", "Connections", "cut_short", "sending"]

CHUNK: Final = 1 << 18
_CONNECTIONS: Final = 32  # to one host that are kept open


class Again(Exception):
    """A fault that may pass: the request is made again after ``after`` seconds."""

    def __init__(self, error: KeymgmtError, after: float = 0.0) -> None:
        super().__init__()
        self.error, self.after = error, after


class _Thread(threading.local):
    """Whose request this thread is at; None outside of one."""

    patience: Patience | None = None


_thread: Final = _Thread()


class _Unsigned(logging.Filter):
    """Keeps what an address is signed with out of the log of urllib3, which has it at DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        if _thread.patience is not None and isinstance(record.args, tuple):
            record.args = tuple(
                arg.partition("?")[0] if isinstance(arg, str) else arg for arg in record.args
            )
        return True


_unsigned: Final = _Unsigned()


class _Socket(ssl.SSLSocket):
    """A connection whose time limit also holds for a server that sends a byte now and then.

    The timeouts of urllib3 are for one byte, and a header line has many bytes.
    """

    def recv_into(self, *arguments: Any, **named: Any) -> int:
        if _thread.patience is not None and _thread.patience.left_to_try < 0:
            raise TimeoutError
        return super().recv_into(*arguments, **named)


class Connections(ForkSafe):
    """The connections that are made with the same certificates and the same proxy."""

    def __init__(self, access: Access) -> None:
        """Connect to nobody yet; ConfigError where the certificates cannot be read."""
        self._access = access
        try:
            self._tls = ssl.create_default_context(cafile=access.ca_file)
        except OSError as error:
            raise ConfigError(
                f"cannot read the certificates in {access.ca_file}: {error.strerror or error}",
                hint="ca_file of [remote] is a file of certificates in PEM",
            ) from error
        self._tls.sslsocket_class = _Socket
        logging.getLogger("urllib3.connectionpool").addFilter(_unsigned)  # counts once
        super().__init__()

    def _renew(self) -> None:
        # A child must not write to its parent's connections.
        self._pools: dict[str, urllib3.PoolManager] = {}

    @classmethod
    def shared(cls, settings: Remote, access: Access) -> Connections:
        """Those that all models of a command share."""
        file = access.ca_file
        state = None
        with contextlib.suppress(OSError):
            state = file and (file.stat().st_mtime_ns, file.stat().st_size)
        name = ("connections", file, access.proxy, access.auth == "environment")
        return settings.kept.get(name, state, lambda: cls(access))

    def to(self, url: str) -> urllib3.PoolManager:
        """The connections to the host of an address, or to its proxy."""
        proxy = self._proxy(url)
        pool = self._pools.get(proxy)
        if pool is None:
            kinds: dict[str, Any] = {
                "ssl_context": self._tls,
                "maxsize": _CONNECTIONS,
                "num_pools": 16,
                "blocksize": CHUNK,
            }
            library = need_urllib3()
            pool = library.ProxyManager(proxy, **kinds) if proxy else library.PoolManager(**kinds)
            self._pools[proxy] = pool
        return pool

    def _proxy(self, url: str) -> str:
        if url.startswith("http://"):
            return ""  # a proxy would read plain HTTP, and has another loopback
        if self._access.auth != "environment":
            return self._access.proxy or ""
        parts = urlsplit(url)
        if urllib.request.proxy_bypass(parts.hostname or ""):
            return ""
        return self._access.proxy or urllib.request.getproxies().get(parts.scheme, "")


def cut_short(url: str) -> StorageUnavailable:
    return StorageUnavailable(
        f"{shown(url)} cut its answer short", hint="the server, or a proxy on the way, ends answers"
    )


@contextlib.contextmanager
def sending(url: str, patience: Patience) -> Iterator[None]:
    """Translate faults of a connection; an invalid certificate is not tried again."""
    from urllib3 import exceptions

    _thread.patience = patience
    try:
        yield
    except (exceptions.HTTPError, OSError) as error:
        where = shown(url)
        if (wrong := _certificate_error(error)) is not None:
            raise StorageUnavailable(
                f"the certificate of {where} is refused: {wrong.verify_message}",
                hint="name the authority that made it: ca_file in [remote]",
            ) from error
        hint = "look whether it runs and is reached from here"
        if isinstance(error, exceptions.LocationParseError | exceptions.LocationValueError):
            raise StorageUnavailable(
                f"{where} is no address", hint="look at the location, and at [remote] in the config"
            ) from error
        if isinstance(error, exceptions.NewConnectionError | ConnectionRefusedError):
            message = "is not reached"
        elif isinstance(error, exceptions.TimeoutError | TimeoutError):
            if patience.left_to_try < 0:
                raise Again(patience.over()) from error
            message = "did not answer in time"
        elif isinstance(error.__cause__ or error, exceptions.IncompleteRead):
            raise Again(cut_short(url)) from error
        elif isinstance(error, exceptions.SSLError):
            message, hint = "does not speak TLS as it should", "is it plain HTTP, or another port?"
        else:
            message = f"broke the connection ({type(error).__name__})"
        raise Again(StorageUnavailable(f"{where} {message}", hint=hint)) from error
    finally:
        _thread.patience = None


def _certificate_error(error: BaseException) -> ssl.SSLCertVerificationError | None:
    inner: object = error
    while isinstance(inner, BaseException):
        if isinstance(inner, ssl.SSLCertVerificationError):
            return inner
        reason = getattr(inner, "reason", None)
        inner = (
            reason if isinstance(reason, BaseException) else inner.__cause__ or inner.__context__
        )
    return None
