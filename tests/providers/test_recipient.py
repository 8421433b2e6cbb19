"""Recipient files: round trip, bounds, fingerprint, signatures, wrapping for all kinds."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from keymgmt._crypto.context_binding import inner_unwrap
from keymgmt._crypto.dek import Dek
from keymgmt._crypto.hpke import HPKE_KINDS, hpke_generate, hpke_open, hpke_public
from keymgmt._providers.data import Signature
from keymgmt._providers.recipient_file import (
    RSA_OAEP_256,
    Recipient,
    find_signer,
    plain_fingerprint,
    public_key_id,
    recipient_message,
    signatures_file,
    wrap_for,
)
from keymgmt.errors import ConfigError, FormatError, SealedModelError, UntrustedPublisher

CONTEXT = b"a context"
PRIVATE = bytes(range(1, 33))
RSA = rsa.generate_private_key(65537, 2048)


def spki(key) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def recipient(**changes) -> Recipient:
    values = {
        "kind": "hpke-p256",
        "backend": "tpm2",
        "key": "device7",
        "version": "1",
        "public_key": hpke_public("hpke-p256", PRIVATE),
        "attributes": {"policy": "PCR sha256:7, PIN"},
    }
    return Recipient(**(values | changes))


@pytest.mark.parametrize("kind", HPKE_KINDS)
def test_a_file_round_trips_and_what_is_wrapped_for_it_opens(tmp_path, kind):
    private = hpke_generate(kind)
    made = recipient(kind=kind, public_key=hpke_public(kind, private))
    made.save(tmp_path / "device7.recipient")
    loaded = Recipient.load(tmp_path / "device7.recipient")
    assert loaded == made
    dek = Dek.generate()
    wrapped = wrap_for(loaded, dek, CONTEXT)
    assert (wrapped.backend, wrapped.key, wrapped.version) == ("tpm2", "device7", "1")
    assert wrapped.mechanism == kind
    assert wrapped.params == {"pk": public_key_id(made.public_key)}
    assert hpke_open(kind, private, wrapped.blob, CONTEXT) == dek


def test_an_rsa_recipient_is_wrapped_through_an_inner_key():
    dek = Dek.generate()
    made = recipient(kind=RSA_OAEP_256, public_key=spki(RSA))
    wrapped = wrap_for(made, dek, CONTEXT)
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    opened = inner_unwrap(wrapped.blob, CONTEXT, lambda blob: Dek(RSA.decrypt(blob, oaep)))
    assert opened == dek


def test_the_fingerprint_covers_every_member():
    one = recipient()
    others = [
        recipient(backend="pkcs11"),
        recipient(key="device8"),
        recipient(version="2"),
        recipient(attributes={}),
        recipient(public_key=hpke_public("hpke-p256", PRIVATE[::-1])),
        recipient(kind="hpke-x25519", public_key=bytes(range(32))),
    ]
    assert len({r.fingerprint for r in [one, *others]}) == 7
    plain = plain_fingerprint(one.fingerprint)
    assert len(plain) == 64
    assert plain_fingerprint(one.fingerprint.replace("-", " ").upper()) == plain
    assert plain_fingerprint(one.fingerprint[:-1]) != plain


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "r"
    recipient().save(path)
    with pytest.raises(ConfigError, match="exists"):
        recipient(key="other").save(path)
    assert Recipient.load(path).key == "device7"
    recipient(key="other").save(path, force=True)
    assert Recipient.load(path).key == "other"
    with pytest.raises(ConfigError, match="No such file or directory"):
        recipient().save(tmp_path / "missing" / "r")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), "unknown member"),
        (lambda d: d.pop("version"), "has no version"),
        (lambda d: d.update(format="keymgmt.recipient/9"), "has the format"),
        (lambda d: d.update(backend="../x"), "backend name"),
        (lambda d: d.update(key="../../auth/token"), "key name"),
        (lambda d: d.update(version=""), "key version"),
        (lambda d: d.update(version=1), "not a string"),
        (lambda d: d.update(kind="hpke-p521"), "no kind of public key"),
        (lambda d: d.update(kind="RSA-OAEP-256"), "RSA"),
        (lambda d: d.update(public_key="AA=="), "65 bytes, not 1"),
        (lambda d: d.update(public_key="!"), "base64"),
        (lambda d: d.update(attributes={"A": "x"}), "attributes"),
        (lambda d: d.update(attributes={"a": 1}), "attributes"),
        (lambda d: d.update(attributes={"a": "x\x1b[2J"}), "attributes"),
        (lambda d: d.update(attributes={f"a{i}": "" for i in range(33)}), "attributes"),
        (lambda d: d.update(attributes=[]), "not an object"),
    ],
)
def test_a_file_that_is_not_right_says_what_and_where(tmp_path, change, message):
    data = json.loads(recipient().to_bytes())
    change(data)
    path = tmp_path / "bad.recipient"
    path.write_bytes(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(FormatError, match=message) as caught:
        Recipient.load(path)
    assert str(path) in str(caught.value)


def test_foreign_and_oversized_files(tmp_path):
    path = tmp_path / "r"
    content = recipient().to_bytes()
    for bad in (b"", b"{}", b"[]", b"\xff", b"[" * 30000, content + b"\n"):
        path.write_bytes(bad)
        with pytest.raises(FormatError):
            Recipient.load(path)
    path.write_bytes(b" " * 40000)
    with pytest.raises(ConfigError, match="larger than 32768 bytes"):
        Recipient.load(path)
    pretty = json.dumps(json.loads(content), indent=1).encode()
    with pytest.raises(FormatError, match="canonical"):
        Recipient.from_bytes(pretty)
    with pytest.raises(ConfigError, match="No such file"):
        Recipient.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="recipient file"):
        Recipient.load(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="regular"):
        Recipient.load(tmp_path / "fifo")


@given(st.binary(max_size=400))
def test_any_bytes_are_a_recipient_or_a_format_error(content):
    try:
        Recipient.from_bytes(content)
    except SealedModelError:
        return
    raise AssertionError("random bytes were accepted")


@given(st.integers(min_value=0), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_another_fingerprint(index, value):
    original = recipient()
    content = bytearray(original.to_bytes())
    content[index % len(content)] = value
    try:
        changed = Recipient.from_bytes(bytes(content))
    except SealedModelError:
        return
    assert (changed.fingerprint == original.fingerprint) == (changed == original)


def test_weak_rsa_is_refused():
    with pytest.raises(FormatError, match="2048"):
        recipient(kind=RSA_OAEP_256, public_key=spki(rsa.generate_private_key(65537, 1024)))
    with pytest.raises(FormatError, match="2048"):
        recipient(kind=RSA_OAEP_256, public_key=spki(ec.generate_private_key(ec.SECP256R1())))


def sign(key, message: bytes) -> Signature:
    if isinstance(key, rsa.RSAPrivateKey):
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
        return Signature(key.sign(message, pss, hashes.SHA256()), spki(key))
    if isinstance(key, ec.EllipticCurvePrivateKey):
        digest = hashes.SHA256() if key.curve.name == "secp256r1" else hashes.SHA384()
        return Signature(key.sign(message, ec.ECDSA(digest)), spki(key))
    return Signature(key.sign(message), spki(key))


SIGNERS = {
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
    "mldsa": mldsa.MLDSA65PrivateKey.generate(),
    "p256": ec.generate_private_key(ec.SECP256R1()),
    "p384": ec.generate_private_key(ec.SECP384R1()),
    "rsa": RSA,
}


@pytest.mark.parametrize("name", SIGNERS)
def test_a_signature_of_a_trusted_key_is_found(name):
    one = recipient()
    trusted = {other: spki(key) for other, key in SIGNERS.items()}
    signatures = signatures_file([sign(SIGNERS[name], recipient_message(one))])
    assert find_signer(one, signatures, trusted) == name


def test_untrusted_forged_and_foreign_signatures():
    one, key = recipient(), SIGNERS["p256"]
    trusted = {"enrolment": spki(key)}
    good = sign(key, recipient_message(one))
    with pytest.raises(UntrustedPublisher, match="nobody whom this config trusts") as caught:
        find_signer(one, signatures_file([good]), {"other": spki(SIGNERS["ed25519"])})
    assert one.fingerprint[:8] not in str(caught.value.hint)
    with pytest.raises(UntrustedPublisher, match="nobody"):
        find_signer(one, signatures_file([good]), {})
    with pytest.raises(UntrustedPublisher, match=r"signature of enrolment .* is not valid"):
        find_signer(dataclasses.replace(one, version="2"), signatures_file([good]), trusted)
    # An untrusted signature beside a trusted one harms nothing.
    both = signatures_file([sign(SIGNERS["rsa"], recipient_message(one)), good])
    assert find_signer(one, both, trusted) == "enrolment"
    # The bare file under the same key, without the type of DSSE, counts for nothing.
    bare = signatures_file([sign(key, one.to_bytes())])
    with pytest.raises(UntrustedPublisher):
        find_signer(one, bare, trusted)
    for bad in (b"", b"{}", one.to_bytes(), b" " * 40000):
        with pytest.raises(FormatError):
            find_signer(one, bad, trusted)


def test_a_trusted_key_that_cannot_sign_is_the_operators_fault():
    x = ec.generate_private_key(ec.SECP521R1())
    signatures = signatures_file([Signature(b"x", spki(x))])
    with pytest.raises(ConfigError, match="of a kind that cannot sign"):
        find_signer(recipient(), signatures, {"p521": spki(x)})
