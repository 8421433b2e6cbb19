"""Verifying detached signatures, and the bytes that DSSE signs.

Rules: the algorithm follows from the trusted public key and never from the file that carries the
signature. The algorithms are those of ``SupportsSigning``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keymgmt.errors import ConfigError

__all__ = ["PublicKey", "algorithm_of", "pre_authentication", "verify_signature"]

_HASHES: Final = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384()}
_RSA_BITS: Final = range(2048, 8193)


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """What is signed: PAE of DSSE v1 (secure-systems-lab/dsse, protocol.md)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def algorithm_of(public_key: bytes) -> str:
    """The algorithm that a DER SubjectPublicKeyInfo signs with; ConfigError if none of ours."""
    try:
        key = load_der_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError("not a public key: no DER SubjectPublicKeyInfo") from error
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "ed25519"
    if isinstance(key, mldsa.MLDSA65PublicKey):
        return "ml-dsa-65"
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _HASHES:
        return "ecdsa-p256" if key.curve.name == "secp256r1" else "ecdsa-p384"
    if isinstance(key, rsa.RSAPublicKey) and key.key_size in _RSA_BITS:
        return "rsa-pss-sha256"
    raise ConfigError(
        "a public key of a kind that signs nothing here",
        hint="known: Ed25519, ML-DSA-65, ECDSA P-256 and P-384, RSA of 2048 to 8192 bits",
    )


def verify_signature(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is ``public_key``'s over ``message``.

    Args:
        public_key: DER SubjectPublicKeyInfo of a trusted key.
        message: the message itself, not a digest.
        signature: as ``SupportsSigning`` makes it for this kind of key.

    Raises:
        ConfigError: ``public_key`` is of no kind that signs here.
    """
    algorithm_of(public_key)
    key = load_der_public_key(public_key)
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(_HASHES[key.curve.name]))
        elif isinstance(key, rsa.RSAPublicKey):
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
            key.verify(signature, message, pss, hashes.SHA256())
        elif isinstance(key, (ed25519.Ed25519PublicKey, mldsa.MLDSA65PublicKey)):
            key.verify(signature, message)
        else:
            return False
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class PublicKey:
    """A public key that signatures are checked with, by a person's choice.

    Attributes:
        der: DER SubjectPublicKeyInfo (RFC 5280).
    """

    der: bytes = field(repr=False)

    def __post_init__(self) -> None:
        algorithm_of(self.der)

    @property
    def algorithm(self) -> str:
        """What it signs with."""
        return algorithm_of(self.der)

    @property
    def id(self) -> str:
        """SHA-256 of ``der`` in hex."""
        return hashlib.sha256(self.der).hexdigest()

    @classmethod
    def from_pem(cls, pem: bytes) -> PublicKey:
        """Read a PEM ``PUBLIC KEY`` (RFC 7468); ConfigError if it is none that signs here."""
        try:
            key = serialization.load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError("not a public key in PEM") from error
        return cls(
            key.public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )

    def to_pem(self) -> bytes:
        """The PEM form."""
        return serialization.load_der_public_key(self.der).public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
