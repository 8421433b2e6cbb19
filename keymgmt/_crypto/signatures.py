"""Verifying detached signatures, and the bytes that DSSE signs.

Rules: the algorithm follows from the trusted public key and never from the file that carries the
signature. The algorithms are those of ``SupportsSigning``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keymgmt.errors import ConfigError

__all__ = ["ALGORITHMS", "PublicKey", "algorithm_of", "pre_authentication", "verify_signature"]

_HASHES: Final = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384()}
_KINDS: Final = {
    ed25519.Ed25519PublicKey: "ed25519",
    mldsa.MLDSA65PublicKey: "ml-dsa-65",
    mldsa.MLDSA87PublicKey: "ml-dsa-87",
}
_RSA_BITS: Final = range(2048, 8193)


ALGORITHMS: Final = (*_KINDS.values(), "ecdsa-p256", "ecdsa-p384", "rsa-pss-sha256")
"""The signature algorithms of a key."""


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed: PAE of DSSE v1 (secure-systems-lab/dsse, protocol.md)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _load(public_key: bytes) -> tuple[str, Any]:
    """The algorithm and the key object of a DER SubjectPublicKeyInfo; ConfigError if none."""
    try:
        key = load_der_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError("not a public key: no DER SubjectPublicKeyInfo") from error
    for kind, algorithm in _KINDS.items():
        if isinstance(key, kind):
            return algorithm, key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _HASHES:
        return ("ecdsa-p256" if key.curve.name == "secp256r1" else "ecdsa-p384"), key
    if isinstance(key, rsa.RSAPublicKey) and key.key_size in _RSA_BITS:
        return "rsa-pss-sha256", key
    raise ConfigError(
        "the public key is of a kind that cannot sign here",
        hint="known: Ed25519, ML-DSA-65 and -87, ECDSA P-256 and P-384, RSA of 2048 to 8192 bits",
    )


def algorithm_of(public_key: bytes) -> str:
    """The algorithm of a DER SubjectPublicKeyInfo; ConfigError if it is not one of ALGORITHMS."""
    return _load(public_key)[0]


def verify_signature(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is ``public_key``'s over ``message``.

    Args:
        public_key: DER SubjectPublicKeyInfo of a trusted key.
        message: the message itself, not a digest.
        signature: as ``SupportsSigning`` makes it for this kind of key.

    Raises:
        ConfigError: ``public_key`` is of a kind that cannot sign here.
    """
    return _verify(_load(public_key)[1], message, signature)


def _verify(key: Any, message: bytes, signature: bytes) -> bool:
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(_HASHES[key.curve.name]))
        elif isinstance(key, rsa.RSAPublicKey):
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
            key.verify(signature, message, pss, hashes.SHA256())
        else:
            key.verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class PublicKey:
    """A public key with which signatures are checked, since a person chose to trust it.

    Attributes:
        der: DER SubjectPublicKeyInfo (RFC 5280), in the one encoding that the library writes. A key
            that was encoded otherwise (a compressed point, other parameters) is encoded again, so
            that equal keys have equal bytes and one ``id``.
        algorithm: the signature algorithm of this key.
        id: SHA-384 of ``der`` in hex.
    """

    der: bytes = field(repr=False)
    algorithm: str = field(init=False, repr=False, compare=False)
    id: str = field(init=False, repr=False, compare=False)
    _key: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        algorithm, key = _load(self.der)
        der = _encode(key)
        made = {
            "der": der,
            "algorithm": algorithm,
            "id": hashlib.sha384(der).hexdigest(),
            "_key": key,
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def verifies(self, message: bytes, signature: bytes) -> bool:
        """``verify_signature`` with this key, which is parsed once."""
        return _verify(self._key, message, signature)

    @classmethod
    def from_pem(cls, pem: bytes) -> PublicKey:
        """Read a PEM ``PUBLIC KEY`` (RFC 7468); ConfigError for any other text or kind of key."""
        if pem.count(b"-----BEGIN") > 1:
            raise ConfigError(
                "there is more than one key in the PEM file", hint="give each key a file of its own"
            )
        try:
            key = serialization.load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm) as error:
            said, hint = _what_else(pem)
            raise ConfigError(said, hint=hint) from error
        return cls(_encode(key))

    def to_pem(self) -> bytes:
        """The PEM form."""
        return serialization.load_der_public_key(self.der).public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


def _what_else(pem: bytes) -> tuple[str, str]:
    """What a text is that is no public key in PEM, and the way to one."""
    if b"PRIVATE KEY-----" in pem:
        hint = "its public part: openssl pkey -pubout -in FILE -out FILE.pub"
        return "it holds a private key, and belongs to its owner alone", hint
    if b"-----BEGIN CERTIFICATE" in pem:
        hint = "the public key in it: openssl x509 -noout -pubkey -in FILE -out FILE.pub"
        return "it holds a certificate, and not a public key", hint
    hint = "export it with: keymgmt keys export PROVIDER:KEY --format pem"
    return "not a public key in PEM", hint


def _encode(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded
