"""The keys that are made here: their public areas, exactly.

A key whose attributes differ in one bit is refused before it is used: userWithAuth on a policy key,
say, would let the empty auth value in (Part 1, 19.7).
"""

from __future__ import annotations

from typing import Final, Literal

from keymgmt_tpm2 import _structures as s
from keymgmt_tpm2._policy import Policy

__all__ = [
    "AK_ATTRIBUTES",
    "EK_ATTRIBUTES",
    "EK_POLICY",
    "KINDS",
    "ak_template",
    "attributes_for",
    "ek_template",
    "key_template",
    "problem_with",
    "srk_template",
]

KINDS: Final[dict[str, Literal["wrap", "sign"]]] = {
    "ecc-p256": "wrap",
    "rsa-2048": "wrap",
    "ecdsa-p256": "sign",
}
_BORN_HERE: Final = s.FIXED_TPM | s.FIXED_PARENT | s.SENSITIVE_DATA_ORIGIN
AK_ATTRIBUTES: Final = _BORN_HERE | s.USER_WITH_AUTH | s.NO_DA | s.RESTRICTED | s.SIGN
_SRK_ATTRIBUTES: Final = _BORN_HERE | s.USER_WITH_AUTH | s.NO_DA | s.RESTRICTED | s.DECRYPT
EK_ATTRIBUTES: Final = _BORN_HERE | s.ADMIN_WITH_POLICY | s.RESTRICTED | s.DECRYPT
EK_POLICY: Final = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
"""PolicyA, PolicySecret(endorsement): "TCG EK Credential Profile", B.6.2."""
_ECDSA_SHA256: Final = s.u16(s.ALG_ECDSA) + s.u16(s.ALG_SHA256)
_OAEP_SHA256: Final = s.u16(s.ALG_OAEP) + s.u16(s.ALG_SHA256)
_NULL: Final = s.u16(s.ALG_NULL)
_P256: Final = s.u16(0x0003)
_AES_128_CFB: Final = s.u16(0x0006) + s.u16(128) + s.u16(0x0043)


def attributes_for(kind: str, policy: Policy) -> int:
    """TPMA_OBJECT of a key: userWithAuth without a policy only, noDA without a PIN only."""
    use = s.DECRYPT if KINDS[kind] == "wrap" else s.SIGN
    auth = 0 if policy.digest else s.USER_WITH_AUTH
    return _BORN_HERE | use | auth | (0 if policy.pin else s.NO_DA)


def key_template(kind: str, policy: Policy) -> bytes:
    """The TPMT_PUBLIC to create a key from."""
    if kind == "rsa-2048":
        rest = _NULL + _OAEP_SHA256 + s.u16(2048) + s.u32(0) + s.sized(b"")
    else:
        scheme = _ECDSA_SHA256 if kind == "ecdsa-p256" else _NULL
        rest = _NULL + scheme + _P256 + _NULL + s.sized(b"") * 2
    algorithm = s.ALG_RSA if kind == "rsa-2048" else s.ALG_ECC
    return _head(algorithm, attributes_for(kind, policy), policy.digest) + rest


def ak_template() -> bytes:
    """An attestation key: restricted, ECDSA P-256 with SHA-256."""
    rest = _NULL + _ECDSA_SHA256 + _P256 + _NULL + s.sized(b"") * 2
    return _head(s.ALG_ECC, AK_ATTRIBUTES, b"") + rest


def ek_template(kind: str) -> bytes:
    """An endorsement key of "TCG EK Credential Profile", B.3.3 and B.3.4; ``rsa`` or ``ecc``."""
    if kind == "rsa":
        rest = _AES_128_CFB + _NULL + s.u16(2048) + s.u32(0) + s.sized(bytes(256))
        return _head(s.ALG_RSA, EK_ATTRIBUTES, EK_POLICY) + rest
    rest = _AES_128_CFB + _NULL + _P256 + _NULL + s.sized(bytes(32)) * 2
    return _head(s.ALG_ECC, EK_ATTRIBUTES, EK_POLICY) + rest


def srk_template(kind: str) -> bytes:
    """The storage root key of "TCG TPM v2.0 Provisioning Guidance", 7.5.1; ``ecc`` or ``rsa``."""
    if kind == "rsa":
        rest = _AES_128_CFB + _NULL + s.u16(2048) + s.u32(0) + s.sized(bytes(256))
        return _head(s.ALG_RSA, _SRK_ATTRIBUTES, b"") + rest
    rest = _AES_128_CFB + _NULL + _P256 + _NULL + s.sized(bytes(32)) * 2
    return _head(s.ALG_ECC, _SRK_ATTRIBUTES, b"") + rest


def problem_with(public: s.Public, kind: str, policy: Policy) -> str | None:
    """Why a public area is not what ``key_template`` makes, or None if it is."""
    wanted = s.Public.parse(key_template(kind, policy))
    if public.attributes != wanted.attributes:
        return (
            f"its attributes are {s.describe_attributes(public.attributes)}, "
            f"not {s.describe_attributes(wanted.attributes)}"
        )
    if public.policy != wanted.policy:
        return "its policy is another one than its file says"
    fields = ("kind", "name_alg", "symmetric", "scheme", "scheme_hash", "curve", "bits", "exponent")
    for name in fields:
        if getattr(public, name) != getattr(wanted, name):
            return f"its {name.replace('_', ' ')} is not that of {kind}"
    return None


def _head(algorithm: int, attributes: int, policy: bytes) -> bytes:
    return s.u16(algorithm) + s.u16(s.ALG_SHA256) + s.u32(attributes) + s.sized(policy)
