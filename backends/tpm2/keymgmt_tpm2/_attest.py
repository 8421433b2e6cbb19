"""Is that key in a genuine TPM? The verifier's side, without a TPM.

Strategy (Part 1, 9.5.3.3): a manufacturer certifies an endorsement key (EK). A credential made for
the EK and the *name* of an attestation key (AK) is opened only by the TPM that holds both
(MakeCredential, Part 1, 24). The AK, restricted so that it signs nothing but what its TPM made,
then certifies the wrapping key over a value that needs the credential's secret. So one answer binds
certificate, AK and key; a key made in software fails at the AK, a software AK at the credential.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import verification

try:
    from cryptography.hazmat.decrepit.ciphers.modes import CFB
except ImportError:  # before it was moved there
    from cryptography.hazmat.primitives.ciphers.modes import CFB

from keymgmt.backend import IntegrityError
from keymgmt_tpm2 import _structures as s
from keymgmt_tpm2._templates import AK_ATTRIBUTES, EK_ATTRIBUTES, EK_POLICY

__all__ = [
    "AttestationError",
    "check_ak",
    "check_certificate",
    "check_certification",
    "make_credential",
]

_EK_CERTIFICATE: Final = x509.ObjectIdentifier("2.23.133.8.1")
_MAGIC: Final = 0xFF544347
_ATTEST_CERTIFY: Final = 0x8017


class AttestationError(IntegrityError):
    """What a device stated is not proved; the message says which link is missing."""


def check_certificate(
    certificate: bytes, ek: s.Public, roots: Sequence[bytes], intermediates: Sequence[bytes] = ()
) -> x509.Certificate:
    """Check that a trusted manufacturer certified this endorsement key.

    Args:
        certificate: DER, as the TPM holds it (trailing bytes of its NV index are cut off).
        ek: the endorsement key that the device showed.
        roots: DER certificates of manufacturers whom the operator trusts.
        intermediates: DER certificates in between.

    Raises:
        AttestationError: no chain, no EK certificate, or one of another key.
    """
    try:
        leaf = x509.load_der_x509_certificate(_exact_der(certificate))
        store = verification.Store([x509.load_der_x509_certificate(root) for root in roots])
        between = [x509.load_der_x509_certificate(each) for each in intermediates]
        verifier = (
            verification.PolicyBuilder()
            .store(store)
            .time(datetime.now(UTC))
            .extension_policies(ca_policy=_ca_policy(), ee_policy=_ek_policy())
            .build_client_verifier()
        )
        verifier.verify(leaf, between)
        certified = leaf.public_key()
    except (ValueError, verification.VerificationError) as error:
        raise AttestationError(f"no trusted manufacturer certified the TPM: {error}") from error
    shown = ek.der()
    if certified.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != shown:
        raise AttestationError("the certificate is of another endorsement key")
    if ek.attributes != EK_ATTRIBUTES or ek.policy != EK_POLICY:
        raise AttestationError("the endorsement key has not the attributes of its profile")
    return leaf


def _exact_der(data: bytes) -> bytes:
    # NV indices are often larger than the certificate in them.
    if len(data) < 4 or data[:2] != b"\x30\x82":
        raise ValueError("not a DER certificate")
    return data[: 4 + int.from_bytes(data[2:4], "big")]


def _ca_policy() -> verification.ExtensionPolicy:
    agnostic = verification.Criticality.AGNOSTIC
    return verification.ExtensionPolicy.permit_all().require_present(
        x509.BasicConstraints, agnostic, _is_ca
    )


def _ek_policy() -> verification.ExtensionPolicy:
    agnostic = verification.Criticality.AGNOSTIC
    policy = verification.ExtensionPolicy.permit_all()
    # The subject is empty; the subject alternative name says manufacturer, model and version.
    policy = policy.require_present(x509.SubjectAlternativeName, agnostic, None)
    return policy.require_present(x509.ExtendedKeyUsage, agnostic, _is_ek)


def _is_ca(policy: Any, certificate: x509.Certificate, extension: x509.BasicConstraints) -> None:
    del policy, certificate
    if not extension.ca:
        raise ValueError("a certificate in the chain is no CA")


def _is_ek(policy: Any, certificate: x509.Certificate, extension: x509.ExtendedKeyUsage) -> None:
    del policy, certificate
    if _EK_CERTIFICATE not in extension:
        raise ValueError("the certificate is not one of an endorsement key")


def check_ak(ak: s.Public) -> None:
    """AttestationError unless the public area is exactly that of an attestation key of ours."""
    if ak.attributes != AK_ATTRIBUTES:
        raise AttestationError(
            "the attestation key has the attributes "
            f"{s.describe_attributes(ak.attributes)}, so what it signs proves nothing"
        )
    if ak.policy or ak.scheme != s.ALG_ECDSA or ak.scheme_hash != s.ALG_SHA256 or ak.curve != 3:
        raise AttestationError("the attestation key is not ECDSA P-256 with SHA-256")


def make_credential(ek: s.Public, ak_name: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """Encrypt ``secret`` so that only the TPM with this EK and an AK of that name opens it.

    Returns:
        Credential blob (TPM2B_ID_OBJECT) and encrypted seed (TPM2B_ENCRYPTED_SECRET), without
        their length in front (Part 1, 24; Part 3, 12.6).
    """
    key = ek.key()
    if isinstance(key, rsa.RSAPublicKey):
        seed = os.urandom(32)
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"IDENTITY\0")
        encrypted = key.encrypt(seed, oaep)
    else:
        ephemeral = ec.generate_private_key(key.curve)
        z = ephemeral.exchange(ec.ECDH(), key)
        point = ephemeral.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        half = len(point) // 2
        x, y = point[1 : half + 1], point[half + 1 :]
        # KDFe (Part 1, 11.4.10.3)
        seed = s.sha256(s.u32(1), z, b"IDENTITY\0", x, ek.unique[0])
        encrypted = s.sized(x) + s.sized(y)
    encryptor = Cipher(AES(_kdfa(seed, b"STORAGE", ak_name)[:16]), CFB(bytes(16))).encryptor()
    sealed = encryptor.update(s.sized(secret)) + encryptor.finalize()
    integrity = hmac.new(_kdfa(seed, b"INTEGRITY", b""), sealed + ak_name, hashlib.sha256).digest()
    return s.sized(integrity) + sealed, encrypted


def _kdfa(key: bytes, label: bytes, context: bytes) -> bytes:
    """KDFa with SHA-256 (Part 1, 11.4.10.2), one block; AES-128 keys take half of it."""
    bits = 128 if label == b"STORAGE" else 256
    message = s.u32(1) + label + b"\0" + context + s.u32(bits)
    return hmac.new(key, message, hashlib.sha256).digest()


@dataclass(frozen=True)
class _Attest:
    """The parts of a TPMS_ATTEST that are looked at (Part 2, 10.12.12)."""

    kind: int
    extra: bytes
    name: bytes

    @classmethod
    def parse(cls, raw: bytes) -> _Attest:
        reader = s.Reader(raw)
        if reader.number(4) != _MAGIC:
            raise ValueError("a TPM did not make this statement")
        kind = reader.number(2)
        reader.sized()  # the signer's qualified name
        extra = reader.sized()
        reader.take(17 + 8)  # clock and firmware version
        if kind != _ATTEST_CERTIFY:
            return cls(kind, extra, b"")
        name = reader.sized()
        reader.sized()  # the key's qualified name
        reader.end()
        return cls(kind, extra, name)


def check_certification(
    attest: bytes, signature: bytes, ak: s.Public, key: s.Public, extra: bytes
) -> None:
    """Check that the AK certified this key, with that value in it.

    Args:
        attest: TPMS_ATTEST.
        signature: DER ECDSA signature over it.
        ak: already checked.
        key: the key that is enrolled.
        extra: what the verifier expects as qualifying data.

    Raises:
        AttestationError: any of it is not so.
    """
    public = ak.key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise AttestationError("the attestation key is not ECDSA P-256 with SHA-256")
    try:
        public.verify(signature, attest, ec.ECDSA(hashes.SHA256()))
        statement = _Attest.parse(attest)
    except InvalidSignature as error:
        raise AttestationError("the attestation key did not sign the certification") from error
    except ValueError as error:
        raise AttestationError(f"the certification is malformed: {error}") from error
    if statement.kind != _ATTEST_CERTIFY:
        raise AttestationError("the attestation key signed something other than a certification")
    if not hmac.compare_digest(statement.extra, extra):
        raise AttestationError(
            "the answer is not to this challenge: the device could not open its credential"
        )
    if statement.name != key.name:
        raise AttestationError("the attestation key certified another key")
