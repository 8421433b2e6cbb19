"""The addresses of servers: which host they name, and how they are shown."""

from __future__ import annotations

from typing import Any
from urllib.parse import urljoin, urlsplit

from keymgmt._system.address import is_loopback
from keymgmt.errors import ConfigError, StorageDenied, StorageUnavailable

__all__ = ["need_urllib3", "origin_of", "redirected", "shown"]


def need_urllib3() -> Any:
    """urllib3; ConfigError where it is not installed."""
    try:
        import urllib3
    except ImportError as error:
        raise ConfigError(
            "models elsewhere are read with a package that is not installed: urllib3",
            hint='pip install "keymgmt[remote]"',
        ) from error
    return urllib3


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port, which decide whether a login may be sent; ValueError if invalid.

    urllib3, which connects, parses the address: urllib sees another host where a backslash is.
    """
    # Without the query: an address that is signed has a long one, which is slow to parse.
    parts = need_urllib3().util.parse_url(url.partition("?")[0])
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
