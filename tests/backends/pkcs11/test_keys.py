"""Keys as an operator sees them: attributes, versions, names, ambiguity, mechanisms, doctor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from keymgmt_pkcs11 import Pkcs11Settings
from keymgmt_pkcs11._cryptoki import CkMechanism
from keymgmt_pkcs11._errors import CkError, Ckr
from keymgmt_pkcs11._settings import KeyEntry
from pkcs11 import Attribute, Mechanism, ObjectClass

from keymgmt.backend import (
    ConfigError,
    Dek,
    KeyNotFound,
    KeyRetired,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)

NO_USE = dict.fromkeys(
    (
        *(Attribute.ENCRYPT, Attribute.DECRYPT, Attribute.WRAP, Attribute.UNWRAP),
        *(Attribute.SIGN, Attribute.VERIFY, Attribute.DERIVE),
    ),
    False,
)


def foreign_key(
    provider: Any, label: str, identifier: bytes, bits: int = 256, **attributes: Any
) -> None:
    """An AES key as somebody else's tool would have made it."""
    template = {
        **NO_USE,
        Attribute.TOKEN: True,
        Attribute.LABEL: label.encode(),
        Attribute.ID: identifier,
        Attribute.VALUE_LEN: bits // 8,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.ENCRYPT: True,
        Attribute.DECRYPT: True,
        Attribute.EXTRACTABLE: False,
        **{Attribute[name.upper()]: value for name, value in attributes.items()},
    }

    def make(session: Any) -> None:
        how = CkMechanism(Mechanism.AES_KEY_GEN)
        session.ck.generate(session.handle, how, template)

    provider.connection.run("making a foreign key", make, changes=True)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("aes256", {"encrypt", "decrypt"}),
        ("aes256-kw", {"wrap", "unwrap"}),
        ("ecdh-p256", {"derive"}),
        ("rsa-oaep", {"decrypt"}),
        ("ecdsa-p384", {"sign"}),
        ("rsa-pss", {"sign"}),
    ],
)
@pytest.mark.parametrize("module", ["softhsm_token", "nss_token"])
def test_a_new_key_has_one_use_and_never_leaves(request, module, kind, flags):
    token = request.getfixturevalue(module)
    provider = token.provider(allow_oaep_sha1=True)
    name = f"attributes-{kind}"
    options = {"bits": "2048"} if kind.startswith("rsa") else {}
    info = provider.create_key(name, kind, options)
    # Read one by one and not through the provider's eyes.
    kind_of_object = ObjectClass.SECRET_KEY if kind.startswith("aes") else ObjectClass.PRIVATE_KEY
    wanted = {Attribute.LABEL: name.encode(), Attribute.CLASS: int(kind_of_object)}

    def look(session: Any) -> None:
        (handle,) = session.ck.find(session.handle, wanted)

        def read(attribute: Attribute, size: int = 1) -> bytes:
            try:
                return bytes(session.ck.read(session.handle, handle, attribute, size))
            except CkError as error:
                if error.code != Ckr.ATTRIBUTE_TYPE_INVALID:
                    raise
                return b""

        used = {each.name.lower() for each in NO_USE if any(read(each))}
        assert used == flags
        for good in ("PRIVATE", "SENSITIVE", "ALWAYS_SENSITIVE", "NEVER_EXTRACTABLE"):
            assert any(read(Attribute[good])), good
        assert not any(read(Attribute.EXTRACTABLE))
        secret = Attribute.PRIVATE_EXPONENT if kind.startswith("rsa") else Attribute.VALUE
        with pytest.raises(CkError, match="SENSITIVE"):
            session.ck.read(session.handle, handle, secret, 1024)
        assert read(Attribute.ID, 64).hex() == info.newest

    provider.connection.run("looking", look)
    assert not [f for f in provider.check(name).findings if f.status == "failed"]


def test_versions_are_ids_in_the_order_of_their_counters(softhsm_token):
    provider = softhsm_token.provider()
    provider.create_key("counted", "aes256", {})
    for _ in range(3):
        provider.rotate_key("counted")
    versions = [version.version for version in provider.describe_key("counted").versions]
    assert [int(version[4:12], 16) for version in versions] == [1, 2, 3, 4]
    assert len({version[12:] for version in versions}) == 4
    again = softhsm_token.provider()
    assert again.describe_key("counted").newest == versions[-1]


