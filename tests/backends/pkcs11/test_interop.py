"""OpenSC's pkcs11-tool and plain python-pkcs11 on the same keys, with the documents alone."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)
from programs import run_python

from keymgmt.backend import Dek, UnsupportedOperation

CONTEXT = b"the context of a wrap"


@pytest.fixture
def token(new_token, require_tool) -> Any:
    require_tool("pkcs11-tool", package="opensc")
    return new_token("interop")


@pytest.mark.parametrize(
    ("arguments", "kind", "mechanism"),
    [
        ("--keygen --key-type AES:32 --usage-decrypt --sensitive", "aes256", "AES-GCM"),
        ("--keygen --key-type AES:32 --usage-wrap --sensitive", "aes256-kw", "AES-KWP"),
        ("--keypairgen --key-type EC:prime256v1 --usage-derive", "ecdh-p256", "hpke-p256"),
        ("--keypairgen --key-type EC:secp384r1 --usage-derive", "ecdh-p384", "hpke-p384"),
        ("--keypairgen --key-type rsa:2048 --usage-decrypt", "rsa-oaep", "RSA-OAEP"),
    ],
)
def test_a_key_of_pkcs11_tool_wraps(token, arguments, kind, mechanism):
    token.tool(*arguments.split(), "--private", "--label", "theirs", "--id", "0a01")
    provider = token.provider(allow_oaep_sha1=True)
    # SoftHSM adds usages that nobody asked for.
    with Dek.generate() as dek, pytest.raises(UnsupportedOperation, match="it may also"):
        provider.wrap("theirs", dek, CONTEXT)
    assert not provider.check("theirs").ok
    assert provider.restrict_key("theirs", kind).kind == kind
    assert provider.check("theirs").ok
    with Dek.generate() as dek:
        wrapped = provider.wrap("theirs", dek, CONTEXT)
        assert (wrapped.mechanism, wrapped.version) == (mechanism, "0a01")
        assert provider.unwrap(wrapped, CONTEXT) == dek
        # A version of ours after theirs, of the same kind; theirs still opens.
        assert provider.rotate_key("theirs").versions[0].version == "0a01"
        assert provider.wrap("theirs", dek, CONTEXT).version != "0a01"
        assert provider.unwrap(wrapped, CONTEXT) == dek


@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1"])
def test_a_key_of_pkcs11_tool_signs(token, curve):
    token.tool("--keypairgen", "--key-type", f"EC:{curve}", "--usage-sign", "--label", "pub")
    made = token.provider().sign("pub", b"message")
    key = load_der_public_key(made.public_key)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    digest = hashes.SHA256() if curve == "prime256v1" else hashes.SHA384()
    key.verify(made.signature, b"message", ec.ECDSA(digest))


def test_pkcs11_tool_sees_our_keys(token):
    provider = token.provider()
    info = provider.create_key("ours", "aes256", {})
    listed = token.tool("--list-objects", "--type", "secrkey")
    assert "ours" in listed
    assert info.newest in listed
    assert "never extractable" in listed
    token.tool("--delete-object", "--type", "secrkey", "--id", info.newest)
    assert provider.list_keys() == []


PLAIN = """
import sys, pkcs11
module, label, pin, version, blob, context = sys.argv[1:]
blob, context = bytes.fromhex(blob), bytes.fromhex(context)
token = pkcs11.lib(module).get_token(token_label=label)
with token.open(user_pin=pin) as session:
    key = session.get_key(id=bytes.fromhex(version), object_class=pkcs11.ObjectClass.SECRET_KEY)
    print(key.decrypt(blob[12:], mechanism=pkcs11.Mechanism.AES_GCM,
                      mechanism_param=pkcs11.GCMParams(blob[:12], context, 128)).hex())
"""


def test_plain_python_pkcs11_opens_aes_gcm(token):
    provider = token.provider()
    provider.create_key("k", "aes256", {})
    with Dek.generate() as dek:
        wrapped = provider.wrap("k", dek, CONTEXT)
        arguments = (str(token.module), token.label, token.pin, wrapped.version)
        done = run_python(PLAIN, *arguments, wrapped.blob.hex(), CONTEXT.hex(), check=True)
        assert bytes.fromhex(done.stdout.strip()) == dek.view()


def test_pkcs11_tool_opens_rsa_oaep(token, tmp_path):
    provider = token.provider(allow_oaep_sha1=True)
    provider.create_key("k", "rsa-oaep", {"bits": "2048"})
    with Dek.generate() as dek:
        wrapped = provider.wrap("k", dek, CONTEXT)
        # InnerKey: length (2), the wrapped inner key, nonce (12), ciphertext and tag (48).
        length = int.from_bytes(wrapped.blob[:2], "big")
        inner, rest = wrapped.blob[2 : 2 + length], wrapped.blob[2 + length :]
        (tmp_path / "in").write_bytes(inner)
        token.tool(
            *("--decrypt", "--mechanism", "RSA-PKCS-OAEP", "--hash-algorithm", "SHA-1"),
            *("--mgf", "MGF1-SHA1", "--id", wrapped.version),
            *("--input-file", str(tmp_path / "in"), "--output-file", str(tmp_path / "out")),
        )
        key = (tmp_path / "out").read_bytes()
        assert AESGCM(key).decrypt(rest[:12], rest[12:], CONTEXT) == dek.view()


def test_pkcs11_tool_opens_hpke(token, tmp_path):
    provider = token.provider()
    provider.create_key("k", "ecdh-p256", {})
    recipient = provider.export_recipient("k")
    with Dek.generate() as dek:
        wrapped = provider.wrap("k", dek, CONTEXT)
        enc, ciphertext = wrapped.blob[:65], wrapped.blob[65:]
        ephemeral = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), enc)
        (tmp_path / "enc").write_bytes(
            ephemeral.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        )
        token.tool(
            *("--derive", "--mechanism", "ECDH1-DERIVE", "--id", wrapped.version),
            *("--input-file", str(tmp_path / "enc"), "--output-file", str(tmp_path / "z")),
        )
        z = (tmp_path / "z").read_bytes()
        assert _hpke_open(z, enc, recipient.public_key, ciphertext, CONTEXT) == dek.view()


def _hpke_open(z: bytes, enc: bytes, public: bytes, ciphertext: bytes, info: bytes) -> bytes:
    """RFC 9180 base mode for (0x0010, 0x0001, 0x0002), written from the RFC."""
    kem, suite = b"KEM\x00\x10", b"HPKE\x00\x10\x00\x01\x00\x02"

    def mac(key: bytes, message: bytes) -> bytes:
        return hmac.new(key, message, hashlib.sha256).digest()

    def extract(salt: bytes, suite_id: bytes, label: bytes, ikm: bytes) -> bytes:
        return mac(salt or bytes(32), b"HPKE-v1" + suite_id + label + ikm)

    def expand(prk: bytes, suite_id: bytes, label: bytes, text: bytes, length: int) -> bytes:
        return mac(prk, length.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + text + b"\x01")[
            :length
        ]

    prk = extract(b"", kem, b"eae_prk", z)
    shared = expand(prk, kem, b"shared_secret", enc + public, 32)
    schedule = (
        b"\0" + extract(b"", suite, b"psk_id_hash", b"") + extract(b"", suite, b"info_hash", info)
    )
    secret = extract(shared, suite, b"secret", b"")
    key = expand(secret, suite, b"key", schedule, 32)
    nonce = expand(secret, suite, b"base_nonce", schedule, 12)
    return AESGCM(key).decrypt(nonce, ciphertext, b"")
