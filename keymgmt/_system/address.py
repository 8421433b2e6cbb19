"""Addresses of services as a config writes them, and whether a host is this machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

__all__ = ["is_loopback", "split_address"]


def split_address(text: str, login: str, plain: Collection[str] = ()) -> SplitResult:
    """Split the address of a service; plain HTTP is for loopback addresses alone.

    Args:
        text: the address, such as ``https://HOST:PORT``; its scheme is not checked otherwise.
        login: the message for an address that holds a login.
        plain: other hosts for which plain HTTP is allowed.

    Raises:
        ValueError: it cannot be split, holds a login, or is not protected; the message is ready to
            be shown.
    """
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - raises where it is not a port
    except ValueError as error:
        raise ValueError(f"{text[:200]!r} is not an address: {error}") from None
    if parts.username is not None or parts.password is not None:
        # The text is not repeated: the part before the @ may be a password.
        raise ValueError(login)
    host = parts.hostname or ""
    if parts.scheme == "http" and host and host not in plain and not is_loopback(host):
        raise ValueError(
            f"{text[:200]!r} is not protected: use https; http is for loopback addresses only"
        )
    return parts


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback address of this machine.

    A name is not, ``localhost`` included: others may choose the address that it stands for.

    Args:
        host: an address, as it is or as a URL has it: ``127.0.0.1:80``, ``[::1]:80``.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        return ipaddress.ip_address(urlsplit(f"//{host}").hostname or "").is_loopback
    except ValueError:
        return False
