"""Certificates of endorsement keys that say RSAES-OAEP (RFC 4055, 4.1) instead of RSA.

Some makers say so because the key does nothing else. OpenSSL knows no such keys and builds no chain
from one. So it builds the chain of the issuer, and the last link is checked here: name, signature,
its algorithm, dates, critical extensions, path lengths. A chain with name constraints is refused,
as they are not looked at here. The tests compare each judgement with that on a twin that says RSA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID
from OpenSSL import crypto

from keymgmt_tpm2.enroll._der import (
    BASIC,
    NAMES,
    elements,
    extensions,
    issuer_and_subject,
    signature_algorithms,
    tbs_fields,
)

__all__ = ["chain_of_oaep", "is_oaep", "is_of_key"]

_RSAES_OAEP: Final = x509.ObjectIdentifier("1.2.840.113549.1.1.7")
_KNOWN: Final = {
    ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.CERTIFICATE_POLICIES,
    ExtensionOID.CRL_DISTRIBUTION_POINTS,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    ExtensionOID.SUBJECT_KEY_IDENTIFIER,
}


def is_oaep(certificate: x509.Certificate) -> bool:
    """Whether the certificate says that its key is for RSAES-OAEP."""
    return certificate.public_key_algorithm_oid == _RSAES_OAEP


def is_of_key(certificate: x509.Certificate, key: rsa.RSAPublicKey) -> bool:
    """Whether it is of this key; the key itself is encoded as ever."""
    fields = tbs_fields(certificate.public_bytes(Encoding.DER))
    _, (_, bits) = elements(fields[5][1])
    return bits == b"\0" + key.public_bytes(Encoding.DER, PublicFormat.PKCS1)


def chain_of_oaep(
    leaf: x509.Certificate,
    trusted: Sequence[crypto.X509],
    between: Sequence[crypto.X509],
    build: Callable[..., list[crypto.X509]],
) -> list[crypto.X509]:
    """From the leaf to an anchor; ValueError with what was wrong with the last issuer tried.

    Args:
        leaf: whose key is for RSAES-OAEP.
        trusted: the anchors.
        between: certificates that may stand in between.
        build: makes the chain of a certificate from anchors and what is between, with OpenSSL;
            ValueError where there is none.
    """
    problem = "unable to get local issuer certificate"
    wanted, _ = issuer_and_subject(leaf.public_bytes(Encoding.DER))
    # A chain ends at the first anchor, so one that signed the leaf is the whole of it.
    for issuer in (*trusted, *between):
        anchors, others = ([issuer], []) if issuer in trusted else (trusted, between)
        _, named = issuer_and_subject(_der(issuer))
        if named != wanted or not _signed(leaf, issuer):
            continue
        try:
            chain = build(issuer, anchors, others)
            _check_last_link(leaf, chain)
        except ValueError as error:
            problem = str(error)
        else:
            return [crypto.X509.from_cryptography(leaf), *chain]
    raise ValueError(problem)


def _signed(leaf: x509.Certificate, issuer: crypto.X509) -> bool:
    signature, content = leaf.signature, leaf.tbs_certificate_bytes
    try:
        key = issuer.get_pubkey().to_cryptography_key()
        how, used = leaf.signature_algorithm_parameters, leaf.signature_hash_algorithm
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(how, ec.ECDSA):
            key.verify(signature, content, how)
            return True
        if isinstance(key, rsa.RSAPublicKey) and isinstance(how, padding.PKCS1v15 | padding.PSS):
            assert used is not None  # noqa: S101 - every RSA signature has one
            key.verify(signature, content, how, used)
            return True
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, crypto.Error):
        pass
    return False


def _check_last_link(leaf: x509.Certificate, chain: Sequence[crypto.X509]) -> None:
    """ValueError where the leaf does not hold below this chain, as RFC 5280, 6.1 says."""
    # Which hash may sign is judged by the algorithm that is signed, so it must be the one used.
    signed, used = signature_algorithms(leaf.public_bytes(Encoding.DER))
    if signed != used:
        raise ValueError("the certificate names two signature algorithms")
    if not leaf.not_valid_before_utc <= datetime.now(UTC) <= leaf.not_valid_after_utc:
        raise ValueError("certificate has expired or is not yet valid")
    if any(each.critical and each.oid not in _KNOWN for each in leaf.extensions):
        raise ValueError("unhandled critical extension")
    below = 0  # authorities between the leaf and the one that is looked at
    for authority in chain:
        stated = extensions(_der(authority))
        if NAMES in stated:
            raise ValueError("name constraints, above a key for RSAES-OAEP alone")
        ((_, basic),) = elements(stated.get(BASIC, b"\x30\0"))
        limits = [int.from_bytes(content, "big") for tag, content in elements(basic) if tag == 2]
        if limits and below > limits[0]:
            raise ValueError("path length constraint exceeded")
        # One that a CA issued to itself does not count (RFC 5280, 4.2.1.9).
        issuer, subject = issuer_and_subject(_der(authority))
        below += issuer != subject


def _der(certificate: crypto.X509) -> bytes:
    return crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate)
