"""Keys, batches, signatures and the doctor, on a real server."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

from keymgmt.backend import (
    ConfigError,
    Dek,
    KeyNotFound,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("kind", "mechanism"),
    [
        ("aes256-gcm96", "aes256-gcm96"),
        ("chacha20-poly1305", "chacha20-poly1305"),
        ("xchacha20-poly1305", "xchacha20-poly1305"),
        ("rsa-2048", "RSA-OAEP-256"),
    ],
)
def test_every_kind_binds_its_context(make, bao, kind, mechanism):
    key = f"kind-{kind}"
    bao.transit("transit", key, kind=kind)
    provider = make(bao)
    with Dek.generate() as dek:
        wrapped = provider.wrap(key, dek, b"context")
        assert (wrapped.mechanism, wrapped.version) == (mechanism, "1")
        assert provider.unwrap(wrapped, b"context") == dek
        with pytest.raises(UnwrapFailed):
            provider.unwrap(wrapped, b"another")
        bao.do("POST", f"transit/keys/{key}/rotate", {})
        again = provider.wrap(key, dek, b"context")
        assert again.version == "2"
        for one in (wrapped, again):
            assert provider.unwrap(one, b"context") == dek
        answers = provider.unwrap_batch([(wrapped, b"context"), (again, b"x"), (again, b"context")])
        assert answers[0] == dek
        assert isinstance(answers[1], UnwrapFailed)
        assert answers[2] == dek
        made = provider.wrap_batch(key, [(dek, b"first"), (dek, b"second")])
        assert [one.version for one in made] == ["2", "2"]
        for one, context in zip(made, (b"first", b"second"), strict=True):
            assert provider.unwrap(one, context) == dek
        with pytest.raises(UnwrapFailed):
            provider.unwrap(made[0], b"second")


def test_the_servers_own_command_opens_a_blob(make, bao):
    """Without our code: the blob is Transit's ciphertext, the context its additional data."""
    with Dek.generate() as dek:
        wrapped = make(bao).wrap("model", dek, b"the context")
        answer = bao.cli(
            "write",
            "-format=json",
            "transit/decrypt/model",
            f"ciphertext={wrapped.blob.decode()}",
            f"associated_data={b64(b'the context')}",
        )
        plaintext = json.loads(answer)["data"]["plaintext"]
        assert base64.b64decode(plaintext) == bytes(dek.view())


def test_a_large_batch_over_two_keys(make, bao):
    """More than one request takes, several bad items, each failing alone and in its place."""
    provider = make(bao)
    bao.transit("transit", "batch-a", "batch-b")
    items: list[tuple[WrappedKey, bytes]] = []
    deks = []
    for number in range(430):
        key = "batch-a" if number % 3 else "batch-b"
        dek = Dek.generate()
        deks.append(dek)
        context = f"context {number}".encode()
        body = {"plaintext": b64(bytes(dek.view())), "associated_data": b64(context)}
        text = bao.do("POST", f"transit/encrypt/{key}", body)["data"]["ciphertext"]
        items.append((WrappedKey("vault", key, "1", "aes256-gcm96", text.encode()), context))
    items[0] = (items[0][0], b"wrong")
    items[7] = (replace(items[7][0], key="absent"), items[7][1])
    items[205] = (replace(items[205][0], blob=b"rubbish"), items[205][1])
    items[206] = (replace(items[206][0], backend="other"), items[206][1])
    items[429] = (replace(items[429][0], version="9"), items[429][1])
    answers = provider.unwrap_batch(items)
    bad = {0: UnwrapFailed, 7: WrongKey, 205: UnwrapFailed, 206: WrongKey, 429: WrongKey}
    for number, answer in enumerate(answers):
        if number in bad:
            assert isinstance(answer, bad[number]), (number, answer)
        else:
            assert answer == deks[number], number
    assert provider.unwrap_batch([]) == []


