"""Public-key wrapping: HPKE base mode (RFC 9180), also for devices that give only an ECDH result.

Rules: everything is sealed by ``cryptography``; the caller's context is HPKE's ``info``, so another
context does not open; there is no associated data. A blob is ``enc || ciphertext``.

    kind                    KEM (RFC 9180, 7.1)              id      KDF          AEAD
    hpke-p256               DHKEM(P-256, HKDF-SHA256)        0x0010  HKDF-SHA256  AES-256-GCM
    hpke-p384               DHKEM(P-384, HKDF-SHA384)        0x0011  HKDF-SHA384  AES-256-GCM
    hpke-x25519             DHKEM(X25519, HKDF-SHA256)       0x0020  HKDF-SHA256  AES-256-GCM
    hpke-mlkem768-x25519    MLKEM768-X25519 (X-Wing)         0x647a  HKDF-SHA256  AES-256-GCM
    hpke-mlkem1024          ML-KEM-1024                      0x0042  HKDF-SHA384  AES-256-GCM

The hybrid is that of draft-ietf-hpke-pq-03 (the same as draft-connolly-cfrg-xwing-kem): it holds if
either ML-KEM-768 (FIPS 203) or X25519 (RFC 7748) holds. Keys are serialised as these documents say:
points uncompressed, the hybrid public key as ML-KEM's 1184 bytes before X25519's 32, private keys
of the hybrid and of ML-KEM as their seeds of 32 and 64 bytes.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, hpke
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keymgmt._crypto.dek import DEK_LENGTH, Dek, fill_random, wipe
from keymgmt.errors import FormatError, UnwrapFailed

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "HPKE_KINDS",
    "check_public",
    "hpke_generate",
    "hpke_open",
    "hpke_public",
    "hpke_seal",
    "hpke_split",
    "open_with_ecdh",
]

_TAG: Final = 16
_LABEL: Final = b"HPKE-v1"


@dataclass(frozen=True)
class _Kind:
    """One cipher suite and the lengths in bytes of its parts (RFC 9180, section 7.1)."""

    suite: hpke.Suite
    kem_id: int
    kdf_id: int
    enc: int
    public: int
    private: int
    kdf_hash: hashes.HashAlgorithm
    kem_hash: hashes.HashAlgorithm | None = None  # of a DHKEM alone
    curve: ec.EllipticCurve | None = None


_KDF, _AEAD = hpke.KDF, hpke.AEAD
_SHA256, _SHA384 = hashes.SHA256(), hashes.SHA384()
_SUITES: Final = {
    "hpke-p256": _Kind(
        hpke.Suite(hpke.KEM.P256, _KDF.HKDF_SHA256, _AEAD.AES_256_GCM),
        *(0x0010, 0x0001, 65, 65, 32),
        *(_SHA256, _SHA256, ec.SECP256R1()),
    ),
    "hpke-p384": _Kind(
        hpke.Suite(hpke.KEM.P384, _KDF.HKDF_SHA384, _AEAD.AES_256_GCM),
        *(0x0011, 0x0002, 97, 97, 48),
        *(_SHA384, _SHA384, ec.SECP384R1()),
    ),
    "hpke-x25519": _Kind(
        hpke.Suite(hpke.KEM.X25519, _KDF.HKDF_SHA256, _AEAD.AES_256_GCM),
        *(0x0020, 0x0001, 32, 32, 32),
        *(_SHA256, _SHA256),
    ),
    "hpke-mlkem768-x25519": _Kind(
        hpke.Suite(hpke.KEM.MLKEM768_X25519, _KDF.HKDF_SHA256, _AEAD.AES_256_GCM),
        *(0x647A, 0x0001, 1120, 1216, 32),
        _SHA256,
    ),
    "hpke-mlkem1024": _Kind(
        hpke.Suite(hpke.KEM.MLKEM1024, _KDF.HKDF_SHA384, _AEAD.AES_256_GCM),
        *(0x0042, 0x0002, 1568, 1568, 64),
        _SHA384,
    ),
}
_HYBRID: Final = "hpke-mlkem768-x25519"
_MLKEM: Final = "hpke-mlkem1024"

HPKE_KINDS: Final = tuple(_SUITES)
"""The kinds of key that can be sealed to, as recipients and mechanisms name them."""


def _suite(kind: str) -> _Kind:
    if kind not in _SUITES:
        raise FormatError(
            f"no kind of public key: {kind[:64]!r}", hint=f"known: {', '.join(HPKE_KINDS)}"
        )
    return _SUITES[kind]


def hpke_seal(kind: str, public_key: bytes, dek: Dek, info: bytes) -> bytes:
    """Encrypt ``dek`` to a public key, bound to ``info``; needs nothing but the public key.

    Returns:
        ``enc || ciphertext``: 113, 145, 80, 1168 or 1616 bytes, in the order of the table above.

    Raises:
        FormatError: the kind is unknown, or ``public_key`` is not a public key of this kind (wrong
            length, not on the curve).
    """
    public = _load_public(kind, public_key)
    try:
        return _suite(kind).suite.encrypt(dek.view(), public, info)
    except ValueError as error:
        # An X25519 key of small order gives the shared secret zero (RFC 7748, section 6.1).
        raise FormatError(f"nothing can be sealed to this {kind} public key") from error


def hpke_open(kind: str, private_key: Buffer, blob: bytes, info: bytes) -> Dek:
    """Decrypt a blob of ``hpke_seal`` with a private key in memory.

    Args:
        kind: one of ``HPKE_KINDS``.
        private_key: 32, 48, 32, 32 or 64 bytes; the caller wipes them.
        blob: ``enc || ciphertext``.
        info: the context that the blob was bound to.

    Raises:
        UnwrapFailed: the blob, ``info`` or the key is wrong.
    """
    enc, ciphertext = hpke_split(kind, blob)
    try:
        plain = _suite(kind).suite.decrypt(enc + ciphertext, _load_private(kind, private_key), info)
    except (InvalidTag, ValueError) as error:
        raise _not_authentic() from error
    return Dek(plain)


def open_with_ecdh(
    kind: str,
    z: Buffer,
    enc: bytes,
    recipient_public: bytes,
    ciphertext: bytes,
    info: bytes,
) -> Dek:
    """Decrypt given the ECDH result that a device computed from ``enc`` and its private key.

    Args:
        kind: a DHKEM kind: hpke-p256, hpke-p384 or hpke-x25519.
        z: the ECDH result, the x coordinate in full length (32, 48 or 32 bytes, zeros in front
            kept); the caller wipes it.
        enc: the ephemeral public key, from ``hpke_split``.
        recipient_public: the device's public key, from the recipient.
        ciphertext: from ``hpke_split``.
        info: the context that the blob was bound to.

    Raises:
        UnwrapFailed: one of the arguments is wrong.
        ValueError: the kind has no ECDH step, or ``z`` has the wrong length.
    """
    suite = _suite(kind)
    if suite.kem_hash is None or memoryview(z).nbytes != suite.private:
        raise ValueError(
            f"{kind} does not open with an ECDH result of {memoryview(z).nbytes} bytes"
        )
    if hmac.compare_digest(z, bytes(suite.private)):
        # An ephemeral key of small order gives a secret of zeros, which everybody knows (RFC 9180,
        # section 7.1.4, tells a recipient to check for it).
        raise _not_authentic()
    key, nonce = _key_schedule(suite, z, enc + recipient_public, info)
    plain = bytearray(DEK_LENGTH)
    try:
        if len(ciphertext) != DEK_LENGTH + _TAG:
            raise _not_authentic()
        AESGCM(key).decrypt_into(nonce, ciphertext, b"", plain)
        return Dek(plain)
    except InvalidTag as error:
        raise _not_authentic() from error
    finally:
        wipe(key)
        # decrypt_into leaves unverified bytes behind on failure, and the key on success.
        wipe(plain)


def hpke_split(kind: str, blob: bytes) -> tuple[bytes, bytes]:
    """Split a blob into ``enc`` and ciphertext; UnwrapFailed where ``enc`` is no key of ``kind``.

    A point that is not on the curve never reaches a device.
    """
    suite = _suite(kind)
    if len(blob) != suite.enc + DEK_LENGTH + _TAG:
        raise UnwrapFailed(
            f"the wrapped key has {len(blob)} bytes, and {kind} makes "
            f"{suite.enc + DEK_LENGTH + _TAG}"
        )
    enc = blob[: suite.enc]
    if suite.curve:
        try:
            _load_public(kind, enc)
        except FormatError as error:
            raise UnwrapFailed(
                "the ephemeral key in the wrapped key is not a point on the curve"
            ) from error
    return enc, blob[suite.enc :]


def hpke_generate(kind: str) -> bytearray:
    """Make a private key, serialised; the caller stores it safely and wipes it."""
    suite = _suite(kind)
    private = bytearray(suite.private)
    if suite.curve:
        number = ec.generate_private_key(suite.curve).private_numbers().private_value
        private[:] = number.to_bytes(suite.private, "big")
    else:
        # Any bytes are a key of X25519 (RFC 7748, section 5), and a seed of the other kinds.
        fill_random(private)
    return private


def hpke_public(kind: str, private_key: Buffer) -> bytes:
    """The serialised public key of a serialised private key; ValueError where that is invalid."""
    if kind == _HYBRID:
        hybrid = _expand(private_key)
        return hybrid[0].public_key().public_bytes_raw() + hybrid[1].public_key().public_bytes_raw()
    public = _load_private(kind, private_key).public_key()
    if _suite(kind).curve:
        encoded: bytes = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        return encoded
    raw: bytes = public.public_bytes_raw()
    return raw


def check_public(kind: str, public_key: bytes) -> None:
    """FormatError where ``public_key`` is not a valid public key of ``kind``."""
    _load_public(kind, public_key)


def _load_public(kind: str, data: bytes) -> Any:
    suite = _suite(kind)
    if len(data) != suite.public:
        raise FormatError(f"a public key of {kind} has {suite.public} bytes, not {len(data)}")
    try:
        if suite.curve:
            return ec.EllipticCurvePublicKey.from_encoded_point(suite.curve, data)
        if kind == _HYBRID:
            return hpke.MLKEM768X25519PublicKey(
                mlkem.MLKEM768PublicKey.from_public_bytes(data[:1184]),
                x25519.X25519PublicKey.from_public_bytes(data[1184:]),
            )
        if kind == _MLKEM:
            return mlkem.MLKEM1024PublicKey.from_public_bytes(data)
        return x25519.X25519PublicKey.from_public_bytes(data)
    except ValueError as error:
        raise FormatError(f"not a public key of {kind}") from error


def _load_private(kind: str, data: Buffer) -> Any:
    suite = _suite(kind)
    if memoryview(data).nbytes != suite.private:
        raise ValueError(f"a private key of {kind} has {suite.private} bytes")
    if suite.curve:
        return ec.derive_private_key(int.from_bytes(memoryview(data).cast("B"), "big"), suite.curve)
    if kind == _HYBRID:
        return hpke.MLKEM768X25519PrivateKey(*_expand(data))
    if kind == _MLKEM:
        return mlkem.MLKEM1024PrivateKey.from_seed_bytes(memoryview(data).cast("B"))
    return x25519.X25519PrivateKey.from_private_bytes(memoryview(data).cast("B"))


def _expand(seed: Buffer) -> tuple[mlkem.MLKEM768PrivateKey, x25519.X25519PrivateKey]:
    # X-Wing's expandDecapsulationKey: SHAKE256 of the seed gives ML-KEM's d || z, then X25519's.
    expanded = bytearray(hashlib.shake_256(seed).digest(96))
    try:
        return (
            mlkem.MLKEM768PrivateKey.from_seed_bytes(bytes(expanded[:64])),
            x25519.X25519PrivateKey.from_private_bytes(memoryview(expanded)[64:]),
        )
    finally:
        wipe(expanded)


def _key_schedule(
    suite: _Kind, z: Buffer, kem_context: bytes, info: bytes
) -> tuple[bytearray, bytes]:
    """Key and base nonce from an ECDH result: RFC 9180, sections 4.1 and 5.1, base mode."""
    kem_id = b"KEM" + suite.kem_id.to_bytes(2, "big")
    kem, kdf = suite.kem_hash, suite.kdf_hash
    assert kem is not None  # noqa: S101 - open_with_ecdh refused the other kinds
    eae_prk = _extract(kem, kem_id, b"", b"eae_prk", z)
    shared = _expand_label(kem, kem_id, eae_prk, b"shared_secret", kem_context, kem.digest_size)
    # 0x0002 is AES-256-GCM (RFC 9180, section 7.3).
    hpke_id = b"HPKE" + b"".join(n.to_bytes(2, "big") for n in (suite.kem_id, suite.kdf_id, 2))
    context = b"".join(
        [
            b"\0",  # mode_base
            _extract(kdf, hpke_id, b"", b"psk_id_hash", b""),
            _extract(kdf, hpke_id, b"", b"info_hash", info),
        ]
    )
    secret = _extract(kdf, hpke_id, bytes(shared), b"secret", b"")
    wipe(shared)
    key = _expand_label(kdf, hpke_id, secret, b"key", context, 32)
    return key, bytes(_expand_label(kdf, hpke_id, secret, b"base_nonce", context, 12))


def _extract(
    algorithm: hashes.HashAlgorithm, suite_id: bytes, salt: bytes, label: bytes, ikm: Buffer
) -> bytes:
    labeled = bytearray(_LABEL + suite_id + label)
    labeled += memoryview(ikm).cast("B")
    try:
        return HKDF.extract(algorithm, salt, labeled)
    finally:
        wipe(labeled)


def _expand_label(
    algorithm: hashes.HashAlgorithm,
    suite_id: bytes,
    prk: bytes,
    label: bytes,
    info: bytes,
    length: int,
) -> bytearray:
    labeled = length.to_bytes(2, "big") + _LABEL + suite_id + label + info
    output = bytearray(length)
    HKDFExpand(algorithm, length, labeled).derive_into(prk, output)
    return output


def _not_authentic() -> UnwrapFailed:
    return UnwrapFailed(
        "the wrapped key does not authenticate",
        hint="it was damaged, bound to another model, or made for another key of that name",
    )
