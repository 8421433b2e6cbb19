"""One HTTP client for web servers and registries.

It is urllib3, which takes no proxy and no login from the environment or a .netrc, as requests and
httpx do, needs no event loop, and is installed already with most clients of key services and AWS.
Rules: a login is sent to the host that the operator named, and never to a host to which that one
redirects; plain HTTP is for this machine alone; every wait has an end; a fault of the connection,
and the refusal of a busy server, is tried again until the deadline.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import random
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast
from urllib.parse import urljoin, urlsplit

from keymgmt._system.address import is_loopback
from keymgmt._system.fork import ForkSafe
from keymgmt._system.pages import unwritten
from keymgmt.errors import ConfigError, KeymgmtError, StorageDenied, StorageUnavailable

if TYPE_CHECKING:
    import urllib3

    from keymgmt._config.remote import Access, Remote

__all__ = [
    "Answer",
    "Body",
    "Http",
    "Reply",
    "Sink",
    "basic",
    "origin_of",
    "redirected",
    "shown",
]

_TRIES: Final = 6
_BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_MOVED: Final = frozenset({301, 302, 303, 307, 308})
_REDIRECTS: Final = 5
_CHUNK: Final = 1 << 18
_PART: Final = 8 << 20
_CODE: Final = re.compile(rb'(?:"code"\s*:\s*"|<Code>)([A-Za-z_]{2,40})["<]')  # registries, S3
_MAX_WAIT: Final = 10.0
_REFUSED_BODY: Final = 1 << 16
_LIES: Final = "the server, or a proxy on the way, is broken or hostile"
T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """The reply of a server.

    Attributes:
        status: the HTTP status.
        headers: the headers, with names in lower case.
        body: the body, up to the limit of the request.
        whole: whether ``body`` is the whole body.
        url: the address that replied, after all redirects.
    """

    status: int
    headers: Mapping[str, str]
    body: memoryview
    whole: bool
    url: str


class Sink(Protocol):
    """Receives a large body, part by part.

    Attributes:
        size: length of the whole body, in bytes.
        done: bytes that were received.
    """

    size: int
    done: int

    def write(self, part: bytes) -> None:
        """Add the next part."""

    def restart(self) -> None:
        """Forget all parts: the body is sent again from its beginning."""


class Body(Protocol):
    """The body of a request: ``read`` gives its next bytes, and none at its end."""

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes."""


class _Thread(threading.local):
    """What this thread is at.

    Attributes:
        end: when what it waits for must be there (``time.monotonic``).
        sends: whether it makes a request of ours.
    """

    end = float("inf")
    sends = False


_thread: Final = _Thread()