def test_the_config_maps_names_to_labels_and_ids(softhsm_token):
    plain = softhsm_token.provider()
    foreign_key(plain, "Model KEK 2026", b"\x01\x02")
    foreign_key(plain, "Model KEK 2026", b"\x01\x03")
    keys = {
        "pinned": KeyEntry(label="Model KEK 2026", id="0102"),
        "by-id": KeyEntry(id="0103"),
        "both": KeyEntry(label="Model KEK 2026"),
        "new": KeyEntry(label="A label with spaces"),
    }
    provider = softhsm_token.provider(keys=keys)
    with Dek.generate() as dek:
        first = provider.wrap("pinned", dek, b"c")
        second = provider.wrap("by-id", dek, b"c")
        assert (first.version, second.version) == ("0102", "0103")
        assert (first.key, second.key) == ("pinned", "by-id")
        # Two ids of somebody else: nothing says which is the newer, but both open by version.
        with pytest.raises(UnsupportedOperation, match="ambiguous") as caught:
            provider.wrap("both", dek, b"c")
        assert "0102" in str(caught.value)
        assert "0103" in str(caught.value)
        assert provider.unwrap(replace(first, key="both"), b"c") == dek
        assert provider.unwrap(replace(second, key="both"), b"c") == dek
        with pytest.raises(ConfigError, match="pinned"):
            provider.rotate_key("pinned")
        assert provider.create_key("new", "aes256", {}).detail["label"] == "A label with spaces"
        # Ours is newer than whatever others made under the label.
        foreign_key(provider, "A label with spaces", b"\xff" * 16)
        assert provider.wrap("new", dek, b"c").version == provider.describe_key("new").newest
        assert provider.describe_key("new").versions[0].version == "ff" * 16
    names = {info.key for info in plain.list_keys()}
    assert "Model KEK 2026" not in names
    assert "Model KEK 2026" in str([f.detail for f in plain.check().findings])


def test_two_objects_of_one_label_and_id(softhsm_token):
    provider = softhsm_token.provider()
    foreign_key(provider, "double", b"\x07")
    with Dek.generate() as dek:
        wrapped = provider.wrap("double", dek, b"c")
        foreign_key(provider, "double", b"\x07")
        fresh = softhsm_token.provider()
        for call in (
            lambda: fresh.wrap("double", dek, b"c"),
            lambda: fresh.unwrap(wrapped, b"c"),
            lambda: fresh.describe_key("double"),
        ):
            with pytest.raises(UnsupportedOperation, match="ambiguous") as caught:
                call()
            assert str(caught.value).count("id 07") == 2
    warned = [f for f in fresh.check().findings if f.name == "key double"]
    assert warned
    assert warned[0].status == "warning"


def test_rotation_and_retirement_on_the_token(softhsm_token):
    provider = softhsm_token.provider()
    provider.create_key("turn", "ecdh-p256", {})
    connected = softhsm_token.provider()
    with Dek.generate() as dek:
        old = provider.wrap("turn", dek, b"c")
        assert connected.unwrap(old, b"c") == dek
        provider.rotate_key("turn")
        # Another provider that was connected before uses the new version at once.
        assert connected.wrap("turn", dek, b"c").version != old.version
        provider.retire_version("turn", old.version)
        # It remembers the key object, and the token is what refuses.
        with pytest.raises(KeyRetired):
            connected.unwrap(old, b"c")
        with pytest.raises(KeyRetired):
            softhsm_token.provider().unwrap(old, b"c")
    states = [version.state for version in provider.describe_key("turn").versions]
    assert states == ["retired", "active"]


def test_oaep_with_sha1_is_by_opt_in(softhsm_token):
    open_minded = softhsm_token.provider(allow_oaep_sha1=True)
    strict = softhsm_token.provider()
    with pytest.raises(UnsupportedOperation, match="OAEP only with SHA-1") as caught:
        strict.create_key("rsa", "rsa-oaep", {"bits": "2048"})
    assert "allow_oaep_sha1" in str(caught.value.hint)
    with pytest.raises(KeyNotFound):
        strict.describe_key("rsa")
    open_minded.create_key("rsa", "rsa-oaep", {"bits": "2048"})
    with Dek.generate() as dek:
        wrapped = open_minded.wrap("rsa", dek, b"c")
        assert wrapped.mechanism == "RSA-OAEP"
        assert open_minded.unwrap(wrapped, b"c") == dek
        with pytest.raises(UnsupportedOperation) as refused:
            strict.unwrap(wrapped, b"c")
        assert "allow_oaep_sha1" in str(refused.value.hint)
        # A recipient file says SHA-256, which this token does not do.
        with pytest.raises(UnsupportedOperation):
            open_minded.export_recipient("rsa")


