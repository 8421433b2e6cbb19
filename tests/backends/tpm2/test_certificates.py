"""Chains as makers have them, judged by OpenSSL's command and by us.

What ``openssl verify -partial_chain`` takes and the rules for endorsement keys allow, we take; what
it refuses, we refuse.
"""

from __future__ import annotations

import random
import ssl
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from keymgmt_tpm2._structures import Public, sized
from keymgmt_tpm2._templates import EK_PROFILES
from keymgmt_tpm2.enroll._certificates import (
    AttestationError,
    Makers,
    certifies,
    check_certificate,
    split_file,
)
from keymgmt_tpm2.enroll._der import (
    extensions,
    issuer_and_subject,
    signature_algorithms,
    tbs_fields,
)
from OpenSSL import crypto

EK = x509.ObjectIdentifier("2.23.133.8.1")
JUDGED: list[bool] = []
# pyOpenSSL is on its way to leave making certificates to `cryptography`, which makes none of these.
pytestmark = pytest.mark.filterwarnings("ignore:X509.sign is deprecated")
# Key generation is most of the time; which key signs is not what is tested.
KEYS = [ec.generate_private_key(ec.SECP256R1()) for _ in range(4)]
EK_KEY = rsa.generate_private_key(65537, 2048)
SHOWN = Public.parse(
    EK_PROFILES["L-1"].public.head
    + sized(EK_KEY.public_key().public_numbers().n.to_bytes(256, "big"))
)


def name(text: str) -> x509.Name:
    """A name whose parts are a set, so that they have an order which DER wants."""
    parts = [(NameOID.COMMON_NAME, text), (NameOID.ORGANIZATION_NAME, "A maker")]
    both = [x509.NameAttribute(*part) for part in parts]
    return x509.Name([x509.RelativeDistinguishedName(both)])


def usage(*, signs: bool = False, decrypts: bool = False) -> x509.KeyUsage:
    off = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "data_encipherment", "key_agreement"),
            *("crl_sign", "encipher_only", "decipher_only"),
        ),
        False,
    )
    return x509.KeyUsage(key_cert_sign=signs, key_encipherment=decrypts, **off)


def issue(subject, key, issuer, signer, extensions, *, algorithm=None, days=3650):
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=days))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    made = builder.sign(signer, hashes.SHA256())
    return (
        made
        if algorithm is None
        else signed_again(made.public_bytes(Encoding.DER), signer, algorithm)
    )


def signed_again(der: bytes, signer, algorithm: str = "sha256") -> x509.Certificate:
    """A certificate with another signature: over what was changed in it, or over another hash."""
    certificate = crypto.load_certificate(crypto.FILETYPE_ASN1, der)
    certificate.sign(crypto.PKey.from_cryptography_key(signer), algorithm)
    return certificate.to_cryptography()


def der(certificate) -> bytes:
    return certificate if isinstance(certificate, bytes) else certificate.public_bytes(Encoding.DER)


def loose(certificate: x509.Certificate, place: int) -> bytes:
    """The CA of a place with its names' sets in an order that DER forbids, in DER."""
    parts = certificate.subject.rdns[0]
    first, second = (x509.Name([part]).public_bytes()[4:] for part in parts)
    content = der(certificate)
    if first + second not in content:
        first, second = second, first
    assert first + second in content
    changed = crypto.load_certificate(
        crypto.FILETYPE_ASN1, content.replace(first + second, second + first)
    )
    signer = crypto.PKey.from_cryptography_key(KEYS[max(0, place - 1)])
    changed.sign(signer, changed.get_signature_algorithm().decode().rpartition("-")[2].lower())
    return crypto.dump_certificate(crypto.FILETYPE_ASN1, changed)


def ca(place: int, *, extra=(), signs=True, is_ca=True, limit=None, algorithm=None, days=3650):
    """The CA of a place in the chain: 0 is the root, which signs itself."""
    issuer = name(f"CA {max(0, place - 1)}")
    extensions = [(x509.BasicConstraints(ca=is_ca, path_length=limit), True)]
    extensions += [(usage(signs=signs), True)] if signs is not None else []
    return issue(
        *(name(f"CA {place}"), KEYS[place].public_key(), issuer, KEYS[max(0, place - 1)]),
        *([*extensions, *extra],),
        algorithm=algorithm,
        days=days,
    )


