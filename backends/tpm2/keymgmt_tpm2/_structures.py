"""TPM structures as bytes, for checking a TPM's statements without a TPM.

It needs only ``cryptography``, so a build machine or an enrolment server runs it without libtss2.
Structures are those of "Trusted Platform Module Library, Part 2" (TCG, 1.59); all integers are
big-endian, and a ``TPM2B`` is a 2-byte length and its content. The bytes are not trusted: any input
that is not exactly one structure is a ValueError.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

__all__ = [
    "ALG_ECC",
    "ALG_ECDSA",
    "ALG_KEYEDHASH",
    "ALG_NULL",
    "ALG_RSA",
    "ALG_SHA256",
    "ALG_SHA384",
    "Public",
    "Reader",
    "describe_attributes",
    "ecdsa_pair",
    "root_key_kind",
    "sha256",
    "sized",
    "u16",
    "u32",
    "verifier_public",
]

ALG_RSA: Final = 0x0001
ALG_KEYEDHASH: Final = 0x0008
ALG_SHA256: Final = 0x000B
ALG_SHA384: Final = 0x000C
ALG_NULL: Final = 0x0010
ALG_OAEP: Final = 0x0017
ALG_ECDSA: Final = 0x0018
ALG_ECC: Final = 0x0023
_CURVES: Final[dict[int, ec.EllipticCurve]] = {
    0x0003: ec.SECP256R1(),
    0x0004: ec.SECP384R1(),
}

_HASHES: Final = {ALG_SHA256: "sha256", ALG_SHA384: "sha384"}
_RSA_BITS: Final = (2048, 3072, 4096)

FIXED_TPM: Final = 0x2
FIXED_PARENT: Final = 0x10
SENSITIVE_DATA_ORIGIN: Final = 0x20
USER_WITH_AUTH: Final = 0x40
ADMIN_WITH_POLICY: Final = 0x80
NO_DA: Final = 0x400
RESTRICTED: Final = 0x10000
DECRYPT: Final = 0x20000
SIGN: Final = 0x40000
_ATTRIBUTES: Final = {
    FIXED_TPM: "fixedTPM",
    0x4: "stClear",
    FIXED_PARENT: "fixedParent",
    SENSITIVE_DATA_ORIGIN: "sensitiveDataOrigin",
    USER_WITH_AUTH: "userWithAuth",
    ADMIN_WITH_POLICY: "adminWithPolicy",
    NO_DA: "noDA",
    0x800: "encryptedDuplication",
    RESTRICTED: "restricted",
    DECRYPT: "decrypt",
    SIGN: "sign",
}


def sha256(*parts: bytes) -> bytes:
    """SHA-256 over the parts, one after the other."""
    return hashlib.sha256(b"".join(parts)).digest()


def u16(value: int) -> bytes:
    """A UINT16."""
    return value.to_bytes(2, "big")


def u32(value: int) -> bytes:
    """A UINT32."""
    return value.to_bytes(4, "big")


def sized(content: bytes) -> bytes:
    """A TPM2B of ``content``."""
    return u16(len(content)) + content


def ecdsa_pair(signature: bytes) -> tuple[bytes, bytes]:
    """The numbers r and s of a DER signature on P-256, 32 bytes each; else ValueError."""
    r, s = decode_dss_signature(signature)
    if max(r, s) >> 256:
        raise ValueError("the signature is not of a key on P-256")
    return r.to_bytes(32, "big"), s.to_bytes(32, "big")


def describe_attributes(attributes: int) -> str:
    """TPMA_OBJECT in the words of the specification."""
    names = [name for bit, name in _ATTRIBUTES.items() if attributes & bit]
    rest = attributes & ~sum(_ATTRIBUTES)
    return "|".join(names + ([hex(rest)] if rest else [])) or "none"


class Reader:
    """Reads integers and TPM2Bs from bytes; ValueError where they end too early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if self._at + count > len(self._data):
            raise ValueError("the structure ends too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, count: int, order: str = "big") -> int:
        """The next ``count`` bytes as an unsigned integer."""
        return int.from_bytes(self.take(count), "little" if order == "little" else "big")

    def sized(self) -> bytes:
        """The content of the next TPM2B."""
        return self.take(self.number(2))

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def end(self) -> None:
        """ValueError unless all was read."""
        if self.left:
            raise ValueError("the structure has bytes after its end")


@dataclass(frozen=True)
class Public:
    """A TPMT_PUBLIC of an RSA or ECC key.

    ``unique`` is (x, y) in the curve's length, or (modulus,). ``raw`` is the marshalled structure,
    ``head`` its part before ``unique``.
    """

    raw: bytes
    head: bytes
    kind: int
    name_alg: int
    attributes: int
    policy: bytes
    symmetric: int
    symmetric_bits: int
    scheme: int
    scheme_hash: int | None
    curve: int | None
    bits: int | None
    exponent: int
    unique: tuple[bytes, ...]

    @classmethod
    def parse(cls, raw: bytes) -> Public:
        """Read exactly one TPMT_PUBLIC (Part 2, 12.2.4); ValueError for any other bytes."""
        reader = Reader(raw)
        kind, name_alg = reader.number(2), reader.number(2)
        attributes, policy = reader.number(4), reader.sized()
        if kind not in (ALG_RSA, ALG_ECC):
            raise ValueError(f"a key of an algorithm that is not used here: {kind:#06x}")
        symmetric, symmetric_bits = reader.number(2), 0
        if symmetric != ALG_NULL:
            symmetric_bits = reader.number(2)
            reader.take(2)  # mode
        scheme = reader.number(2)
        scheme_hash = None if scheme in (ALG_NULL, 0x0015) else reader.number(2)  # 0015: RSAES
        if kind == ALG_RSA:
            bits, exponent = reader.number(2), reader.number(4)
            curve, left = None, reader.left
            unique: tuple[bytes, ...] = (reader.sized(),)
        else:
            curve, bits, exponent = reader.number(2), None, 0
            if reader.number(2) != ALG_NULL:
                reader.take(2)  # the hash of the key derivation scheme
            if curve not in _CURVES:
                raise ValueError(f"a curve that is not used here: {curve:#06x}")
            # A TPM may leave out leading zeros of a coordinate.
            length, left = (_CURVES[curve].key_size + 7) // 8, reader.left
            unique = tuple(reader.sized().rjust(length, b"\0") for _ in "xy")
        reader.end()
        return cls(
            raw=raw,
            head=raw[: len(raw) - left],
            kind=kind,
            name_alg=name_alg,
            attributes=attributes,
            policy=policy,
            symmetric=symmetric,
            symmetric_bits=symmetric_bits,
            scheme=scheme,
            scheme_hash=scheme_hash,
            curve=curve,
            bits=bits,
            exponent=exponent or 65537,
            unique=unique,
        )

    @property
    def name(self) -> bytes:
        """The object's name: its name algorithm and the hash of ``raw`` (Part 1, 16)."""
        return u16(self.name_alg) + hashlib.new(self.name_hash, self.raw).digest()

    @property
    def name_hash(self) -> str:
        """The ``hashlib`` name of the name algorithm; ValueError if it is not used here."""
        if self.name_alg not in _HASHES:
            raise ValueError(f"a name algorithm that is not used here: {self.name_alg:#06x}")
        return _HASHES[self.name_alg]

    @property
    def point(self) -> bytes:
        """The uncompressed point of an ECC key, 65 bytes for P-256."""
        if self.kind != ALG_ECC:
            raise ValueError("not an ECC key")
        return b"\x04" + b"".join(self.unique)

    def key(self) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
        """The public key; ValueError if it is not valid, such as a point off its curve."""
        if self.curve is not None:
            return ec.EllipticCurvePublicKey.from_encoded_point(_CURVES[self.curve], self.point)
        modulus = int.from_bytes(self.unique[0], "big")
        if modulus.bit_length() != self.bits or self.bits not in _RSA_BITS:
            raise ValueError(f"an RSA key whose modulus does not have {self.bits} bits")
        return rsa.RSAPublicNumbers(self.exponent, modulus).public_key()

    def encoded(self) -> bytes:
        """In the encoding of recipients: an ECC key's point, an RSA key's SubjectPublicKeyInfo."""
        return self.der() if self.curve is None else self.point

    def der(self) -> bytes:
        """The public key as DER SubjectPublicKeyInfo."""
        return self.key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def root_key_kind(raw: bytes) -> tuple[str, bool] | None:
    """Algorithm of a storage root key of any curve and hash, and whether it counts wrong tries.

    None where the TPMT_PUBLIC is not that of a storage root key.
    """
    reader = Reader(raw)
    kind, _, attributes = reader.number(2), reader.number(2), reader.number(4)
    required = FIXED_TPM | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | RESTRICTED | DECRYPT
    if attributes & (required | SIGN) != required or kind not in (ALG_RSA, ALG_ECC):
        return None
    return "RSA" if kind == ALG_RSA else "ECC", not attributes & NO_DA


def verifier_public(key: object) -> Public:
    """The TPMT_PUBLIC under which a TPM loads an approver's key to verify with it.

    Its name is part of every policy that names the key, so these bytes never change: userWithAuth
    and sign, no policy, no symmetric algorithm, no scheme, no key derivation.

    Raises:
        ValueError: neither a public key on P-256 nor an RSA key of 2048, 3072 or 4096 bits with an
            exponent of 32 bits at most.
    """
    attributes = u32(USER_WITH_AUTH | SIGN)
    null = u16(ALG_NULL)
    if isinstance(key, rsa.RSAPublicKey) and key.key_size in _RSA_BITS:
        numbers, bits = key.public_numbers(), key.key_size
        if numbers.e >> 32:
            raise ValueError("an RSA key whose exponent has more than the 32 bits of a TPM")
        exponent = 0 if numbers.e == 65537 else numbers.e
        head = u16(ALG_RSA) + u16(ALG_SHA256) + attributes + sized(b"") + null + null
        modulus = numbers.n.to_bytes(bits // 8, "big")
        return Public.parse(head + u16(bits) + u32(exponent) + sized(modulus))
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise ValueError("a TPM verifies approvals of an ECDSA P-256 or an RSA key")
    point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    head = u16(ALG_ECC) + u16(ALG_SHA256) + attributes + sized(b"") + null + null
    return Public.parse(head + u16(0x0003) + null + sized(point[1:33]) + sized(point[33:]))