def test_a_mechanism_may_be_fixed(nss_token):
    provider = nss_token.provider(allow_oaep_sha1=True)
    provider.create_key("fixed", "rsa-oaep", {"bits": "2048"})
    with Dek.generate() as dek:
        made = {}
        for name in ("RSA-OAEP-256", "RSA-OAEP"):
            only = nss_token.provider(
                allow_oaep_sha1=True, keys={"fixed": KeyEntry(mechanism=name)}
            )
            made[name] = only.wrap("fixed", dek, b"c")
            assert made[name].mechanism == name
            assert only.unwrap(made[name], b"c") == dek
            with pytest.raises(UnwrapFailed):
                only.unwrap(made[name], b"other")
            for other, wrapped in made.items():
                if other != name:
                    with pytest.raises(UnsupportedOperation):
                        only.unwrap(wrapped, b"c")
        with pytest.raises(ConfigError, match="not known"):
            nss_token.provider(keys={"fixed": KeyEntry(mechanism="AES-ECB")}).wrap(
                "fixed", dek, b"c"
            )
        # A blob of one mechanism that is presented as another's does not open.
        with pytest.raises(UnwrapFailed):
            provider.unwrap(replace(made["RSA-OAEP"], mechanism="RSA-OAEP-256"), b"c")


def test_a_wrap_for_another_device_is_known_without_decrypting(softhsm_token):
    provider = softhsm_token.provider()
    provider.create_key("device", "ecdh-p256", {})
    with Dek.generate() as dek:
        wrapped = provider.wrap("device", dek, b"c")
        with pytest.raises(WrongKey):
            provider.unwrap(replace(wrapped, params={"pk": "0" * 32}), b"c")


def test_a_short_aes_key_is_not_used(softhsm_token):
    provider = softhsm_token.provider()
    foreign_key(provider, "short", b"\x01", bits=128)
    with Dek.generate() as dek, pytest.raises(UnsupportedOperation):
        provider.wrap("short", dek, b"c")


def test_options_of_new_keys(softhsm_token):
    provider = softhsm_token.provider()
    for kind, options in (
        ("aes256", {"bits": "256"}),
        ("rsa-pss", {"bits": "1024"}),
        ("rsa-pss", {"size": "2048"}),
        ("aes-256", {}),
    ):
        with pytest.raises(ConfigError) as caught:
            provider.create_key("never", kind, options)
        assert caught.value.hint or "one of" in str(caught.value)
    with pytest.raises(KeyNotFound):
        provider.describe_key("never")


def test_doctor_says_what_is_wrong_with_a_key(softhsm_token):
    provider = softhsm_token.provider(keys={"known": KeyEntry(allow=("usages", "private"))})
    foreign_key(provider, "loose", b"\x01", extractable=True)
    foreign_key(provider, "public", b"\x01", private=False)
    foreign_key(provider, "known", b"\x01", private=False, wrap=True)
    foreign_key(provider, "greedy", b"\x01", wrap=True)
    foreign_key(provider, "nameless", b"")
    found = {f.name: f for f in provider.check().findings if f.name.startswith("key ")}
    assert found["key loose"].status == found["key public"].status == "failed"
    assert "CKA_EXTRACTABLE is true" in found["key loose"].detail
    assert "CKA_NEVER_EXTRACTABLE is false" in found["key loose"].detail
    assert "CKA_PRIVATE is false" in found["key public"].detail
    assert "it may also wrap" in found["key greedy"].detail
    assert "no id" in found["key nameless"].detail
    assert found["key known"].status == "ok"
    assert not provider.check().ok
    with Dek.generate() as dek:
        for name, word in (("loose", "extractable"), ("public", "private"), ("greedy", "usages")):
            with pytest.raises(UnsupportedOperation, match="is not used to wrap") as caught:
                provider.wrap(name, dek, b"c")
            assert f'"{word}"' in str(caught.value.hint)
        assert provider.unwrap(provider.wrap("known", dek, b"c"), b"c") == dek
        wrapped = provider.wrap("nameless", dek, b"c")
        assert wrapped.version == "noid"
        assert provider.unwrap(wrapped, b"c") == dek


