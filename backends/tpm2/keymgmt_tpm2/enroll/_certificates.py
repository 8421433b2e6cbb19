"""Check that a trusted maker certified an endorsement key.

The chain is built and checked by OpenSSL, as ``openssl verify -partial_chain`` does: makers' chains
have what a verifier for web servers refuses. What an endorsement key's certificate and its issuers
must say on top ("TCG EK Credential Profile", 3.2) is checked here.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from OpenSSL import crypto

from keymgmt.backend import IntegrityError
from keymgmt_tpm2 import _structures as s
from keymgmt_tpm2._templates import follows_a_profile
from keymgmt_tpm2.enroll._der import BASIC, KEY_USAGE, PURPOSES, elements, extensions
from keymgmt_tpm2.enroll._oaep import chain_of_oaep, is_oaep, is_of_key

__all__ = [
    "MAX_CHAIN",
    "AttestationError",
    "Maker",
    "Makers",
    "certifies",
    "check_certificate",
    "is_like",
    "load_certificate",
    "split_chain",
    "split_file",
]

MAX_CHAIN: Final = 16
_EK_CERTIFICATE: Final = x509.ObjectIdentifier("2.23.133.8.1")
_PEM: Final = re.compile(
    rb"-----BEGIN (?:TRUSTED |X509 )?CERTIFICATE-----(.*?)-----END [A-Z0-9 ]+-----", re.DOTALL
)
_UNREADABLE: Final = (
    *(ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion),
    *(x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)


@dataclass(frozen=True)
class Maker:
    """The maker that certified an endorsement key.

    Attributes:
        issuer: the name of the issuer of its certificate, RFC 4514, of printable ASCII.
        anchor: the trusted certificate in which the chain ends: SHA-256 of its DER, in hex.
    """

    issuer: str
    anchor: str


@dataclass(frozen=True)
class Makers:
    """The makers that the office trusts to certify endorsement keys.

    Attributes:
        anchors: DER certificates that are trusted, roots or intermediates.
        between: DER certificates that may stand in between, and are trusted for nothing.
        sha1: whether SHA-1 may sign below an anchor: who can make it collide forges devices.
    """

    anchors: Sequence[bytes]
    between: Sequence[bytes] = ()
    sha1: bool = False


class AttestationError(IntegrityError):
    """A statement of a device is not proved; the message names the missing link."""


def split_file(content: bytes) -> list[bytes]:
    """The certificates of a PEM or DER file, in DER; ValueError where there are none."""
    blocks = _PEM.findall(content)
    try:
        ders = [base64.b64decode(b"".join(block.split())) for block in blocks] or [content]
        for each in ders:
            crypto.load_certificate(crypto.FILETYPE_ASN1, each)
    except (crypto.Error, binascii.Error) as error:
        raise ValueError("it has no certificates in PEM or DER") from error
    return ders


def split_chain(content: bytes) -> list[bytes]:
    """DER certificates that lie one after the other; ValueError for more than 16, or for others."""
    certificates: list[bytes] = []
    while content:
        if len(certificates) == MAX_CHAIN or content[:2] != b"\x30\x82":
            raise ValueError("the chain of the TPM is none, or too long")
        end = 4 + int.from_bytes(content[2:4], "big")
        certificates += split_file(content[:end])
        content = content[end:]
    return certificates


def load_certificate(data: bytes) -> x509.Certificate:
    """A certificate as an NV index holds it, which may be larger; ValueError."""
    if len(data) < 4 or data[:2] != b"\x30\x82":
        raise ValueError("not a DER certificate")
    try:
        return x509.load_der_x509_certificate(data[: 4 + int.from_bytes(data[2:4], "big")])
    except _UNREADABLE as error:
        raise ValueError(f"not a DER certificate: {error}") from error


def is_like(certificate: x509.Certificate, template: s.Public) -> bool:
    """Whether it is of a key of this algorithm and size; ValueError as for ``certifies``."""
    if is_oaep(certificate):
        return template.kind == s.ALG_RSA
    key = _public_key(certificate)
    if isinstance(key, rsa.RSAPublicKey):
        return template.bits == key.key_size
    return (
        isinstance(key, ec.EllipticCurvePublicKey)
        and template.kind == s.ALG_ECC
        and 8 * len(template.unique[0]) == key.key_size
    )


def certifies(certificate: x509.Certificate, ek: s.Public) -> bool:
    """Whether the certificate is of this key; ValueError where the key in it cannot be read."""
    key = ek.key()
    if is_oaep(certificate) and isinstance(key, rsa.RSAPublicKey):
        return is_of_key(certificate, key)
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    return _public_key(certificate).public_bytes(*form) == key.public_bytes(*form)


def _public_key(certificate: x509.Certificate) -> CertificatePublicKeyTypes:
    try:
        return certificate.public_key()
    except _UNREADABLE as error:
        raise ValueError(f"the certificate has a key of another kind: {error}") from error


def check_certificate(certificate: bytes, ek: s.Public, makers: Makers) -> Maker:
    """Check that a trusted maker certified this endorsement key.

    Args:
        certificate: DER, as the TPM holds it (trailing bytes of its NV index are cut off).
        ek: the endorsement key that the device showed.
        makers: who is trusted.

    Raises:
        AttestationError: no chain, no EK certificate, or one of another key.
    """
    try:
        leaf = load_certificate(certificate)
        _check_leaf(leaf)
        chain = _chain(leaf, makers)
        for issuer in chain[1:]:
            _check_issuer(issuer)
        for each in chain[:-1]:
            _check_hash(each, makers.sha1)
        same = certifies(leaf, ek)
        named = leaf.issuer.rfc4514_string().encode("ascii", "replace").decode()[:200]
    except ValueError as error:
        raise AttestationError(f"no trusted manufacturer certified the TPM: {error}") from error
    if not same:
        raise AttestationError("the certificate is of another endorsement key")
    if not follows_a_profile(ek):
        raise AttestationError("the endorsement key has not the attributes of its profile")
    anchor = crypto.dump_certificate(crypto.FILETYPE_ASN1, chain[-1])
    return Maker(
        "".join(char if char.isprintable() else "?" for char in named),
        hashlib.sha256(anchor).hexdigest(),
    )


def _chain(leaf: x509.Certificate, makers: Makers) -> list[crypto.X509]:
    """From the leaf to an anchor, as OpenSSL verified it; ValueError."""
    try:
        trusted, between = (
            [crypto.load_certificate(crypto.FILETYPE_ASN1, each) for each in group]
            for group in (makers.anchors, makers.between)
        )
        if is_oaep(leaf):
            return chain_of_oaep(leaf, trusted, between, _build)
        return _build(crypto.X509.from_cryptography(leaf), trusted, between)
    except crypto.Error as error:
        raise ValueError("a certificate is not readable") from error
    except ValueError as error:
        issuer = _last_issuer(leaf, [*makers.anchors, *makers.between])
        raise ValueError(f"{error}{issuer}") from error


def _build(
    certificate: crypto.X509, trusted: Sequence[crypto.X509], between: Sequence[crypto.X509]
) -> list[crypto.X509]:
    store = crypto.X509Store()
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    for anchor in trusted:
        store.add_cert(anchor)
    try:
        return crypto.X509StoreContext(store, certificate, between).get_verified_chain()
    except crypto.X509StoreContextError as error:
        # What the error holds as its certificate may be nothing at all, so it is not looked at.
        raise ValueError(str(error)) from error


def _name(certificate: crypto.X509) -> str:
    try:
        return certificate.to_cryptography().subject.rfc4514_string() or "the TPM's certificate"
    except _UNREADABLE:
        return "a certificate in the chain"


def _last_issuer(certificate: x509.Certificate, known: Sequence[bytes]) -> str:
    """The issuer that comes after those that are known, as a maker's page lists it."""
    subjects = {}
    for each in known:
        with contextlib.suppress(*_UNREADABLE):
            issuer = x509.load_der_x509_certificate(each)
            subjects[issuer.subject] = issuer
    while certificate.issuer in subjects:
        certificate = subjects.pop(certificate.issuer)
    words = certificate.issuer.rfc4514_string()
    with contextlib.suppress(*_UNREADABLE, x509.ExtensionNotFound):
        authority = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
        if authority.value.key_identifier:
            words += f", key identifier {authority.value.key_identifier.hex()}"
    return f" (issuer {words})"


