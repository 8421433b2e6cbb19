"""Whether a host is this machine: plain HTTP is for nothing else."""

from __future__ import annotations

import ipaddress
import re

__all__ = ["is_loopback"]


def is_loopback(host: str) -> bool:
    """Whether a host, with or without a port, is this machine."""
    name = re.sub(r":\d+$", "", host).strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
