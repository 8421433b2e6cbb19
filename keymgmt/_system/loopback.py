"""Whether a host is this machine: plain HTTP is for nothing else."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

__all__ = ["is_loopback"]


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