def _check_hash(certificate: crypto.X509, sha1: bool) -> None:
    """ValueError where the signature on a certificate is over a hash that can be made collide."""
    name = certificate.get_signature_algorithm().decode().lower()
    if "pss" in name:
        with contextlib.suppress(*_UNREADABLE):  # then it is not known here
            used = certificate.to_cryptography().signature_hash_algorithm
            name = used.name if used else name
    if re.search(r"sha(256|384|512)", name) or (sha1 and "sha1" in name):
        return
    raise ValueError(
        f"{_name(certificate)} is signed with {name}, which can be forged or is not known here"
        + ("; --allow-sha1 lets it through" if "sha1" in name else "")
    )


def _check_issuer(certificate: crypto.X509) -> None:
    """ValueError unless it may sign certificates of endorsement keys."""
    stated = extensions(crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate))
    if not re.fullmatch(rb"0.\x01\x01[^\0].*", stated.get(BASIC, b""), re.DOTALL):
        raise ValueError(f"{_name(certificate)} is no CA")
    usage = stated.get(KEY_USAGE)
    # A BIT STRING: unused bits, then digitalSignature (0) to keyCertSign (5) and on.
    if usage is not None and not int.from_bytes(usage[3:4], "big") & 0x04:
        raise ValueError(f"{_name(certificate)} may not sign certificates (keyUsage)")
    purposes = stated.get(PURPOSES)
    if purposes is not None:
        ((_, listed),) = elements(purposes)
        allowed = {bytes.fromhex("6781050801"), bytes.fromhex("551d2500")}
        if not allowed & {content for _, content in elements(listed)}:
            raise ValueError(f"{_name(certificate)} is a CA for other purposes (extendedKeyUsage)")


def _check_leaf(leaf: x509.Certificate) -> None:
    try:
        extensions = leaf.extensions
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound as error:
        raise ValueError(f"the certificate is not one of an endorsement key: {error}") from error
    except _UNREADABLE as error:
        raise ValueError(f"the certificate is not readable: {error}") from error
    if _EK_CERTIFICATE not in purposes:
        raise ValueError("the certificate is not one of an endorsement key")
    for extension in extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints) and value.ca:
            raise ValueError("the certificate is that of a CA, not of an endorsement key")
        if isinstance(value, x509.KeyUsage) and not (value.key_encipherment or value.key_agreement):
            raise ValueError("the certified key is not one that decrypts (keyUsage)")
