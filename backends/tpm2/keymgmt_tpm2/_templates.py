"""The exact public areas of the keys that keymgmt creates.

A key whose attributes differ in one bit is refused before it is used. For example, a key with a
policy and userWithAuth could be used with the empty auth value and without its policy (Part 1,
19.7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from keymgmt.backend import RSA_OAEP_256
from keymgmt_tpm2 import _structures as s
from keymgmt_tpm2.policy._policy import Policy

__all__ = [
    "AK_ATTRIBUTES",
    "EK_PROFILES",
    "KINDS",
    "MECHANISMS",
    "EkProfile",
    "ak_template",
    "attributes_for",
    "follows_a_profile",
    "key_template",
    "problem_with",
    "srk_template",
    "trial_template",
]

KINDS: Final[dict[str, Literal["wrap", "sign"]]] = {
    "ecc-p256": "wrap",
    "rsa-2048": "wrap",
    "ecdsa-p256": "sign",
}
MECHANISMS: Final = {"ecc-p256": "hpke-p256", "rsa-2048": RSA_OAEP_256}
"""Kind of a wrapping key -> the mechanism of what is wrapped to it."""
_BORN_HERE: Final = s.FIXED_TPM | s.FIXED_PARENT | s.SENSITIVE_DATA_ORIGIN
AK_ATTRIBUTES: Final = _BORN_HERE | s.USER_WITH_AUTH | s.NO_DA | s.RESTRICTED | s.SIGN
_SRK_ATTRIBUTES: Final = _BORN_HERE | s.USER_WITH_AUTH | s.NO_DA | s.RESTRICTED | s.DECRYPT
_ECDSA_SHA256: Final = s.u16(s.ALG_ECDSA) + s.u16(s.ALG_SHA256)
_OAEP_SHA256: Final = s.u16(s.ALG_OAEP) + s.u16(s.ALG_SHA256)
_NULL: Final = s.u16(s.ALG_NULL)
_P256: Final = s.u16(0x0003)
_P384: Final = s.u16(0x0004)
_AES_256_CFB: Final = s.u16(0x0006) + s.u16(256) + s.u16(0x0043)
_AES_128_CFB: Final = s.u16(0x0006) + s.u16(128) + s.u16(0x0043)


def attributes_for(kind: str, policy: Policy) -> int:
    """TPMA_OBJECT of a key: userWithAuth only without a policy, noDA only without a PIN."""
    use = s.DECRYPT if KINDS[kind] == "wrap" else s.SIGN
    auth = 0 if policy.digest else s.USER_WITH_AUTH
    return _BORN_HERE | use | auth | (0 if policy.pin else s.NO_DA)


def key_template(kind: str, policy: Policy) -> bytes:
    """The TPMT_PUBLIC from which a key is created."""
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


@dataclass(frozen=True)
class EkProfile:
    """A kind of endorsement key of "TCG EK Credential Profile", Annex B.

    Attributes:
        index: NV index of its certificate.
        template: the TPM creates the key from this, unless the maker stored another template.
        nonce_at: NV index of the maker's nonce, which replaces the template's unique field.
        template_at: NV index of the maker's template.
    """

    index: int
    template: bytes
    template_at: int
    nonce_at: int | None = None

    @property
    def public(self) -> s.Public:
        """The template as a public area; its unique field is not that of a key."""
        return s.Public.parse(self.template)


_EK_ATTRIBUTES: Final = _BORN_HERE | s.ADMIN_WITH_POLICY | s.RESTRICTED | s.DECRYPT
_POLICY_A: Final = "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"
"""PolicySecret(endorsement): B.6.2."""
_POLICY_B: Final = {
    s.ALG_SHA256: "ca3d0a99a2b93906f7a3342414efcfb3a385d44cd1fd459089d19b5071c0b7a0",
    s.ALG_SHA384: "b26e7d28d11a50bc53d882bcf5fd3a1a074148bb35d3b4e4cb1c0ad9bde419ca"
    "cb47ba09699646150f9fc000f3f80e12",
}
"""PolicyA, or a policy that an NV index of the maker authorizes (B.6.5).

