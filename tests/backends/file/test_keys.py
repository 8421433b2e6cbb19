"""What is particular to keys in files: the format, and what is wrapped by whom."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from bits import flipped
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PublicKey, MLDSA87PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from cryptography.hazmat.primitives.serialization import load_der_public_key
from keymgmt_file import FileProvider

from keymgmt.backend import (
    ConfigError,
    Dek,
    KeymgmtError,
    KeyNotFound,
    KeyRetired,
    ProviderError,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    wrap_for,
)

Open = Callable[..., FileProvider]
HPKE = ["hpke-p256", "hpke-p384", "hpke-x25519", "hpke-mlkem768-x25519", "hpke-mlkem1024"]


def jwks(path: Path, key: str) -> dict:
    return json.loads((path / f"{key}.jwks").read_text())


def decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def test_a_wrap_is_what_the_manual_says(files, path):
    files.create_key("release", "aes256", {})
    jwk = jwks(path, "release")["keys"][0]
    salt, dek, context = os.urandom(32), os.urandom(32), b"bound to this"
    info = b"keymgmt-file wrap 1"
    for part in (b"release", b"1", context):
        info += len(part).to_bytes(4, "big") + part
    key = HKDF(SHA384(), 32, salt, info).derive(decode(jwk["k"]))
    blob = salt + AESGCM(key).encrypt(bytes(12), dek, context)
    mark = HKDFExpand(SHA384(), 8, b"keymgmt-file recogniser 1" + salt).derive(decode(jwk["k"]))

    params = {"recogniser": mark.hex()}
    wrapped = WrappedKey("file", "release", "1", "HKDF-SHA384-A256GCM", blob, params)
    assert files.unwrap(wrapped, context) == Dek(dek)


def test_a_wrap_is_recognised_by_its_holder_alone(files, open_store, tmp_path, monkeypatch):
    files.create_key("release", "aes256", {})
    another = open_store(at=tmp_path / "another site")
    another.create_key("release", "aes256", {})
    with Dek.generate() as dek:
        wraps = [files.wrap("release", dek, b"") for _ in range(32)]
        assert len({wrapped.params["recogniser"] for wrapped in wraps}) == 32, "nothing links two"
        with monkeypatch.context() as patch:
            patch.setattr("keymgmt_file._wrapping.AESGCM", None)  # known without decrypting
            with pytest.raises(WrongKey, match="another key of that name"):
                another.unwrap(wraps[0], b"")
        # Held, and bound to something else: that is no other key.
        with pytest.raises(UnwrapFailed):
            files.unwrap(wraps[0], b"another context")
        for params in ({}, {"pk": "00"}, {**wraps[0].params, "more": "1"}):
            with pytest.raises(UnwrapFailed, match="malformed"):
                files.unwrap(dataclasses.replace(wraps[0], params=params), b"")


def test_among_thousands_of_sites_with_a_key_of_one_name(files, open_store, tmp_path):
    """Every site has made its own `release`, and opens what is sealed to all of them."""
    files.create_key("release", "aes256", {})
    another = open_store(at=tmp_path / "another site")
    another.create_key("release", "aes256", {})
    with Dek.generate() as dek:
        theirs = another.wrap("release", dek, b"")
        for _ in range(1000):
            with pytest.raises(WrongKey):
                files.unwrap(theirs, b"")
        assert files.unwrap(files.wrap("release", dek, b""), b"") == dek


def test_no_two_wraps_share_a_salt(files):
    files.create_key("release", "aes256", {})
    with Dek.generate() as dek:
        salts = {files.wrap("release", dek, b"").blob[:32] for _ in range(64)}
    assert len(salts) == 64


@pytest.mark.parametrize(
    ("kind", "load"),
    [
        ("ed25519", lambda jwk: Ed25519PublicKey.from_public_bytes(decode(jwk["x"]))),
        ("ml-dsa-65", lambda jwk: MLDSA65PublicKey.from_public_bytes(decode(jwk["pub"]))),
        ("ml-dsa-87", lambda jwk: MLDSA87PublicKey.from_public_bytes(decode(jwk["pub"]))),
    ],
)
def test_a_publisher_key_is_a_jwk_that_others_read(files, path, kind, load):
    files.create_key("publisher", kind, {})
    made = files.sign("publisher", b"a manifest")
    load(jwks(path, "publisher")["keys"][0]).verify(made.signature, b"a manifest")
    assert made.public_key == files.public_key("publisher")
    load_der_public_key(made.public_key).verify(made.signature, b"a manifest")

    files.rotate_key("publisher")
    newer = files.sign("publisher", b"a manifest")
    assert newer.public_key == files.public_key("publisher") != made.public_key
    load(jwks(path, "publisher")["keys"][1]).verify(newer.signature, b"a manifest")


@pytest.mark.parametrize("kind", HPKE)
def test_others_seal_with_the_recipient_alone(files, open_store, path, kind):
    files.create_key("device", kind, {})
    recipient = files.export_recipient("device")
    another = open_store(at=path.parent / "another device")
    another.create_key("device", kind, {})
    with Dek.generate() as dek:
        sealed = wrap_for(recipient, dek, b"context")
        assert files.unwrap(sealed, b"context") == dek
        assert files.unwrap(files.wrap("device", dek, b"context"), b"context") == dek
        with pytest.raises(WrongKey, match="another key of that name"):
            another.unwrap(sealed, b"context")
        with pytest.raises(UnwrapFailed):
            files.unwrap(sealed, b"another context")
        with pytest.raises(UnwrapFailed):
            files.unwrap(dataclasses.replace(sealed, params={}), b"context")
        with pytest.raises(UnwrapFailed):
            files.unwrap(dataclasses.replace(sealed, blob=sealed.blob[:-1]), b"context")
        for index in (0, len(sealed.blob) // 2, len(sealed.blob) - 1):
            with pytest.raises(UnwrapFailed):
                files.unwrap(
                    dataclasses.replace(sealed, blob=flipped(sealed.blob, index)), b"context"
                )

        files.rotate_key("device")
        assert files.export_recipient("device").version == "2"
        assert files.unwrap(sealed, b"context") == dek
        with pytest.raises(WrongKey):
            files.unwrap(dataclasses.replace(sealed, version="2"), b"context")


def test_a_key_without_a_public_part_is_not_exported(files):
    files.create_key("release", "aes256", {})
    with pytest.raises(UnsupportedOperation) as caught:
        files.export_recipient("release")
    assert "hpke-x25519" in str(caught.value.hint)


def test_a_wrap_opens_under_no_other_name_version_or_mechanism(files, path):
    files.create_key("release", "aes256", {})
    content = (path / "release.jwks").read_text()
    one = json.loads(content)["keys"][0]
    # The same material under another name and another version.
    (path / "copy.jwks").touch(mode=0o600)
    (path / "copy.jwks").write_text(content)
    (path / "release.jwks").write_text(json.dumps({"keys": [one, {**one, "kid": "2"}]}))
    with Dek.generate() as dek:
        wrapped = files.wrap("release", dek, b"")
        assert (wrapped.version, len(wrapped.blob)) == ("2", 80)
        with pytest.raises(UnwrapFailed):
            files.unwrap(dataclasses.replace(wrapped, version="1"), b"")
        with pytest.raises(UnwrapFailed):
            files.unwrap(dataclasses.replace(wrapped, key="copy", version="1"), b"")
        with pytest.raises(UnsupportedOperation):
            files.unwrap(dataclasses.replace(wrapped, mechanism="hpke-p256"), b"")
        with pytest.raises(UnwrapFailed):
            files.unwrap(dataclasses.replace(wrapped, params={"pk": "00"}), b"")


def test_a_retired_version_comes_back_by_hand(files, path):
    files.create_key("release", "aes256", {})
    with Dek.generate() as dek:
        wrapped = files.wrap("release", dek, b"")
        files.rotate_key("release")
        assert files.unwrap(wrapped, b"") == dek
        states = [each.state for each in files.retire_version("release", "1").versions]
        assert states == ["retired", "active"]
        with pytest.raises(KeyRetired):
            files.unwrap(wrapped, b"")
        once = (path / "release.jwks").read_text()
        files.retire_version("release", "1")
        assert (path / "release.jwks").read_text() == once

        data = jwks(path, "release")
        del data["keys"][0]["revoked"]
        (path / "release.jwks").write_text(json.dumps(data))
        assert files.unwrap(wrapped, b"") == dek

        # Deleted by hand is final, and versions are never counted anew.
        del data["keys"][0]
        (path / "release.jwks").write_text(json.dumps(data))
        with pytest.raises(WrongKey):
            files.unwrap(wrapped, b"")
        assert files.rotate_key("release").newest == "3"


def test_members_of_others_survive_a_change(files, path):
    files.create_key("release", "aes256", {})
    data = jwks(path, "release")
    data["note"] = "kept in safe 4"
    data["keys"][0]["x-label"] = "2026"
    (path / "release.jwks").write_text(json.dumps(data))
    files.rotate_key("release")
    files.retire_version("release", "1")
    after = jwks(path, "release")
    assert after["note"] == "kept in safe 4"
    assert after["keys"][0]["x-label"] == "2026"


@pytest.mark.parametrize("kind", HPKE)
def test_nothing_is_sealed_to_a_public_key_that_is_not_the_secrets(files, open_store, path, kind):
    files.create_key("device", kind, {})
    another = open_store(at=path.parent / "another device")
    another.create_key("device", kind, {})
    mine, theirs = jwks(path, "device"), jwks(path.parent / "another device", "device")
    public = next(name for name in ("x", "pub") if name in mine["keys"][0])
    for value in (theirs["keys"][0][public], "AA", 7, None):
        mine["keys"][0][public] = value
        (path / "device.jwks").write_text(json.dumps(mine))
        for call in (
            lambda: files.wrap("device", Dek.generate(), b""),
            lambda: files.export_recipient("device"),
        ):
            with pytest.raises(ProviderError, match="damaged"):
                call()


def test_a_key_out_of_range_is_damage(files, path):
    files.create_key("device", "hpke-p256", {})
    wrapped = wrap_for(files.export_recipient("device"), Dek.generate(), b"")
    data = jwks(path, "device")
    data["keys"][0]["d"] = base64.urlsafe_b64encode(b"\xff" * 32).rstrip(b"=").decode()
    (path / "device.jwks").write_text(json.dumps(data))
    with pytest.raises(ProviderError):
        files.unwrap(wrapped, b"")
    (path / "versions.json").unlink()
    with pytest.raises(ProviderError, match="damaged"):
        files.wrap("device", Dek.generate(), b"")


def test_hints_name_the_way_out(files):
    files.create_key("release", "aes256", {})
    files.create_key("publisher", "ed25519", {})
    for call, error, hint in (
        (lambda: files.describe_key("relase"), KeyNotFound, "did you mean local:release"),
        (lambda: files.describe_key("zzz"), KeyNotFound, "keymgmt keys create local:zzz"),
        (lambda: files.create_key("x", "aes-256", {}), ConfigError, "'aes256'"),
        (lambda: files.create_key("x", "rsa", {}), ConfigError, "kinds: aes256"),
        (lambda: files.create_key("release", "aes256", {}), ConfigError, "keys rotate"),
        (lambda: files.retire_version("release", "1"), ConfigError, "keys rotate"),
        (lambda: files.retire_version("release", "9"), KeyNotFound, "versions: 1"),
        (lambda: files.sign("release", b""), UnsupportedOperation, "one purpose"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert hint in str(caught.value.hint)
    with pytest.raises(ConfigError, match="no option 'bits'"):
        files.create_key("x", "aes256", {"bits": "4096"})
    assert [info.key for info in files.list_keys()] == ["publisher", "release"]


def test_check_makes_a_round_trip(files):
    for kind in files.key_kinds:
        files.create_key(f"key-{kind}", kind, {})
        assert files.check(f"key-{kind}").ok, kind
    assert files.check().ok
    assert not files.check("missing").ok


def test_nothing_secret_is_shown(files, path, caplog):
    caplog.set_level(logging.DEBUG)
    for kind in files.key_kinds:
        files.create_key(f"key-{kind}", kind, {})
    members = [jwks(path, f"key-{kind}")["keys"][0] for kind in files.key_kinds]
    secrets = [jwk[name] for jwk in members for name in ("k", "d", "priv") if name in jwk]
    assert len(secrets) == len(files.key_kinds)
    shown = repr(files) + repr(files.list_keys()) + repr(files.check()) + caplog.text
    for call in (lambda: files.describe_key("x"), lambda: files.retire_version("key-aes256", "1")):
        try:
            call()
        except KeymgmtError as error:
            shown += "".join(traceback.format_exception(error))
    assert not [secret for secret in secrets if secret in shown]


def test_created_is_a_time(files):
    info = files.create_key("release", "aes256", {})
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", str(info.versions[0].created))
