"""Files on a web server, read with ranges (RFC 9110)."""

from __future__ import annotations

import re
from http import HTTPStatus as S
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from keymgmt._remote.http import Http, basic
from keymgmt._remote.storage import Part, changed
from keymgmt._remote.url import shown
from keymgmt.errors import ConfigError, IntegrityError, StorageUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from keymgmt._config.remote import Access, Remote
    from keymgmt._remote.http import Reply
    from keymgmt._remote.location import Location
    from keymgmt._remote.patience import Patience

__all__ = ["WebStorage", "total_of", "web_storage"]

_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_GOOD: Final = (
    S.OK,
    S.PARTIAL_CONTENT,
    S.NOT_FOUND,
    S.GONE,
    S.PRECONDITION_FAILED,
    S.REQUESTED_RANGE_NOT_SATISFIABLE,
)
_PUT: Final = (S.OK, S.NOT_FOUND, S.CONFLICT, S.PRECONDITION_FAILED)
_KEPT: Final = "/%~!$&'()*+,;=:@"  # what a path may have as it is


class WebStorage:
    """The files of a sealed model on a web server, or on a bucket's server."""

    def __init__(
        self, http: Http, address: Callable[[str, str], str], *, replaces: bool = False
    ) -> None:
        """Read files with a client.

        Args:
            http: the client.
            address: gives the URL of a file, by the HTTP method and the name of the file.
            replaces: whether the server can replace a file if it still has a given ETag.
        """
        self._http, self._address, self._replaces = http, address, replaces

    def part(self, name: str, start: int, end: int, pin: str = "") -> Part | None:
        """A part of a file, as ``Storage.part``; the whole file if the server ignores ranges."""
        url = self._address("GET", name)
        headers = {"Range": f"bytes={start}-{end - 1}"}
        if pin.startswith('"'):  # a weak ETag (W/"...") equals none in this condition
            headers["If-Match"] = pin
        reply = self._http.request("GET", url, headers=headers, good=_GOOD, limit=end - start)
        if reply.status in (S.NOT_FOUND, S.GONE) and not pin:
            return None
        if reply.status == S.REQUESTED_RANGE_NOT_SATISFIABLE and not start and not pin:
            return Part(memoryview(b""), 0, "")  # no range of an empty file has anything
        if reply.status not in (S.OK, S.PARTIAL_CONTENT):
            raise changed(shown(url))
        total = total_of(reply, start, end)
        new_pin = reply.headers.get("etag") or reply.headers.get("last-modified") or ""
        if pin and new_pin != pin:
            raise changed(shown(url))
        return Part(reply.body, total, new_pin)

    def replace(self, name: str, content: bytes, pin: str) -> str:
        """Replace a small file if it still has this ETag, as ``Storage.replace``."""
        url = self._address("PUT", name)
        if not self._replaces or not pin.startswith('"'):
            raise ConfigError(
                f"nothing is replaced at {shown(url)}",
                hint="change the model where it comes from, in its folder or bucket",
            )
        reply = self._http.request(
            "PUT", url, headers={"If-Match": pin}, body=content, good=_PUT, limit=1 << 16
        )
        if reply.status == S.OK and (etag := reply.headers.get("etag")):
            return etag
        now = self.part(name, 0, len(content) + 1)
        # Refused, but stored: an earlier try succeeded, and its reply was lost.
        if reply.status == S.OK or (now is not None and now.content == content):
            return now.pin if now is not None else ""
        raise IntegrityError(
            f"{shown(url)} was replaced by somebody else meanwhile, and is as they left it",
            hint="run this again if it is needed",
        )


def web_storage(location: Location, settings: Remote, patience: Patience) -> WebStorage:
    """The files below a location; raises as ``Http``, and ConfigError for an incomplete login."""
    url = f"{location.origin}/{quote(location.path, safe=_KEPT)}".rstrip("/")
    access = settings.access_to(location.origin)
    http = Http(url, settings, access, patience)
    http.authorization = _authorization(location.origin, access)
    return WebStorage(http, lambda _, name: f"{url}/{quote(name)}")


def total_of(reply: Reply, start: int, end: int) -> int:
    """The length in bytes of the whole file, of which the reply has a part."""
    where = shown(reply.url)
    if reply.status == S.PARTIAL_CONTENT:
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
    return basic(access.user, access.secret.read_text())
