"""A site of its own for the demo and the leak check: a config, a wrapping key, a publisher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)

import keymgmt
from keymgmt.backend import SupportsKeyManagement, SupportsSigning, replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from keymgmt import Config

__all__ = ["config_text", "make_site"]

_CONFIG: Final = """\
[providers.local]
backend = "file"
path = "keys"

[policy]
publishers = { "release.pub.pem" = ["NAME"] }

[seal]
to = ["local:models"]
sign = "local:publisher"
"""


def config_text(name: str) -> str:
    """A config whose publisher may publish ``name``, or ``*`` for any name."""
    return _CONFIG.replace("NAME", name)


def make_site(home: Path, name: str) -> Config:
    """Make the folder ``home`` with that config, its keys and the publisher's public key."""
    home.mkdir(mode=0o700)
    replace_file(home / "keymgmt.toml", config_text(name).encode(), mode=0o600)
    config = keymgmt.load_config(home / "keymgmt.toml")
    provider = config.provider("local")
    if not isinstance(provider, SupportsKeyManagement) or not isinstance(provider, SupportsSigning):
        raise TypeError("the file backend makes and signs with keys")
    provider.create_key("models", "aes256", {})
    provider.create_key("publisher", "ed25519", {})
    public = load_der_public_key(provider.public_key("publisher"))
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    replace_file(home / "release.pub.pem", pem)
    return config