def test_a_large_batch_of_wraps(make, bao):
    """More than one request takes; each data key comes back in its place, for its context alone."""
    provider = make(bao)
    bao.transit("transit", "many")
    items = [(Dek.generate(), f"context {number}".encode()) for number in range(405)]
    made = provider.wrap_batch("many", items)
    opened = provider.unwrap_batch(
        [(one, context) for one, (_, context) in zip(made, items, strict=True)]
    )
    assert list(opened) == [dek for dek, _ in items]
    assert provider.wrap_batch("many", []) == []
    with pytest.raises(KeyNotFound):
        provider.wrap_batch("absent", items[:2])


def test_native_names(make, bao):
    """The config names the place; the file names only the key."""
    bao.transit("transit", "Model-KEK_2026")
    provider = make(bao, keys={"resnet50": {"name": "Model-KEK_2026"}})
    with Dek.generate() as dek:
        wrapped = provider.wrap("resnet50", dek, b"c")
        assert wrapped.key == "resnet50"
        assert b"KEK" not in wrapped.blob
        assert provider.unwrap(wrapped, b"c") == dek
    names = [info.key for info in provider.list_keys()]
    assert "resnet50" in names
    assert "Model-KEK_2026" not in names


def test_what_create_makes(make, bao):
    provider = make(bao)
    info = provider.create_key("careful", "aes256-gcm96", {"auto-rotate": "720h"})
    assert (info.newest, info.purpose, info.kind) == ("1", "wrap", "aes256-gcm96")
    assert info.versions[0].created is not None
    assert info.versions[0].created.endswith("Z")
    data = bao.do("GET", "transit/keys/careful")["data"]
    assert not data["exportable"]
    assert not data["allow_plaintext_backup"]
    assert not data["deletion_allowed"]
    assert data["auto_rotate_period"] == 720 * 3600
    assert bao.api("GET", "transit/export/encryption-key/careful")[0] == 400
    assert bao.api("DELETE", "transit/keys/careful")[0] == 400
    with pytest.raises(ConfigError, match="already"):
        provider.create_key("careful", "chacha20-poly1305", {})
    with pytest.raises(ConfigError, match="not a period"):
        provider.create_key("careless", "aes256-gcm96", {"auto-rotate": "often"})
    bao.transit("transit", "foreign", kind="aes128-gcm96")
    with pytest.raises(ConfigError, match="already"):
        provider.create_key("foreign", "aes256-gcm96", {})
    with Dek.generate() as dek, pytest.raises(UnsupportedOperation, match="aes128-gcm96"):
        provider.wrap("foreign", dek, b"c")
    assert "foreign" not in [info.key for info in provider.list_keys()]


def test_derived_keys_are_refused(make, bao):
    """They bind a context of their own, and without it nothing is encrypted."""
    bao.do("POST", "transit/keys/derived", {"type": "aes256-gcm96", "derived": True})
    with Dek.generate() as dek, pytest.raises(UnsupportedOperation, match="derived"):
        make(bao).wrap("derived", dek, b"c")


def test_an_empty_engine_has_no_keys(make, bao):
    bao.transit("empty")
    assert make(bao, mount="empty").list_keys() == []


def test_rsa_signs_where_the_config_says_so(make, bao):
    bao.transit("transit", "rsa-release", kind="rsa-2048")
    with pytest.raises(UnsupportedOperation, match="does not sign") as caught:
        make(bao).sign("rsa-release", b"message")
    assert 'purpose = "sign"' in str(caught.value.hint)
    provider = make(bao, keys={"rsa-release": {"purpose": "sign"}})
    made = provider.sign("rsa-release", b"message")
    public = serialization.load_der_public_key(made.public_key)
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    public.verify(made.signature, b"message", pss, hashes.SHA256())  # type: ignore[union-attr,call-arg,arg-type]
    with Dek.generate() as dek, pytest.raises(UnsupportedOperation, match="does not wrap"):
        provider.wrap("rsa-release", dek, b"c")


def test_a_large_message_is_signed(make, bao):
    """The manifest of a model with very many files."""
    bao.transit("transit", "large-ed", kind="ed25519")
    made = make(bao).sign("large-ed", b"m" * 3_000_000)
    public = serialization.load_der_public_key(made.public_key)
    public.verify(made.signature, b"m" * 3_000_000)  # type: ignore[union-attr,call-arg]


