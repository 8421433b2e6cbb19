"""A public key is the same key however it was encoded."""

from __future__ import annotations

import base64
import hashlib
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keymgmt._crypto.signatures import PublicKey
from keymgmt._providers.recipient_file import RSA_OAEP_256, Recipient
from keymgmt.errors import ConfigError, FormatError


def der(key) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def sequence(content: bytes) -> bytes:
    length = len(content)
    size = bytes([length]) if length < 128 else b"\x82" + length.to_bytes(2, "big")
    return b"\x30" + size + content


def compressed() -> tuple[bytes, bytes]:
    """P-256 with a compressed point (RFC 5480, section 2.2)."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    point = key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    algorithm = der(key)[2 : 4 + der(key)[3]]
    return der(key), sequence(algorithm + bytes([3, len(point) + 1, 0]) + point)


def rsa_as(algorithm: str) -> tuple[bytes, bytes]:
    key = der(rsa.generate_private_key(65537, 2048).public_key())
    usual = bytes.fromhex("300d06092a864886f70d0101010500")
    assert key[4:].startswith(usual)
    return key, sequence(bytes.fromhex(algorithm) + key[4 + len(usual) :])


SPELLINGS = {
    "compressed": compressed,
    "RSASSA-PSS": lambda: rsa_as("300b06092a864886f70d01010a"),
    "without NULL": lambda: rsa_as("300b06092a864886f70d010101"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_another_spelling_is_the_same_key(spelling):
    usual, other = SPELLINGS[spelling]()
    assert usual != other
    assert PublicKey(usual) == PublicKey(other)
    assert PublicKey(other).id == hashlib.sha384(usual).hexdigest()
    pem = b"-----BEGIN PUBLIC KEY-----\n%b\n-----END PUBLIC KEY-----\n" % base64.b64encode(other)
    assert PublicKey.from_pem(pem) == PublicKey(usual)


@pytest.mark.parametrize("kind", ["private key", "certificate"])
def test_a_file_beside_the_public_key_says_how_to_get_that(kind, tmp_path, require_tool):
    openssl = str(require_tool("openssl"))
    make = "req -x509 -newkey ed25519 -nodes -subj /CN=release -keyout private_key -out certificate"
    subprocess.run([openssl, *make.split()], cwd=tmp_path, check=True, capture_output=True)
    file = kind.replace(" ", "_")
    with pytest.raises(ConfigError, match=f"it holds a {kind}") as caught:
        PublicKey.from_pem((tmp_path / file).read_bytes())
    command = caught.value.hint.partition("openssl ")[2].replace("FILE", file)
    subprocess.run([openssl, *command.split()], cwd=tmp_path, check=True)
    assert PublicKey.from_pem((tmp_path / f"{file}.pub").read_bytes())


def test_what_is_no_key_has_no_id():
    with pytest.raises(ConfigError):
        PublicKey(b"\x30\x00")


@pytest.mark.parametrize("spelling", ["RSASSA-PSS", "without NULL"])
def test_a_recipient_has_one_spelling_of_its_rsa_key(spelling):
    """Its parameter pk is a hash of these bytes."""
    usual, other = SPELLINGS[spelling]()
    Recipient(RSA_OAEP_256, "tpm2", "device7", "1", usual)
    with pytest.raises(FormatError, match="RSA"):
        Recipient(RSA_OAEP_256, "tpm2", "device7", "1", other)