class _Unsigned(logging.Filter):
    """Keeps what an address is signed with out of the log of urllib3, which has it at DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        if _thread.sends and isinstance(record.args, tuple):
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
        if time.monotonic() > _thread.end:
            raise TimeoutError
        return super().recv_into(*arguments, **named)


class _Sent:
    """A body that is being sent: the time limit of the reply begins anew with each part."""

    def __init__(self, body: Body, deadline: float) -> None:
        self._body, self._deadline = body, deadline

    def read(self, size: int = -1, /) -> bytes:
        part = self._body.read(size)
        _thread.end = time.monotonic() + self._deadline
        return part


class _Again(Exception):
    """A fault that may pass: the request is made again after ``after`` seconds."""

    def __init__(self, error: KeymgmtError, after: float = 0.0) -> None:
        super().__init__()
        self.error, self.after = error, after


class Answer:
    """A reply whose body was not read yet."""

    def __init__(self, raw: urllib3.BaseHTTPResponse, url: str, deadline: float) -> None:
        self._raw, self._deadline = raw, deadline
        self.status, self.url = raw.status, url
        self.headers = {name.lower(): value for name, value in raw.headers.items()}

    def parts(self, limit: int, end: float) -> Iterator[bytes]:
        """Parts of the body as they arrive, until its end or one byte more than ``limit``.

        The time limit ``end`` begins anew with every 8 MiB.
        """
        received, mark = 0, _PART
        while received <= limit:
            _thread.end = end
            with _translated(self.url):
                part = self._raw.read1(min(_CHUNK, limit - received + 1), decode_content=False)
            if not part:
                return
            received += len(part)
            if received >= mark:
                mark, end = received + _PART, time.monotonic() + self._deadline
            elif time.monotonic() > end:
                raise _too_slow(self.url, self._deadline)
            yield part

    def close(self) -> None:
        """Return the connection to its pool if the body was read to its end, else close it."""
        self._raw.close()


class Http(ForkSafe):
    """Requests to one host and to the hosts to which it redirects, from any thread."""

    def __init__(
        self,
        url: str,
        settings: Remote,
        access: Access,
        login: Callable[[str], str] | None = None,
    ) -> None:
        """Make a client; it does not connect yet.

        Args:
            url: an address of the only host to which the login is sent.
            settings: time limits.
            access: certificates and proxy.
            login: makes the ``Authorization`` header from the host's ``WWW-Authenticate``.

        Raises:
            ConfigError: urllib3 is not installed, or the certificates cannot be read.
        """
        self.authorization = ""
        self._origin, self._login = origin_of(url), login
        self._settings, self._access = settings, access
        self._pools: dict[str, urllib3.PoolManager] = {}
        _urllib3()
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
        self._pools.clear()  # a child must not write to its parent's connections
        self._closed = threading.Event()

    def close(self) -> None:
        """End all tries, in every thread, and close the idle connections."""
        self._closed.set()
        for pool in list(self._pools.values()):
            pool.clear()

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        good: Collection[int] = (200,),
        limit: int,
    ) -> Reply:
        """Make a request, and repeat it while the fault may pass.

        Args:
            method: the HTTP method.
            url: the address.
            headers: headers in addition to the login.
            body: the body of the request.
            good: the statuses that are returned; all others are raised.
            limit: the most bytes of the reply's body that are read.

        Raises:
            StorageDenied: 401 or 403.
            StorageUnavailable: any other status that is not in ``good``, or no reply in time.
        """

        def work(end: float) -> Reply:
            with self.exchange(method, url, end, headers=headers, body=body, good=good) as answer:
                content, whole = _content(answer, limit, end)
                return Reply(answer.status, answer.headers, content, whole, answer.url)

        return self.retry(work)

    def fetch(self, url: str, sink: Sink) -> None:
        """Download the rest of a body into ``sink``, with new tries as long as each brings more.

        Of a server that ignores ranges, the whole body is read again.

        Raises:
            StorageDenied, StorageUnavailable: as ``request``.
        """

        def work(end: float) -> None:
            start = sink.done
            headers = {"Range": f"bytes={start}-{sink.size - 1}"} if start else {}
            with self.exchange("GET", url, end, headers=headers, good=(200, 206)) as answer:
                if answer.status == 200 and start:
                    sink.restart()
                ranged = answer.headers.get("content-range", "")
                if answer.status == 206 and not ranged.startswith(f"bytes {start}-"):
                    raise StorageUnavailable(
                        f"{shown(url)} gives another range than was asked for", hint=_LIES
                    )
                for part in answer.parts(sink.size - sink.done, end):
                    if sink.done + len(part) > sink.size:
                        raise StorageUnavailable(
                            f"{shown(url)} is longer than {sink.size} bytes", hint=_LIES
                        )
                    sink.write(part)
            if sink.done < sink.size:
                raise _Again(_cut_short(url))

        if sink.done < sink.size:
            self.retry(work, lambda: sink.done)

    def retry(self, work: Callable[[float], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Do ``work``, and repeat it while its fault may pass.

        Args:
            work: called with the time at which it must have ended (``time.monotonic``).
            progress: the bytes done; growth resets the tries, and every 8 MiB the time limit.
        """
        mark = best = progress()
        tries, end = 0, time.monotonic() + self._settings.deadline
        while True:
            try:
                return work(end)
            except _Again as again:
                if progress() > best:
                    best, tries = progress(), 0
                if best >= mark + _PART:
                    mark, end = best, time.monotonic() + self._settings.deadline
                tries += 1
                pause = max(again.after, min(_MAX_WAIT, 0.1 * 2**tries) * random.uniform(0.5, 1))  # noqa: S311
                if tries == _TRIES or time.monotonic() + pause >= end or self._wait(pause):
                    raise again.error from again.__cause__

    def _wait(self, seconds: float) -> bool:
        """Wait; returns true, without delay, once this client is closed."""
        return self._closed.wait(seconds)

    @contextlib.contextmanager
    def exchange(
        self,
        method: str,
        url: str,
        end: float,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | Callable[[], Body] | None = None,
        good: Collection[int],
    ) -> Iterator[Answer]:
        """One request with its redirects, inside ``retry``; the caller reads the body inside."""
        has_logged_in = False
        for _ in range(_REDIRECTS + 2):
            home = origin_of(url) == self._origin
            all_headers = dict(headers or {})
            if self.authorization and home:
                all_headers["Authorization"] = self.authorization
            answer = self._send(method, url, all_headers, body() if callable(body) else body, end)
            try:
                if answer.status in good:
                    yield answer
                    return
                challenge = answer.headers.get("www-authenticate")
                refusal_body = b""
                with contextlib.suppress(_Again):
                    # The body is read for its error code, and so that the connection can be reused.
                    refusal_body = next(answer.parts(_REFUSED_BODY, end), b"")
            finally:
                answer.close()
            if answer.status == 401 and challenge and home and self._login and not has_logged_in:
                has_logged_in, self.authorization = True, self._login(challenge)
            elif answer.status in _MOVED and method in ("GET", "HEAD"):
                url = redirected(url, answer.headers.get("location", ""))
            elif answer.status in _BUSY:
                raise _Again(_refusal(answer, method, refusal_body), _retry_after(answer.headers))
            else:
                raise _refusal(answer, method, refusal_body)
        raise StorageUnavailable(
            f"{shown(url)} redirects again and again", hint="look who answers at that address"
        )

    def _send(
        self, method: str, url: str, headers: dict[str, str], body: bytes | Body | None, end: float
    ) -> Answer:
        left = max(0.001, end - time.monotonic())
        timeout = min(self._settings.timeout, left)
        # The server replies when it has stored the body, and that may take long.
        wait = left if body is not None else timeout
        _thread.end = end
        if body is not None and not isinstance(body, bytes):
            body = _Sent(body, self._settings.deadline)
        with _translated(url), _sending():
            raw = self._pool(url).request(
                method,
                url,
                headers={"Accept-Encoding": "identity", "User-Agent": "keymgmt"} | headers,
                body=cast("bytes | IO[bytes] | None", body),
                redirect=False,
                retries=False,
                preload_content=False,
                timeout=_urllib3().Timeout(connect=timeout, read=wait),
            )
        return Answer(raw, url, self._settings.deadline)

    def _pool(self, url: str) -> urllib3.PoolManager:
        proxy = self._proxy(url)
        pool = self._pools.get(proxy)
        if pool is None:
            kinds: dict[str, Any] = {
                "ssl_context": self._tls,
                "maxsize": 16,
                "num_pools": 16,
                "blocksize": _CHUNK,
            }
            library = _urllib3()
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