Keys with this policy also have userWithAuth, so the empty auth value suffices."""


def _low(rest: bytes) -> bytes:
    kind = s.ALG_RSA if len(rest) > 200 else s.ALG_ECC
    policy = s.sized(bytes.fromhex(_POLICY_A))
    head = s.u16(kind) + s.u16(s.ALG_SHA256) + s.u32(_EK_ATTRIBUTES) + policy
    return head + _AES_128_CFB + _NULL + rest


def _high(kind: int, name_alg: int, rest: bytes) -> bytes:
    symmetric = _AES_128_CFB if name_alg == s.ALG_SHA256 else _AES_256_CFB
    attributes = s.u32(_EK_ATTRIBUTES | s.USER_WITH_AUTH)
    policy = s.sized(bytes.fromhex(_POLICY_B[name_alg]))
    return s.u16(kind) + s.u16(name_alg) + attributes + policy + symmetric + _NULL + rest


_NO_POINT: Final = _NULL + s.sized(b"") * 2
EK_PROFILES: Final = {
    "L-1": EkProfile(
        0x01C00002, _low(s.u16(2048) + s.u32(0) + s.sized(bytes(256))), 0x01C00004, 0x01C00003
    ),
    "L-2": EkProfile(
        0x01C0000A, _low(_P256 + _NULL + s.sized(bytes(32)) * 2), 0x01C0000C, 0x01C0000B
    ),
    "H-1": EkProfile(
        0x01C00012,
        _high(s.ALG_RSA, s.ALG_SHA256, s.u16(2048) + s.u32(0) + s.sized(b"")),
        0x01C00013,
    ),
    "H-2": EkProfile(0x01C00014, _high(s.ALG_ECC, s.ALG_SHA256, _P256 + _NO_POINT), 0x01C00015),
    "H-3": EkProfile(0x01C00016, _high(s.ALG_ECC, s.ALG_SHA384, _P384 + _NO_POINT), 0x01C00017),
    "H-6": EkProfile(
        0x01C0001C,
        _high(s.ALG_RSA, s.ALG_SHA384, s.u16(3072) + s.u32(0) + s.sized(b"")),
        0x01C0001D,
    ),
    "H-7": EkProfile(
        0x01C0001E,
        _high(s.ALG_RSA, s.ALG_SHA384, s.u16(4096) + s.u32(0) + s.sized(b"")),
        0x01C0001F,
    ),
}
"""Template name -> profile, in the order in which the certificates are looked for."""


def follows_a_profile(ek: s.Public) -> bool:
    """Whether an endorsement key has exactly the algorithms, attributes and policy of a profile."""

    def use(public: s.Public) -> tuple[object, ...]:
        algorithms = public.symmetric, public.symmetric_bits, public.scheme
        return public.name_alg, public.attributes, public.policy, *algorithms

    return use(ek) in [use(profile.public) for profile in EK_PROFILES.values()]


def srk_template(kind: str) -> bytes:
    """The storage root key of "TCG TPM v2.0 Provisioning Guidance", 7.5.1; ``ecc`` or ``rsa``."""
    if kind == "rsa":
        rest = _AES_128_CFB + _NULL + s.u16(2048) + s.u32(0) + s.sized(bytes(256))
        return _head(s.ALG_RSA, _SRK_ATTRIBUTES, b"") + rest
    rest = _AES_128_CFB + _NULL + _P256 + _NULL + s.sized(bytes(32)) * 2
    return _head(s.ALG_ECC, _SRK_ATTRIBUTES, b"") + rest


def trial_template() -> bytes:
    """A sealed data object, which a TPM creates at once."""
    attributes = s.FIXED_TPM | s.FIXED_PARENT | s.USER_WITH_AUTH | s.NO_DA
    return _head(s.ALG_KEYEDHASH, attributes, b"") + _NULL + s.sized(b"")


def problem_with(public: s.Public, kind: str, policy: Policy) -> str | None:
    """How a public area differs from ``key_template``, in words; None if it does not."""
    template = s.Public.parse(key_template(kind, policy))
    if public.attributes != template.attributes:
        return (
            f"its attributes are {s.describe_attributes(public.attributes)}, "
            f"not {s.describe_attributes(template.attributes)}"
        )
    if public.policy != template.policy:
        return "its policy is not the policy in its file"
    fields = ("kind", "name_alg", "symmetric", "scheme", "scheme_hash", "curve", "bits", "exponent")
    for name in fields:
        if getattr(public, name) != getattr(template, name):
            return f"its {name.replace('_', ' ')} is not that of {kind}"
    return None


def _head(algorithm: int, attributes: int, policy: bytes) -> bytes:
    return s.u16(algorithm) + s.u16(s.ALG_SHA256) + s.u32(attributes) + s.sized(policy)
