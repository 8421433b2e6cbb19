"""The approver's key: in a file, or of a provider of any backend that signs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, TypeAlias

import typer
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from keymgmt.backend import ConfigError, read_file
from keymgmt_tpm2._arguments import find_signer
from keymgmt_tpm2.policy._policy import Approver

__all__ = ["ApproverKey", "Ref", "find_approver"]

MAX_FILE: Final = 1 << 20
ApproverKey: TypeAlias = Annotated[
    str, typer.Option("--key", metavar="FILE|PROVIDER:KEY", help="The approver's ECDSA P-256 key.")
]
Ref: TypeAlias = Annotated[str, typer.Option(help="The ref that the keys were made with.")]


def find_approver(
    context: typer.Context, key: str, ref: str
) -> tuple[Approver, Callable[[bytes], bytes]]:
    """The approver whose key that is, and a function that signs with it.

    Raises:
        ConfigError: no key, one that cannot approve, or a publisher's.
    """
    public, sign = _signer(context, key)
    _refuse_publisher(context, key, public)
    try:
        approver = Approver(public, ref)
        approver.check_ecdsa()
    except ValueError as error:
        raise ConfigError(f"{key} cannot approve: {error}") from error
    return approver, sign


def _signer(context: typer.Context, key: str) -> tuple[bytes, Callable[[bytes], bytes]]:
    """DER public key and a function that signs, of a PEM file or a provider's key."""
    path = Path(key)
    if ":" in key and not path.exists():
        provider, name = find_signer(context, key)
        return provider.public_key(name), lambda message: provider.sign(name, message).signature
    private = _load_private(path)
    public = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return public, lambda message: private.sign(message, ec.ECDSA(hashes.SHA256()))


def _refuse_publisher(context: typer.Context, key: str, public: bytes) -> None:
    """ConfigError for a publisher's key: it must not also decide which boot states open models."""
    try:
        config = context.obj.config()
    except ConfigError:
        return  # an approver's machine need not have one
    for name in config.policy.publishers:
        if config.public_key(name) == public:
            raise ConfigError(
                f"{key} is a publisher's key ({name})",
                hint="approve with a key of its own: keymgmt tpm policy approver FILE",
            )


def _load_private(path: Path) -> ec.EllipticCurvePrivateKey:
    content = bytes(read_file(path, label="key", limit=MAX_FILE, access="private"))
    try:
        try:
            key = load_pem_private_key(content, None)
        except TypeError:
            asked = typer.prompt("Passphrase", hide_input=True, err=True)
            key = load_pem_private_key(content, asked.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no private key, or the passphrase is wrong") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no ECDSA P-256 key", hint="keymgmt tpm policy approver FILE")
    return key