def basic(user: str, secret: str) -> str:
    """The ``Authorization`` of a user with a secret (RFC 7617)."""
    return f"Basic {base64.b64encode(f'{user}:{secret}'.encode()).decode()}"


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port, which decide whether a login may be sent; ValueError if invalid.

    urllib3, which connects, parses the address: urllib sees another host where a backslash is.
    """
    parts = _urllib3().util.parse_url(url)
    if "\\" in url:
        raise ValueError
    return (
        parts.scheme or "",
        parts.host or "",
        parts.port or (443 if parts.scheme == "https" else 80),
    )


def shown(url: str) -> str:
    """An address for messages, without the query, in which a redirect may have a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextlib.contextmanager
def _sending() -> Iterator[None]:
    _thread.sends = True
    try:
        yield
    finally:
        _thread.sends = False


def _urllib3() -> Any:
    try:
        import urllib3
    except ImportError as error:
        raise ConfigError(
            "models elsewhere are read with a package that is not installed: urllib3",
            hint='pip install "keymgmt[remote]"',
        ) from error
    return urllib3


def _content(answer: Answer, limit: int, end: float) -> tuple[memoryview, bool]:
    """At most ``limit`` bytes of the body, and whether that is the whole body."""
    announced = answer.headers.get("content-length", "")
    size = min(limit, int(announced)) if announced.isdecimal() and len(announced) < 20 else limit
    content, done = memoryview(unwritten(size)), 0
    for part in answer.parts(size, end):
        if done + len(part) > size:
            content[done:] = part[: size - done]
            return content, False
        content[done : done + len(part)] = part
        done += len(part)
    return content[:done], True