def test_doctor_is_light_and_mechanisms_leave_nothing(faulty, faults):
    from keymgmt_pkcs11._checks import try_kind
    from keymgmt_pkcs11._kinds import KINDS

    provider = faulty.provider()
    found = {f.name: f for f in provider.check().findings}
    for name in ("module", "threads", "tokens", "token", "PIN", "login", "sessions"):
        assert found[name].status in ("ok", "warning"), found[name]
    for made in ("C_GenerateKey", "C_GenerateKeyPair", "C_WrapKey", "C_CreateObject"):
        assert faults.calls(made) == 0

    def objects(session: Any) -> int:
        return len(session.ck.find(session.handle, {}))

    before = provider.connection.run("counting", objects)
    tried = {
        kind.name: provider.connection.run("trying", lambda s, kind=kind: try_kind(s, kind))
        for kind in KINDS.values()
    }
    assert tried["aes256"][0]
    assert "AES-GCM" in tried["aes256"][1]
    assert "µs" in tried["ecdh-p256"][1]
    assert not tried["rsa-oaep"][0]
    assert provider.connection.run("counting", objects) == before


def test_settings_refuse_what_is_ambiguous_or_unsafe(tmp_path):
    good: dict[str, Any] = {"module": Path("/m.so"), "pin": {"env": "PIN"}}
    assert Pkcs11Settings.model_validate({**good, "uri": "pkcs11:token=a"}).selector == {
        "token": "a"
    }
    by_path = "pkcs11:token=a?module-path=/usr/lib/m.so"
    assert (
        str(Pkcs11Settings.model_validate({"uri": by_path, "login": "none"}).library)
        == "/usr/lib/m.so"
    )
    for wrong in (
        {**good, "pin": "1234"},
        {**good, "pin": None},
        {**good, "login": "none"},
        {**good, "uri": "pkcs11:token=a", "token": "a"},
        {**good, "uri": "pkcs11:token=a?pin-value=1234"},
        {**good, "uri": "pkcs11:token=a?pin-source=file:/x"},
        {**good, "uri": "pkcs11:object=a"},
        {**good, "uri": "pkcs11:token=a;vendor=b"},
        {**good, "uri": by_path},
        {"uri": "pkcs11:token=a?module-path=m.so", "login": "none"},
        {"pin": {"env": "PIN"}},
        {**good, "keys": {"../x": {}}},
        {**good, "keys": {"a": {"id": "xyz"}}},
        {**good, "timeout": 0},
        {**good, "sessions": 0},
        {**good, "unknown": 1},
    ):
        with pytest.raises(ValueError, match="validation error") as caught:
            Pkcs11Settings.model_validate(wrong)
        assert "1234" not in str(caught.value)


def test_the_commands(softhsm_token, tmp_path, capsys, check_schema, check_formats):
    check_formats("keymgmt_pkcs11")
    from typer.testing import CliRunner

    from keymgmt.cli import app

    config = tmp_path / "keymgmt.toml"
    config.write_text(
        f'[providers.hsm]\nbackend = "pkcs11"\nmodule = "{softhsm_token.module}"\n'
        f'token = "{softhsm_token.label}"\npin = {{ file = "{softhsm_token.pin_file}" }}\n'
    )
    config.chmod(0o600)
    softhsm_token.provider().create_key("seen", "aes256", {})
    runner = CliRunner()

    def run(*arguments: str) -> Any:
        done = runner.invoke(app, ["-c", str(config), "pkcs11", *arguments])
        assert done.exit_code == 0, done.output
        if "--json" not in arguments:
            return done.stdout
        document = json.loads(done.stdout)
        assert check_schema(document) == f"keymgmt-pkcs11-{arguments[0]}/1"
        return document[arguments[0]]

    assert softhsm_token.label in {
        row["token"] for row in run("slots", str(softhsm_token.module), "--json")
    }
    assert "seen" in {row["key"] for row in run("keys", "hsm", "--json")}
    tried = {row["kind"]: row for row in run("mechanisms", "hsm", "--json")}
    assert tried["aes256"]["works"] == "yes"
    assert "seen" in run("keys", "hsm")
