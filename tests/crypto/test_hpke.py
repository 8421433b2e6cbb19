"""Sealing to public keys: the vectors of RFC 9180 and of the hybrid's draft, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.bindings._rust import openssl
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keymgmt._crypto import hpke as ours
from keymgmt._crypto.dek import Dek
from keymgmt._crypto.hpke import (
    HPKE_KINDS,
    hpke_generate,
    hpke_open,
    hpke_public,
    hpke_seal,
    hpke_split,
    open_with_ecdh,
)
from keymgmt.errors import FormatError, UnwrapFailed

VECTORS = Path(__file__).parents[1] / "vectors" / "hpke"
CONTEXT = b"context of a test"
ECDH_KINDS = ["hpke-p256", "hpke-p384", "hpke-x25519"]


def vectors(name: str) -> list[dict[str, bytes]]:
    loaded = json.loads((VECTORS / name).read_text())["vectors"]
    return [
        {k: v if k == "kind" else bytes.fromhex(v) for k, v in vector.items()} for vector in loaded
    ]


def exchange(kind: str, private: bytes, peer: bytes) -> bytes:
    """What a device would compute."""
    if kind == "hpke-x25519":
        key = x25519.X25519PrivateKey.from_private_bytes(private)
        return key.exchange(x25519.X25519PublicKey.from_public_bytes(peer))
    curve = ec.SECP256R1() if kind == "hpke-p256" else ec.SECP384R1()
    secret = ec.derive_private_key(int.from_bytes(private, "big"), curve)
    return secret.exchange(ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(curve, peer))


@pytest.mark.parametrize("vector", vectors("rfc9180.json"), ids=lambda v: v["kind"])
def test_key_schedule_gives_the_values_of_rfc_9180(vector):
    kind = vector["kind"]
    z = exchange(kind, vector["skRm"], vector["enc"])
    key, nonce = ours._key_schedule(
        ours._SUITES[kind], z, vector["enc"] + vector["pkRm"], vector["info"]
    )
    assert key == vector["key"]
    assert nonce == vector["base_nonce"]
    assert AESGCM(key).decrypt(nonce, vector["ct"], vector["aad"]) == vector["pt"]


@pytest.mark.parametrize("vector", vectors("rfc9180.json"), ids=lambda v: v["kind"])
def test_the_library_opens_the_vectors_of_rfc_9180_with_our_suites(vector):
    kind = vector["kind"]
    plain = openssl.hpke._decrypt_with_aad(
        ours._SUITES[kind].suite,
        vector["enc"] + vector["ct"],
        ours._load_private(kind, vector["skRm"]),
        vector["info"],
        vector["aad"],
    )
    assert plain == vector["pt"]
    assert hpke_public(kind, vector["skRm"]) == vector["pkRm"]


def test_hybrid_is_the_one_of_the_draft():
    vector, _ = vectors("hpke-pq.json")
    # The draft has no vector with AES-256-GCM; the KEM and its identifier are what is pinned here.
    suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
    plain = openssl.hpke._decrypt_with_aad(
        suite,
        vector["enc"] + vector["ct"],
        ours._load_private(vector["kind"], vector["skRm"]),
        vector["info"],
        vector["aad"],
    )
    assert plain == vector["pt"]
    assert hpke_public(vector["kind"], vector["skRm"]) == vector["pkRm"]


def test_ml_kem_is_the_one_of_the_draft():
    _, vector = vectors("hpke-pq.json")
    plain = openssl.hpke._decrypt_with_aad(
        ours._SUITES["hpke-mlkem1024"].suite,
        vector["enc"] + vector["ct"],
        ours._load_private(vector["kind"], vector["skRm"]),
        vector["info"],
        vector["aad"],
    )
    assert plain == vector["pt"]
    assert hpke_public(vector["kind"], vector["skRm"]) == vector["pkRm"]


@pytest.mark.parametrize("kind", HPKE_KINDS)
def test_round_trip(kind):
    private = hpke_generate(kind)
    dek = Dek.generate()
    blob = hpke_seal(kind, hpke_public(kind, private), dek, CONTEXT)
    assert hpke_open(kind, private, blob, CONTEXT) == dek
    assert hpke_seal(kind, hpke_public(kind, private), dek, CONTEXT) != blob


@pytest.mark.parametrize("kind", ECDH_KINDS)
def test_an_ecdh_result_opens_what_was_sealed(kind):
    private = hpke_generate(kind)
    public = hpke_public(kind, private)
    dek = Dek.generate()
    enc, ciphertext = hpke_split(kind, hpke_seal(kind, public, dek, CONTEXT))
    z = exchange(kind, private, enc)
    assert open_with_ecdh(kind, z, enc, public, ciphertext, CONTEXT) == dek
    other = hpke_public(kind, hpke_generate(kind))
    for wrong in (
        (bytes(len(z)), enc, public, ciphertext, CONTEXT),
        (z, other, public, ciphertext, CONTEXT),
        (z, enc, other, ciphertext, CONTEXT),
        (z, enc, public, ciphertext[:-1] + bytes([ciphertext[-1] ^ 1]), CONTEXT),
        (z, enc, public, ciphertext[:-1], CONTEXT),
        (z, enc, public, ciphertext, b"another context"),
    ):
        with pytest.raises(UnwrapFailed):
            open_with_ecdh(kind, *wrong)


def test_a_short_ecdh_result_is_a_programming_error():
    private = hpke_generate("hpke-p256")
    public = hpke_public("hpke-p256", private)
    enc, ciphertext = hpke_split("hpke-p256", hpke_seal("hpke-p256", public, Dek.generate(), b""))
    with pytest.raises(ValueError, match="31 bytes"):
        open_with_ecdh("hpke-p256", bytes(31), enc, public, ciphertext, b"")
    with pytest.raises(ValueError, match="does not open"):
        open_with_ecdh("hpke-mlkem768-x25519", bytes(32), enc, public, ciphertext, b"")


@pytest.mark.parametrize("kind", HPKE_KINDS)
def test_every_wrong_part_is_one_error(kind):
    private = hpke_generate(kind)
    blob = hpke_seal(kind, hpke_public(kind, private), Dek.generate(), CONTEXT)
    tampered = [bytes([*blob[:i], blob[i] ^ 1, *blob[i + 1 :]]) for i in (1, len(blob) - 1)]
    for wrong in (*tampered, blob[:-1], blob + b"\0", b"", bytes(len(blob))):
        with pytest.raises(UnwrapFailed):
            hpke_open(kind, private, wrong, CONTEXT)
    with pytest.raises(UnwrapFailed):
        hpke_open(kind, private, blob, b"another context")
    with pytest.raises(UnwrapFailed):
        hpke_open(kind, hpke_generate(kind), blob, CONTEXT)


@pytest.mark.parametrize("kind", HPKE_KINDS)
def test_what_is_no_public_key_is_refused(kind):
    public = hpke_public(kind, hpke_generate(kind))
    for wrong in (public[:-1], public + b"\0", b""):
        with pytest.raises(FormatError, match="bytes"):
            hpke_seal(kind, wrong, Dek.generate(), CONTEXT)


def test_a_point_off_the_curve_is_refused():
    public = bytearray(hpke_public("hpke-p256", hpke_generate("hpke-p256")))
    public[-1] ^= 1
    with pytest.raises(FormatError, match="not a public key"):
        hpke_seal("hpke-p256", bytes(public), Dek.generate(), CONTEXT)
    with pytest.raises(UnwrapFailed, match="point"):
        hpke_split("hpke-p256", bytes(public) + bytes(48))


def test_the_all_zero_x25519_key_is_refused():
    with pytest.raises(FormatError):
        hpke_seal("hpke-x25519", bytes(32), Dek.generate(), CONTEXT)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(FormatError) as caught:
        hpke_seal("hpke-p521", bytes(133), Dek.generate(), CONTEXT)
    assert "hpke-p256" in str(caught.value.hint)


def test_an_ephemeral_key_of_small_order_is_refused_where_a_device_computed_the_secret():
    """Zeros for a shared secret, by which anybody could have sealed this (RFC 9180, 7.1.4)."""
    private = hpke_generate("hpke-x25519")
    public, dek = hpke_public("hpke-x25519", private), Dek.generate()
    for enc in (bytes(32), b"\1" + bytes(31)):
        key, nonce = ours._key_schedule(
            ours._SUITES["hpke-x25519"], bytes(32), enc + public, CONTEXT
        )
        sealed = AESGCM(key).encrypt(nonce, dek.view(), b"")
        with pytest.raises(UnwrapFailed):
            open_with_ecdh("hpke-x25519", bytes(32), enc, public, sealed, CONTEXT)
        with pytest.raises(UnwrapFailed):
            hpke_open("hpke-x25519", private, enc + sealed, CONTEXT)