def leaf(place: int, *, purposes=(EK,), is_ca=False, extra=(), days=3650):
    """An endorsement key's certificate, signed by the CA of a place."""
    maker = x509.Name([x509.NameAttribute(x509.ObjectIdentifier("2.23.133.2.1"), "id:41434D45")])
    extensions = [
        (x509.SubjectAlternativeName([x509.DirectoryName(maker)]), True),
        (x509.BasicConstraints(ca=is_ca, path_length=None), True),
        (usage(decrypts=True), True),
        *extra,
    ]
    extensions += [(x509.ExtendedKeyUsage(purposes), False)] if purposes else []
    key = EK_KEY.public_key()
    return issue(x509.Name([]), key, name(f"CA {place}"), KEYS[place], extensions, days=days)


def ours(certificate, anchors, between=(), **options) -> str:
    """What we say, empty if we take it."""
    groups = [list(map(der, group)) for group in (anchors, between)]
    try:
        check_certificate(der(certificate), SHOWN, Makers(*groups, **options))
    except AttestationError as error:
        return str(error)
    return ""


@pytest.fixture
def openssl(tmp_path, require_tool):
    program = require_tool("openssl", package="openssl")

    def judge(certificate, anchors, between=()) -> bool:
        for file, group in (("leaf", [certificate]), ("anchors", anchors), ("between", between)):
            pems = "".join(ssl.DER_cert_to_PEM_cert(der(each)) for each in group)
            (tmp_path / file).write_text(pems)
        command = [program, "verify", "-partial_chain", "-trusted", tmp_path / "anchors"]
        command += ["-untrusted", tmp_path / "between"] if between else []
        done = subprocess.run([*command, tmp_path / "leaf"], capture_output=True, check=False)
        return done.returncode == 0

    return judge


POLICIES = x509.CertificatePolicies([x509.PolicyInformation(x509.ObjectIdentifier("1.2.3.4"), [])])
SERVERS = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])


def test_an_intermediate_with_critical_policies(openssl):
    chain = leaf(1), [ca(0)], [ca(1, extra=[(POLICIES, True)])]
    assert openssl(*chain)
    assert ours(*chain) == ""


def test_an_intermediate_is_the_anchor(openssl):
    assert openssl(leaf(1), [ca(1)])
    assert ours(leaf(1), [ca(1)]) == ""


def test_a_missing_issuer_is_named():
    identifier = x509.AuthorityKeyIdentifier(b"\xab" * 20, None, None)
    said = ours(leaf(1, extra=[(identifier, False)]), [ca(0)])
    assert "CN=CA 1" in said
    assert "key identifier " + "ab" * 20 in said


def test_sha1_takes_an_option_that_names_it(openssl):
    chain = leaf(1), [ca(0)], [ca(1, algorithm="sha1")]
    assert openssl(*chain)
    assert "--allow-sha1" in ours(*chain)
    assert ours(*chain, sha1=True) == ""
    # The anchor's own signature is not looked at: it is trusted by itself.
    assert ours(leaf(0), [ca(0, algorithm="sha1")]) == ""


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ((leaf(1), [ca(0)], [ca(1, signs=False)]), "no trusted manufacturer"),
        ((leaf(1), [ca(0)], [ca(1, is_ca=False, signs=None)]), "no trusted manufacturer"),
        ((leaf(1), [ca(0)], [ca(1, extra=[(SERVERS, False)])]), "CA for other purposes"),
        ((leaf(1), [ca(1, extra=[(SERVERS, False)])], []), "CA for other purposes"),
        ((leaf(1), [ca(1, signs=False)], []), "no trusted manufacturer"),
        ((leaf(1), [ca(1, is_ca=False, signs=None)], []), "no trusted manufacturer"),
        ((leaf(0, is_ca=True), [ca(0)], []), "that of a CA"),
        ((leaf(0, purposes=(ExtendedKeyUsageOID.CLIENT_AUTH,)), [ca(0)], []), "not one of an end"),
        ((leaf(0, purposes=()), [ca(0)], []), "not one of an endorsement key"),
        ((leaf(0, days=-1), [ca(0)], []), "no trusted manufacturer"),
        ((leaf(2), [ca(0)], [ca(1, limit=0), ca(2)]), "no trusted manufacturer"),
    ],
)
def test_what_is_no_chain_of_an_endorsement_key(chain, said):
    assert said in ours(*chain)