def redirected(url: str, location: str) -> str:
    """The address to which ``url`` redirects; an error where that is not followed."""
    try:
        target = urljoin(url, location)
        scheme, host, _ = origin_of(target)
    except ValueError as error:
        raise StorageUnavailable(
            f"{shown(url)} redirects to what is no address", hint="look who answers at that address"
        ) from error
    if scheme == "https" or (scheme == "http" and is_loopback(host) and url.startswith("http://")):
        return target
    raise StorageDenied(
        f"{shown(url)} redirects to {shown(target)}, which is not read",
        hint="only https:// is followed: look who answers at that address",
    )


def _refusal(answer: Answer, method: str, body: bytes) -> KeymgmtError:
    """The error for a status; of the server's body it quotes an error code and nothing else."""
    code = _CODE.search(body)
    doing = "read" if method in ("GET", "HEAD") else "write to"
    message = f"cannot {doing} {shown(answer.url)}: the server says {answer.status}"
    message += f" ({code[1].decode()})" if code else ""
    if answer.status in (401, 403):
        return StorageDenied(
            message, hint='the config has the logins: [remote.access."SCHEME://HOST"]'
        )
    hint = "look at the location, and at the log of the server"
    if answer.status in _BUSY:
        hint = "it is busy or broken: try again later"
    return StorageUnavailable(message, hint=hint)


def _too_slow(url: str, deadline: float) -> StorageUnavailable:
    return StorageUnavailable(
        f"{shown(url)} did not give its answer within {deadline:g} seconds",
        hint="wait longer with deadline in [remote], or find out why it is slow",
    )


def _cut_short(url: str) -> StorageUnavailable:
    return StorageUnavailable(
        f"{shown(url)} cut its answer short", hint="the server, or a proxy on the way, ends answers"
    )


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Translate faults of a connection; an invalid certificate is not tried again."""
    from urllib3 import exceptions

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
        elif isinstance(error, exceptions.TimeoutError):
            message = "did not answer in time"
        elif isinstance(error.__cause__ or error, exceptions.IncompleteRead):
            raise _Again(_cut_short(url)) from error
        elif isinstance(error, exceptions.SSLError):
            message, hint = "does not speak TLS as it should", "is it plain HTTP, or another port?"
        else:
            message = f"broke the connection ({type(error).__name__})"
        raise _Again(StorageUnavailable(f"{where} {message}", hint=hint)) from error


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


def _retry_after(headers: Mapping[str, str]) -> float:
    text = headers.get("retry-after", "")
    return float(text) if text.isdecimal() and len(text) < 10 else 0.0
