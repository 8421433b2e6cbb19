"""Which cryptographic module runs, since a FIPS 140 validation is of one module and version."""

from __future__ import annotations

import ssl
from importlib.metadata import version

from cryptography.hazmat.bindings._rust import openssl

__all__ = ["describe_module"]


def describe_module() -> tuple[str, bool]:
    """The libraries that encrypt and hash, in a sentence, and whether OpenSSL is in FIPS mode.

    In FIPS mode OpenSSL's provider ``fips`` does what ``cryptography`` asks for. Whether that
    provider is a validated one, and whether Python's own OpenSSL is, only the operator knows.
    """
    ours, theirs = openssl.openssl_version_text(), ssl.OPENSSL_VERSION
    fips = openssl.is_fips_enabled()
    state = "in FIPS mode" if fips else "not a validated module"
    return f"{ours} of cryptography {version('cryptography')}, {state}; {theirs} of Python", fips