def test_a_ca_that_names_our_purpose_among_its_own():
    listed = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, EK])
    anything = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
    for purposes in (listed, anything):
        assert ours(leaf(1), [ca(0)], [ca(1, extra=[(purposes, True)])]) == ""


def for_oaep(certificate, signer):
    """The same with the algorithm identifier of RSAES-OAEP, which its readers do not know."""
    content = der(certificate)
    rsa_encryption = bytes.fromhex("06092a864886f70d010101")
    assert content.count(rsa_encryption) == 1
    changed = content.replace(rsa_encryption, bytes.fromhex("06092a864886f70d010107"))
    return signed_again(changed, signer)


def test_a_key_for_oaep_alone(openssl):
    certificate = for_oaep(leaf(1), KEYS[1])
    with pytest.raises(UnsupportedAlgorithm):
        certificate.public_key()
    # This OpenSSL builds no chain from such a key, so its judgement is that on a twin.
    assert openssl(leaf(1), [ca(0)], [ca(1)])
    assert ours(certificate, [ca(0)], [ca(1)]) == ""
    assert ours(certificate, [ca(1)]) == ""
    other = rsa.generate_private_key(65537, 2048).public_key().public_numbers().n
    shown = Public.parse(SHOWN.raw[:-256] + other.to_bytes(256, "big"))
    assert certifies(certificate, SHOWN)
    assert not certifies(certificate, shown)
    with pytest.raises(AttestationError, match="of another endorsement key"):
        check_certificate(der(certificate), shown, Makers([der(ca(1))]))


def sequence(*parts: bytes) -> bytes:
    content = b"".join(parts)
    return b"\x30\x82" + len(content).to_bytes(2, "big") + content


def test_sha1_does_not_pass_under_the_name_of_another_hash():
    """What is signed says SHA-256, and the signature is over SHA-1."""
    honest = for_oaep(leaf(0), EK_KEY)
    basic = x509.BasicConstraints(ca=True, path_length=None)
    authority = issue(name("CA 0"), EK_KEY.public_key(), name("CA 0"), EK_KEY, [(basic, True)])
    content = honest.tbs_certificate_bytes
    signature = EK_KEY.sign(content, padding.PKCS1v15(), hashes.SHA1())
    sha1_with_rsa = bytes.fromhex("300d06092a864886f70d0101050500")
    forged = sequence(content, sha1_with_rsa, b"\x03\x82\1\1\0" + signature)
    assert ours(honest, [authority]) == ""
    assert "two signature algorithms" in ours(forged, [authority])
    assert "two signature algorithms" in ours(forged, [authority], sha1=True)


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (b"", tbs_fields),
        (b"\x30\0", tbs_fields),
        (sequence(sequence(b"\2\1\1")), issuer_and_subject),
        (sequence(sequence(b"\2\1\1")), signature_algorithms),
        (sequence(sequence(b"\2\1\1" * 6 + b"\xa3\4\x30\2\x30\0")), extensions),
    ],
)
def test_what_openssl_reads_and_is_no_der_is_a_value_error(content, read):
    with pytest.raises(ValueError, match=r"."):
        read(content)


OPTIONAL = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0")
NAMED = x509.NameConstraints([x509.DNSName("example")], None)