# The doctor.


def findings(provider: Any, key: str | None = None) -> dict[str, Any]:
    return {finding.name: finding for finding in provider.check(key).findings}


def test_doctor_of_a_good_set_up(make, bao):
    policy = """
        path "transit/decrypt/model" { capabilities = ["update"] }
        path "transit/encrypt/model" { capabilities = ["update"] }
        path "transit/keys/model" { capabilities = ["read"] }
        path "transit/config/keys" { capabilities = ["read"] }
    """
    provider = make(bao, token=bao.token(policy, ttl="1h"))
    found = findings(provider, "model")
    assert found[bao.address].detail.startswith("leader, 2.")
    assert found[f"certificate of {bao.address}"].status == "ok"
    assert "expires in" in found[f"certificate of {bao.address}"].detail
    assert "policies default" in found["login"].detail
    assert found["wrap"].status == found["unwrap"].status == "ok"
    assert found["round trip"].status == "ok"
    assert found["upsert"].status == "warning"
    assert "disable_upsert=true" in found["upsert"].hint
    assert provider.check("model").ok


def test_doctor_of_an_edge_device(make, bao):
    token = bao.token('path "transit/decrypt/model" { capabilities = ["update"] }', ttl="1h")
    provider = make(bao, token=token)
    found = findings(provider, "model")
    assert provider.check("model").ok
    assert found["wrap"].status == "skipped"
    assert found["unwrap"].status == "ok"
    assert found["round trip"].status == "skipped"


def test_doctor_warns(make, bao, new_bao):
    short = new_bao(days=5)
    short.transit("transit", "model")
    short.do("POST", "transit/keys/open", {"exportable": True})
    found = findings(make(short), "open")
    assert found[f"certificate of {short.address}"].status == "warning"
    assert found["login"].status == "warning"  # a root token
    assert found["key"].status == "warning"
    policy = """
        path "transit/encrypt/model" { capabilities = ["create", "update"] }
        path "transit/decrypt/model" { capabilities = ["update"] }
        path "transit/keys/model" { capabilities = ["read"] }
    """
    token = short.token(policy, ttl="10m", renewable=False)
    found = findings(make(short, token=token), "model")
    assert found["policy"].status == "warning"
    assert "update only" in found["policy"].hint
    assert "it cannot be renewed" in found["login"].hint


def test_doctor_of_every_bad_day(make, bao, new_bao):
    fresh = new_bao(init=False)
    health = make(fresh, token="s.none").check("model")
    assert health.findings[0].detail == "it is not initialised"
    assert not health.ok
    found = findings(make(bao, token="s.wrong"), "model")
    assert found["login"].status == "failed"
    found = findings(make(bao), "absent")
    assert found["key"].status == "failed"
    assert "keys create" in found["key"].hint
    found = findings(make(bao, mount="absent"), "model")
    assert "secrets enable" in found["key"].hint


def test_doctor_of_a_signing_key(make, bao):
    bao.transit("transit", "publisher", kind="ed25519")
    found = findings(make(bao), "publisher")
    assert found["signature"].status == "ok"
    assert "round trip" not in found
    with pytest.raises(KeyNotFound):
        make(bao).public_key("absent")


def test_rsa_is_oaep_with_sha256(make, bao):
    """As SPEC.md says, made here from the public key alone, in the shape of InnerKey."""
    from keymgmt.backend import inner_wrap

    bao.transit("transit", "rsa-spec", kind="rsa-2048")
    pem = bao.do("GET", "transit/keys/rsa-spec")["data"]["keys"]["1"]["public_key"]
    public = serialization.load_pem_public_key(pem.encode())
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)

    def wrap(inner: Dek) -> bytes:
        return public.encrypt(bytes(inner.view()), oaep)  # type: ignore[union-attr]

    with Dek.generate() as dek:
        blob = inner_wrap(dek, b"c", wrap)
        wrapped = WrappedKey("vault", "rsa-spec", "1", "RSA-OAEP-256", blob)
        assert make(bao).unwrap(wrapped, b"c") == dek
