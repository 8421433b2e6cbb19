"""Check that a key is in a genuine TPM: the verifier's side, without a TPM.

Strategy (Part 1, 9.5.3.3): a manufacturer certifies an endorsement key (EK). A credential made for
the EK and the *name* of an attestation key (AK) is opened only by the TPM that holds both
(MakeCredential, Part 1, 24). The AK, restricted so that it signs nothing but what its TPM made,
then certifies the wrapping key over a value that needs the credential's secret. So one answer binds
certificate, AK and key; a key made in software fails at the AK, a software AK at the credential.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keymgmt_tpm2 import _structures as s
from keymgmt_tpm2._templates import AK_ATTRIBUTES
from keymgmt_tpm2.enroll._certificates import AttestationError

__all__ = [
    "ATTEST_QUOTE",
    "Statement",
    "check_ak",
    "check_certification",
    "check_statement",
    "make_credential",
]

_HASHES: Final = {"sha256": hashes.SHA256, "sha384": hashes.SHA384}
_ENDORSEMENT: Final = 0x4000000B
_MAGIC: Final = 0xFF544347
_ATTEST_CERTIFY: Final = 0x8017
ATTEST_QUOTE: Final = 0x8018


def check_ak(ak: s.Public) -> None:
    """AttestationError unless the public area is exactly that of our attestation keys."""
    if ak.attributes != AK_ATTRIBUTES:
        raise AttestationError(
            "the attestation key has the attributes "
            f"{s.describe_attributes(ak.attributes)}, so what it signs proves nothing"
        )
    named = ak.name_alg == s.ALG_SHA256 and not ak.policy
    if not named or ak.scheme != s.ALG_ECDSA or ak.scheme_hash != s.ALG_SHA256 or ak.curve != 3:
        raise AttestationError("the attestation key is not ECDSA P-256 with SHA-256")


def make_credential(ek: s.Public, ak_name: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """Encrypt ``secret`` so that only the TPM with this EK and an AK of that name opens it.

    Returns:
        Credential blob (TPM2B_ID_OBJECT) and encrypted seed (TPM2B_ENCRYPTED_SECRET), without
        their length in front (Part 1, 24; Part 3, 12.6).
    """
    key = ek.key()
    used = _HASHES[ek.name_hash]()
    if isinstance(key, rsa.RSAPublicKey):
        seed = os.urandom(used.digest_size)
        encrypted = key.encrypt(seed, padding.OAEP(padding.MGF1(used), used, b"IDENTITY\0"))
    else:
        ephemeral = ec.generate_private_key(key.curve)
        z = ephemeral.exchange(ec.ECDH(), key)
        point = ephemeral.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        half = len(point) // 2
        x, y = point[1 : half + 1], point[half + 1 :]
        # KDFe (Part 1, 11.4.10.3) is the concatenation KDF of SP 800-56A.
        seed = ConcatKDFHash(used, used.digest_size, b"IDENTITY\0" + x + ek.unique[0]).derive(z)
        encrypted = s.sized(x) + s.sized(y)
    storage = _kdfa(used, seed, b"STORAGE", ak_name, ek.symmetric_bits)
    encryptor = Cipher(AES(storage), CFB(bytes(16))).encryptor()
    sealed = encryptor.update(s.sized(secret)) + encryptor.finalize()
    integrity = _kdfa(used, seed, b"INTEGRITY", b"", 8 * used.digest_size)
    outer = hmac.digest(integrity, sealed + ak_name, used.name)
    return s.sized(outer) + sealed, encrypted


def _kdfa(used: hashes.HashAlgorithm, key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """KDFa (Part 1, 11.4.10.2), which is the counter mode of SP 800-108."""
    counter = Mode.CounterMode, bits // 8, 4, 4, CounterLocation.BeforeFixed
    return KBKDFHMAC(used, *counter, label, context, None).derive(key)


@dataclass(frozen=True)
class Statement:
    """The parts of a TPMS_ATTEST that are checked (Part 2, 10.12.12).

    Attributes:
        kind: the kind of statement, such as ``ATTEST_QUOTE``.
        signer: the qualified name of the key that signed it.
        extra: the qualifying data, which the requester chose.
        firmware: the version of the TPM's firmware, its two words in hex as ``keymgmt doctor``
            prints them.
        attested: the statement itself, whose layout depends on its kind.
    """

    kind: int
    signer: bytes
    extra: bytes
    firmware: str
    attested: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Statement:
        """Read a TPMS_ATTEST; ValueError where it is not one."""
        reader = s.Reader(raw)
        if reader.number(4) != _MAGIC:
            raise ValueError("a TPM did not make this statement")
        kind, signer, extra = reader.number(2), reader.sized(), reader.sized()
        reader.take(17)  # clock
        firmware = f"{reader.number(4):x}.{reader.number(4):x}"
        return cls(kind, signer, extra, firmware, reader.take(reader.left))


def check_statement(attest: bytes, signature: bytes, ak: s.Public, kind: str) -> Statement:
    """Check that the AK signed this, and that it is a primary key of the endorsement hierarchy.

    Args:
        attest: TPMS_ATTEST.
        signature: DER ECDSA signature over it.
        ak: already checked.
        kind: the statement in a word, for messages: "certification".

    Raises:
        AttestationError: any of it is not so.
    """
    public = ak.key()
    assert isinstance(public, ec.EllipticCurvePublicKey)  # noqa: S101 - check_ak
    try:
        public.verify(signature, attest, ec.ECDSA(hashes.SHA256()))
        statement = Statement.parse(attest)
    except InvalidSignature as error:
        raise AttestationError(f"the attestation key did not sign the {kind}") from error
    except ValueError as error:
        raise AttestationError(f"the {kind} is malformed: {error}") from error
    # Elsewhere the TPM hides the firmware version from what it signs (Part 1, 36.7). A primary
    # key's qualified name is the hash of its hierarchy and its name (Part 1, 16).
    if statement.signer != s.u16(s.ALG_SHA256) + s.sha256(s.u32(_ENDORSEMENT), ak.name):
        raise AttestationError(
            "the attestation key is not a primary key of the endorsement hierarchy"
        )
    return statement


def check_certification(
    attest: bytes, signature: bytes, ak: s.Public, key: s.Public, extra: bytes
) -> str:
    """Check that the AK certified this key, with that value in it.

    Args:
        attest: TPMS_ATTEST.
        signature: DER ECDSA signature over it.
        ak: already checked.
        key: the key that is enrolled.
        extra: what the verifier expects as qualifying data.

    Returns:
        The firmware version of the TPM.

    Raises:
        AttestationError: any of it is not so.
    """
    statement = check_statement(attest, signature, ak, "certification")
    if statement.kind != _ATTEST_CERTIFY:
        raise AttestationError("the attestation key signed something other than a certification")
    if not hmac.compare_digest(statement.extra, extra):
        raise AttestationError(
            "the answer is not to this challenge: the device could not open its credential"
        )
    try:
        reader = s.Reader(statement.attested)
        name = reader.sized()
        reader.sized()  # the key's qualified name
        reader.end()
    except ValueError as error:
        raise AttestationError(f"the certification is malformed: {error}") from error
    if name != key.name:
        raise AttestationError("the attestation key certified another key")
    return statement.firmware
