"""Files on a web server, read with ranges (RFC 9110)."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from keymgmt._remote.http import Http, shown
from keymgmt._remote.storage import Part, changed
from keymgmt.errors import ConfigError, StorageUnavailable

if TYPE_CHECKING:
    from keymgmt._config.remote import Access, Remote
    from keymgmt._remote.http import Reply
    from keymgmt._remote.location import Location

__all__ = ["WebStorage"]

_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_OK, _PARTIAL, _NOT_FOUND, _GONE, _CHANGED, _NO_SUCH_RANGE = 200, 206, 404, 410, 412, 416
_GOOD: Final = frozenset({_OK, _PARTIAL, _NOT_FOUND, _GONE, _CHANGED, _NO_SUCH_RANGE})
_KEPT: Final = "/%~!$&'()*+,;=:@"  # what a path may have as it is


class WebStorage:
    """The files below one address."""

    def __init__(self, location: Location, settings: Remote) -> None:
        """Make a client; raises as ``Http``, and ConfigError where a secret is not there."""
        self._url = f"{location.origin}/{quote(location.path, safe=_KEPT)}".rstrip("/")
        access = settings.access_to(location.origin)
        self._http = Http(self._url, settings, access)
        self._http.authorization = _authorization(location.origin, access)

    def part(self, name: str, start: int, end: int, pin: str = "") -> Part | None:
        """A part of a file, as ``Storage.part``; all of it from a server that ignores ranges."""
        url = f"{self._url}/{quote(name)}"
        headers = {"Range": f"bytes={start}-{end - 1}"}
        if pin.startswith('"'):  # a weak ETag (W/"...") equals none in this condition
            headers["If-Match"] = pin
        reply = self._http.request("GET", url, headers=headers, good=_GOOD, limit=end - start)
        if reply.status in (_NOT_FOUND, _GONE) and not pin:
            return None
        if reply.status not in (_OK, _PARTIAL):
            raise changed(shown(url))
        total = _total(reply, start, end)
        found = reply.headers.get("etag") or reply.headers.get("last-modified") or ""
        if pin and found != pin:
            raise changed(shown(url))
        return Part(reply.body, total, found)

    def replace(self, name: str, content: bytes, pin: str) -> str:  # noqa: ARG002
        """Nothing is changed on a web server.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{shown(self._url)} is on a web server, where nothing is changed",
            hint="change the model where it is, in its folder or bucket",
        )


def _total(reply: Reply, start: int, end: int) -> int:
    """How many bytes the file has, of which the asked ones came."""
    where = shown(reply.url)
    if reply.status == _PARTIAL:
        match = _RANGE.fullmatch(reply.headers.get("content-range", ""))
        first, last, total = map(int, match.groups()) if match else (-1, -1, -1)
        if first == start and last == min(end, total) - 1 and len(reply.body) == last + 1 - first:
            return total
        raise StorageUnavailable(
            f"{where} gives another range than was asked for",
            hint="the server, or a proxy on the way, does not understand ranges",
        )
    length = reply.headers.get("content-length", "")
    total = int(length) if length.isdecimal() and len(length) < 19 else len(reply.body)
    if start or not reply.whole:
        raise StorageUnavailable(
            f"{where} is given whole, and not in the ranges that were asked for",
            hint="use a web server that gives ranges, or copy the model to a folder first",
        )
    return total


def _authorization(origin: str, access: Access) -> str:
    if access.token is not None:
        return f"Bearer {access.token.read_text()}"
    if access.user is None and access.secret is None:
        return ""
    if access.user is None or access.secret is None:
        raise ConfigError(f'[remote.access."{origin}"] needs user and secret together, or a token')
    login = f"{access.user}:{access.secret.read_text()}"
    return f"Basic {base64.b64encode(login.encode()).decode()}"