@pytest.mark.parametrize(
    ("end", "signer", "anchors", "between", "said"),
    [
        (leaf(1), 0, [ca(0)], [ca(1)], "unable to get local issuer certificate"),
        (leaf(1), 1, [ca(0)], [], "unable to get local issuer certificate (issuer CN=CA 1"),
        (leaf(1, days=-1), 1, [ca(0)], [ca(1)], "expired"),
        (leaf(1), 1, [ca(0)], [ca(1, days=-1)], "expired"),
        (leaf(1, extra=[(OPTIONAL, True)]), 1, [ca(0)], [ca(1)], "unhandled critical"),
        (leaf(1), 1, [ca(0, limit=0)], [ca(1)], "path length"),
        (leaf(1), 1, [ca(0, extra=[(NAMED, True)])], [ca(1)], "name constraints"),
        (leaf(1), 1, [ca(0)], [ca(1, signs=False)], "no trusted manufacturer"),
        (leaf(1), 1, [ca(1, signs=False)], [], "no trusted manufacturer"),
        (leaf(1), 1, [ca(0)], [ca(1, is_ca=False, signs=None)], "is no CA"),
        (leaf(1), 1, [ca(0)], [ca(1, extra=[(SERVERS, False)])], "CA for other purposes"),
        (leaf(0, is_ca=True), 0, [ca(0)], [], "that of a CA"),
    ],
)
def test_a_key_for_oaep_alone_in_a_chain_that_is_none(end, signer, anchors, between, said):
    assert said in ours(for_oaep(end, KEYS[signer]), anchors, between)


def test_a_key_for_oaep_alone_takes_what_openssl_takes_of_a_leaf(openssl):
    end = leaf(1, extra=[(OPTIONAL, False), (POLICIES, True)])
    chain = [ca(0, limit=1)], [ca(1, limit=0)]
    assert openssl(end, *chain)
    assert ours(for_oaep(end, KEYS[1]), *chain) == ""


def test_an_issuer_whose_der_is_not_strictly_ordered(openssl):
    """Its name is a set in another order than DER wants, which only OpenSSL reads."""
    content = loose(ca(1), 1)
    with pytest.raises(ValueError, match=r"InvalidSetOrdering|parsing"):
        x509.load_der_x509_certificate(content)
    assert split_file(content) == [content]
    assert openssl(leaf(1), [ca(0)], [content])
    for end in (leaf(1), for_oaep(leaf(1), KEYS[1])):
        assert ours(end, [ca(0)], [content]) == ""
        assert ours(end, [content]) == ""


def test_files_of_certificates():
    first, second = ca(0), ca(1)
    both = [der(first), der(second)]
    pem = b"a comment\n" + b"\n".join(each.public_bytes(Encoding.PEM) for each in (first, second))
    assert split_file(pem) == both
    assert split_file(both[0]) == both[:1]
    for bad in (b"", b"nonsense", pem.replace(b"MII", b"!!!"), both[0][:-5]):
        with pytest.raises(ValueError, match="no certificates in PEM or DER"):
            split_file(bad)


@pytest.mark.parametrize("seed", range(200))
def test_random_chains_are_judged_as_openssl_does(openssl, seed):
    chance = random.Random(seed)
    depth = chance.randint(0, 3)
    chosen = [None, None, "sha384", "sha512", "sha1"]

    def made(place):
        extra = [(POLICIES, chance.random() < 0.5)] if chance.random() < 0.5 else []
        authority = ca(
            place,
            extra=extra,
            signs=chance.choice([True, True, True, None, False]),
            is_ca=(is_ca := chance.random() < 0.93),
            limit=chance.choice([None, None, None, 0, 1, 3]) if is_ca else None,
            algorithm=chance.choice(chosen),
            days=-1 if chance.random() < 0.04 else 3650,
        )
        return loose(authority, place) if chance.random() < 0.25 else authority

    authorities = [made(place) for place in range(depth + 1)]
    chance.shuffle(authorities)
    count = chance.randint(1, len(authorities))
    anchors, between = authorities[:count], authorities[count:]
    end = leaf(depth)
    judged = openssl(end, anchors, between)
    assert (ours(end, anchors, between, sha1=True) == "") == judged
    # OpenSSL's command reads no key for OAEP alone; what it says of the same with RSA holds for it.
    alone = for_oaep(end, KEYS[depth])
    assert (ours(alone, anchors, between, sha1=True) == "") == judged
    JUDGED.append(judged)


def test_the_random_chains_were_of_both_sorts():
    if len(JUDGED) < 200:
        pytest.skip("only after all of them")
    assert 40 < sum(JUDGED) < 160
