"""Signatures of token keys in the encodings that verifiers expect.

ECDSA on P-256 with SHA-256 and P-384 with SHA-384, as DER Ecdsa-Sig-Value (RFC 3279); a token gives
the two numbers side by side (PKCS#11, CKM_ECDSA). RSA-PSS with SHA-256, MGF1-SHA-256 and 32 bytes
of salt (RFC 8017). The digest is computed here, since every token that signs can sign a digest.
Each signature is verified before it is returned.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from pkcs11 import MGF, Mechanism

from keymgmt.backend import ProviderUnavailable, PublicKey, UnsupportedOperation
from keymgmt_pkcs11._cryptoki import CkMechanism
from keymgmt_pkcs11._wrapping import KeyInUse

if TYPE_CHECKING:
    from keymgmt_pkcs11._connection import Session
    from keymgmt_pkcs11._keys import KeyObject

__all__ = ["can_sign", "require_signing", "sign"]

_SALT: Final = 32


def can_sign(key: KeyObject) -> bool:
    """Whether the key is of a kind that can sign, and its attributes allow it."""
    if not key.can("sign"):
        return False
    if isinstance(key.public, rsa.RSAPublicKey):
        return key.bits >= 2048
    return isinstance(key.public, ec.EllipticCurvePublicKey)


def require_signing(key: KeyObject) -> KeyObject:
    """The key itself; UnsupportedOperation where it does not sign."""
    if not can_sign(key):
        raise UnsupportedOperation(
            f"{key} does not sign",
            hint="make one: keymgmt keys create PROVIDER:KEY --kind ecdsa-p256",
        )
    return key


def sign(session: Session, key: KeyObject, message: bytes) -> bytes:
    """Sign ``message`` with a private key of the token, by an open ``session``.

    Raises:
        UnsupportedOperation: the key is of no kind that can sign.
        ProviderUnavailable: the token gave a signature that its public key does not verify.
    """
    public, use = require_signing(key).public, KeyInUse(session, key)
    digest = hashlib.new("sha384" if key.bits == 384 else "sha256", message).digest()
    if isinstance(public, rsa.RSAPublicKey):
        pss = CkMechanism(Mechanism.RSA_PKCS_PSS, Mechanism.SHA256, MGF.SHA256, _SALT)
        signature = bytes(use.apply("Sign", pss, digest))
    else:
        raw = use.apply("Sign", CkMechanism(Mechanism.ECDSA), digest)
        half = len(raw) // 2
        signature = encode_dss_signature(
            int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big")
        )
    if not PublicKey(key.der).verifies(message, signature):
        raise ProviderUnavailable(
            f"the token signed with {key}, and its public key does not verify the signature",
            hint="see whether two key pairs share this label and id",
        )
    return signature
