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
import random
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Final, TypeVar, cast

from keymgmt._remote.connections import CHUNK, Again, Connections, cut_short, sending
from keymgmt._remote.patience import Patience
from keymgmt._remote.url import need_urllib3, origin_of, redirected, shown
from keymgmt._system.pages import unwritten
from keymgmt.errors import KeymgmtError, StorageDenied, StorageUnavailable

if TYPE_CHECKING:
    import urllib3
    from _typeshed import SupportsRead

    from keymgmt._config.remote import Access, Remote
    from keymgmt._remote.download import Download

__all__ = ["Http", "Reply", "basic"]

_TRIES: Final = 6
_BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_MOVED: Final = frozenset({301, 302, 303, 307, 308})
_REDIRECTS: Final = 5
_CODE: Final = re.compile(rb'(?:"code"\s*:\s*"|<Code>)([A-Za-z_]{2,40})["<]')  # registries, S3
_MAX_WAIT: Final = 10.0
_REFUSED_BODY: Final = 1 << 16
_LIES: Final = "the server, or a proxy on the way, is broken or hostile"
T = TypeVar("T")


class _Sent:
    """A body that is being sent, in the time of a try."""

    def __init__(self, body: SupportsRead[bytes], patience: Patience) -> None:
        self._body, self._patience = body, patience

    def read(self, size: int = -1, /) -> bytes:
        part = self._body.read(size)
        self._patience.moved(len(part))
        return part


class Reply:
    """The reply of a server.

    Attributes:
        status: the HTTP status.
        headers: the headers, with names in lower case.
        url: the address that replied, after all redirects.
        body: the body, up to the limit of the request.
        whole: whether ``body`` is the whole body.
    """

    def __init__(self, raw: urllib3.BaseHTTPResponse, url: str, patience: Patience) -> None:
        """Of the body nothing is read yet."""
        self._raw, self._patience = raw, patience
        self.status, self.url = raw.status, url
        self.headers = {name.lower(): value for name, value in raw.headers.items()}
        self.body, self.whole = memoryview(b""), False

    def parts(self, limit: int) -> Iterator[bytes]:
        """Parts of the body as they arrive, until its end or one byte more than ``limit``."""
        received = 0
        while received <= limit:
            with sending(self.url, self._patience):
                part = self._raw.read1(min(CHUNK, limit - received + 1), decode_content=False)
                self._patience.moved(len(part))
            if not part:
                return
            received += len(part)
            yield part

    def read(self, limit: int) -> None:
        """Read ``body``."""
        announced = self.headers.get("content-length", "")
        if announced.isdecimal() and len(announced) < 20:
            limit = min(limit, int(announced))
        content, done = memoryview(unwritten(limit)), 0
        for part in self.parts(limit):
            room = min(len(part), limit - done)
            content[done : done + room] = part[:room]
            if room < len(part):
                self.body = content
                return
            done += room
        self.body, self.whole = content[:done], True


class Http:
    """The requests of one model to one host, and to the hosts to which it redirects.

    Any thread may make them.
    """

    def __init__(
        self,
        url: str,
        settings: Remote,
        access: Access,
        patience: Patience,
        login: Callable[[str], str] | None = None,
    ) -> None:
        """Make a client; it does not connect yet.

        Args:
            url: an address of the only host to which the login is sent.
            settings: time limits.
            access: certificates and proxy.
            patience: the time of the model.
            login: makes the ``Authorization`` header from the host's ``WWW-Authenticate``.

        Raises:
            ConfigError: urllib3 is not installed, or the certificates cannot be read.
        """
        self.authorization = ""
        self._origin, self._login = origin_of(url), login
        self._timeout, self._patience = settings.timeout, patience
        self._connections = Connections.shared(settings, access)

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
        return self.retry(
            lambda: self.once(
                method,
                url,
                headers=headers,
                body=body,
                good=good,
                read=lambda reply: reply.read(limit),
            )
        )

    def fetch(self, url: str, download: Download) -> bool:
        """Download the rest of a body, with new tries as long as each brings more; false for 404.

        Of a server that ignores ranges, the whole body is read again.

        Raises:
            StorageDenied, StorageUnavailable: as ``request``.
        """

        def read(reply: Reply) -> None:
            start = download.done
            if reply.status == 404:
                return
            if reply.status == 200 and start:
                download.restart()
            ranged = reply.headers.get("content-range", "")
            if reply.status == 206 and not ranged.startswith(f"bytes {start}-"):
                raise StorageUnavailable(
                    f"{shown(url)} gives another range than was asked for", hint=_LIES
                )
            for part in reply.parts(download.size - download.done):
                if download.done + len(part) > download.size:
                    raise StorageUnavailable(
                        f"{shown(url)} is longer than {download.size} bytes", hint=_LIES
                    )
                download.write(part)
            if download.done < download.size:
                raise Again(cut_short(url))

        def work() -> bool:
            headers = (
                {"Range": f"bytes={download.done}-{download.size - 1}"} if download.done else {}
            )
            reply = self.once("GET", url, headers=headers, good=(200, 206, 404), read=read)
            return reply.status != 404

        return download.done == download.size or self.retry(work, lambda: download.done)

    def retry(self, work: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Do ``work``, and repeat it while its fault may pass.

        Args:
            work: makes requests by ``once``.
            progress: the bytes done; where they have grown, the tries are counted anew.
        """
        best, tries = progress(), 0
        with self._patience.waiting():
            while True:
                try:
                    self._patience.begin_try(_TRIES - tries)
                    return work()
                except Again as again:
                    if progress() > best:
                        best, tries = progress(), 0
                    tries += 1
                    backoff = min(_MAX_WAIT, 0.1 * 2**tries) * random.uniform(0.5, 1)  # noqa: S311
                    pause = max(again.after, backoff)
                    if tries == _TRIES or pause >= self._patience.remaining:
                        raise again.error from again.__cause__
                    self._wait(pause)

    def _wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def once(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | Callable[[], SupportsRead[bytes]] | None = None,
        good: Collection[int],
        read: Callable[[Reply], object] = lambda reply: reply.read(0),
    ) -> Reply:
        """One request with its redirects, inside ``retry``; ``read`` reads the reply's body."""
        has_logged_in = False
        for _ in range(_REDIRECTS + 2):
            home = origin_of(url) == self._origin
            all_headers = dict(headers or {})
            if self.authorization and home:
                all_headers["Authorization"] = self.authorization
            opened = body() if callable(body) else body
            with self._send(method, url, all_headers, opened) as reply:
                if reply.status in good:
                    read(reply)
                    return reply
                refusal_body = b""
                with contextlib.suppress(Again):
                    # The body is read for its error code, and so that the connection can be reused.
                    refusal_body = next(reply.parts(_REFUSED_BODY), b"")
            challenge = reply.headers.get("www-authenticate")
            if reply.status == 401 and challenge and home and self._login and not has_logged_in:
                has_logged_in, self.authorization = True, self._login(challenge)
            elif reply.status in _MOVED and method in ("GET", "HEAD"):
                url = redirected(url, reply.headers.get("location", ""))
            elif reply.status in _BUSY:
                raise Again(_refusal(reply, method, refusal_body), _retry_after(reply.headers))
            else:
                raise _refusal(reply, method, refusal_body)
        raise StorageUnavailable(
            f"{shown(url)} redirects again and again", hint="look who answers at that address"
        )

    @contextlib.contextmanager
    def _send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | SupportsRead[bytes] | None,
    ) -> Iterator[Reply]:
        """The reply to a request; the body is read inside."""
        if body is not None:
            # The server replies when it has stored the body, and that may take long.
            self._patience.begin_try(1)
        left = max(0.001, self._patience.left_to_try)
        timeout = min(self._timeout, left)
        if body is not None and not isinstance(body, bytes):
            body = _Sent(body, self._patience)
        with sending(url, self._patience):
            raw = self._connections.to(url).request(
                method,
                url,
                headers={"Accept-Encoding": "identity", "User-Agent": "keymgmt"} | headers,
                body=cast("bytes | IO[bytes] | None", body),
                redirect=False,
                retries=False,
                preload_content=False,
                timeout=need_urllib3().Timeout(
                    connect=timeout, read=timeout if body is None else left
                ),
            )
        try:
            yield Reply(raw, url, self._patience)
        finally:
            raw.close()  # the connection returns to its pool only if the body was read to its end


def basic(user: str, secret: str) -> str:
    """The ``Authorization`` of a user with a secret (RFC 7617)."""
    return f"Basic {base64.b64encode(f'{user}:{secret}'.encode()).decode()}"


def _refusal(reply: Reply, method: str, body: bytes) -> KeymgmtError:
    """The error for a status; of the server's body it quotes an error code and nothing else."""
    code = _CODE.search(body)
    doing = "read" if method in ("GET", "HEAD") else "write to"
    message = f"cannot {doing} {shown(reply.url)}: the server says {reply.status}"
    message += f" ({code[1].decode()})" if code else ""
    if reply.status in (401, 403):
        return StorageDenied(
            message, hint='the config has the logins: [remote.access."SCHEME://HOST"]'
        )
    hint = "look at the location, and at the log of the server"
    if reply.status in _BUSY:
        hint = "it is busy or broken: try again later"
    return StorageUnavailable(message, hint=hint)


def _retry_after(headers: Mapping[str, str]) -> float:
    text = headers.get("retry-after", "")
    return float(text) if text.isdecimal() and len(text) < 10 else 0.0
