"""Setting up: RSA root keys, owner passwords, foreign handles."""

from __future__ import annotations

import json
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from keymgmt_tpm2 import Tpm2Provider, Tpm2Settings
from keymgmt_tpm2._errors import TpmError, base_code, translate
from keymgmt_tpm2._setup import LockoutChange, set_up
from keymgmt_tpm2.policy._anchor import create_anchor
from keymgmt_tpm2.policy._counter import create_counter, raise_counter

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    Dek,
    LockedOut,
    ProviderUnavailable,
    SecretSource,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)

CONTEXT = b"a context"
PASSWORD = "the owner's password"


@pytest.fixture
def bare(swtpm, tmp_path):
    settings = Tpm2Settings(keys=tmp_path / "keys", tcti=swtpm.tcti)
    with Tpm2Provider("tpm", settings) as provider:
        yield provider


@pytest.fixture
def owned(bare, tmp_path):
    """Settings of a TPM whose owner has a password."""
    from tpm2_pytss import constants as c

    change = ("hierarchy_change_auth", c.ESYS_TR.OWNER, PASSWORD)
    bare.service.run("owning", lambda tpm: tpm.call(*change), pinned=False)
    path = tmp_path / "owner"
    path.write_text(PASSWORD)
    path.chmod(0o600)
    return bare.settings.model_copy(update={"owner_auth": SecretSource(file=path)})


def round_trip(provider, kind):
    provider.create_key("dev", kind, {})
    with Dek.generate() as dek, provider.unwrap(provider.wrap("dev", dek, b"c"), b"c") as again:
        assert again == dek


@pytest.mark.parametrize("kind", ["ecc-p256", "rsa-2048"])
def test_an_rsa_root_key(bare, kind):
    """For chips without ECC: sessions are salted to it just as well."""
    root = set_up(bare, create=True, kind="rsa")
    assert (root.algorithm, root.made) == ("RSA", True)
    assert not set_up(bare, create=True).made
    with Tpm2Provider("tpm", bare.settings.model_copy(update={"srk_name": root.name})) as provider:
        round_trip(provider, kind)


def test_an_owner_with_a_password(bare, owned, sign_raise):
    approver = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(AccessDenied, match="refused the password of the owner hierarchy"):
        set_up(bare, create=True)
    with Tpm2Provider("tpm", owned) as provider:
        name = set_up(provider, create=True).name
    with Tpm2Provider("tpm", owned.model_copy(update={"srk_name": name})) as provider:
        round_trip(provider, "ecc-p256")
        value = create_counter(provider, sign_raise(approver, 1))
    # Opening models and raising a counter take no owner; making one does.
    with Tpm2Provider("tpm", bare.settings.model_copy(update={"srk_name": name})) as user:
        with Dek.generate() as dek:
            user.unwrap(user.wrap("dev", dek, CONTEXT), CONTEXT).wipe()
        with pytest.raises(AccessDenied, match="refused the password of the owner hierarchy"):
            create_counter(user, sign_raise(approver, 1, index=0x01800101))
        assert raise_counter(user, sign_raise(approver, value + 1)) == value + 1


def test_the_owners_password_is_not_on_the_wire(bare, owned, wire, sign_raise):
    tapped = {"tcti": wire.tcti}
    with Tpm2Provider("tpm", owned.model_copy(update=tapped)) as provider:
        name = set_up(provider, create=True).name
    changes = {"srk_name": name, **tapped}
    with Tpm2Provider("tpm", owned.model_copy(update=changes)) as provider:
        create_counter(provider, sign_raise(ec.generate_private_key(ec.SECP256R1()), 2))
        create_anchor(provider.service, None)
        create_anchor(provider.service, None, again=True)
    assert len(wire.recorded) > 1000
    assert PASSWORD.encode() not in wire.recorded


def test_what_lies_at_the_handle_must_be_a_root_key(bare):
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    def occupy(tpm):
        blank = t.TPM2B_SENSITIVE_CREATE()
        public = t.TPM2B_PUBLIC.parse(
            "ecc256:ecdsa",
            objectAttributes="fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign",
        )
        answer = tpm.call("create_primary", blank, public, c.ESYS_TR.OWNER)
        tpm.call("evict_control", c.ESYS_TR.OWNER, answer[0], 0x81000001)
        tpm.call("flush_context", answer[0])

    bare.service.run("occupying", occupy, pinned=False)
    with pytest.raises(UnsupportedOperation, match="not a storage root key") as caught:
        set_up(bare, create=True)
    assert "another handle" in str(caught.value.hint)
    with Tpm2Provider("tpm", bare.settings.model_copy(update={"srk": "0x81000010"})) as provider:
        assert set_up(provider, create=True).handle == "0x81000010"


def persist(tpm, template: str, attributes: str, auth: bytes = b"", name_alg: str = "sha256"):
    """A root key that somebody else made."""
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    public = t.TPM2B_PUBLIC.parse(template, objectAttributes=attributes, nameAlg=name_alg)
    secret = t.TPM2B_SENSITIVE_CREATE(t.TPMS_SENSITIVE_CREATE(userAuth=auth))
    answer = tpm.call("create_primary", secret, public, c.ESYS_TR.OWNER)
    tpm.call("evict_control", c.ESYS_TR.OWNER, answer[0], 0x81000001)
    tpm.call("flush_context", answer[0])


ROOT = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|decrypt"


@pytest.mark.parametrize("attributes", [ROOT, f"{ROOT}|noda"])
def test_a_root_key_with_a_password_is_found_at_setup(bare, attributes):
    """Not after so many failed creates that the TPM is locked."""
    make = (persist, "ecc256:aes128cfb", attributes, b"somebody's")
    bare.service.run("making", lambda tpm: make[0](tpm, *make[1:]), pinned=False)
    for _ in range(6):
        with pytest.raises((AccessDenied, LockedOut)) as caught:
            set_up(bare)
    if "noda" in attributes:
        assert "the storage root key has a password" in str(caught.value)
        assert 'srk = "0x81000010"' in str(caught.value.hint)
    else:
        assert "the last one is kept" in str(caught.value)
    state = bare.service.run("looking", lambda tpm: tpm.lockout(), pinned=False)
    assert not state.locked


@pytest.mark.parametrize(
    ("template", "hashed"),
    [
        ("ecc256:aes128cfb", "sha384"),
        ("ecc384:aes256cfb", "sha384"),
        ("ecc384:aes128cfb", "sha256"),
        ("ecc256:aes128cfb", "sha512"),
        ("rsa2048:aes128cfb", "sha384"),
    ],
)
def test_root_keys_of_other_curves_and_hashes(bare, template, hashed):
    """Whatever ``setup`` prints, the config takes, and keys live under it."""
    bare.service.run(
        "making", lambda tpm: persist(tpm, template, f"{ROOT}|noda", b"", hashed), pinned=False
    )
    root = set_up(bare)
    settings = Tpm2Settings.model_validate(
        {"keys": str(bare.settings.keys), "tcti": bare.settings.tcti, "srk_name": root.name}
    )
    with Tpm2Provider("tpm", settings) as provider:
        round_trip(provider, "ecc-p256")


def test_a_disabled_hierarchy_is_said(bare):
    from tpm2_pytss import constants as c

    name = set_up(bare, create=True).name
    control = (
        "hierarchy_control",
        c.ESYS_TR.PLATFORM,
        c.ESYS_TR.OWNER,
        False,
    )
    bare.service.run("disabling", lambda tpm: tpm.call(*control), pinned=False)
    with (
        Tpm2Provider("tpm", bare.settings.model_copy(update={"srk_name": name})) as provider,
        pytest.raises(ProviderUnavailable, match="the owner hierarchy of the TPM is disabled") as c,
    ):
        provider.create_key("dev", "ecc-p256", {})
    assert "firmware" in str(c.value.hint)
    with pytest.raises(ProviderUnavailable, match="the owner hierarchy of the TPM is disabled"):
        set_up(bare, create=True)
    root = next(f for f in bare.check().findings if f.name == "storage root key")
    assert "disabled" in root.detail


def test_the_protection_against_guessing_is_shown_and_set(bare, tmp_path):
    assert (set_up(bare, create=True).lockout.limit, bare.check().ok) == (3, False)
    changed = set_up(bare, change=LockoutChange(tries=32, recovery=600)).lockout
    assert (changed.limit, changed.interval, changed.recovery) == (32, 600, 1000)
    # With a password of the lockout hierarchy, which is not called the PIN.
    from tpm2_pytss import constants as c

    change = ("hierarchy_change_auth", c.ESYS_TR.LOCKOUT, PASSWORD)
    bare.service.run("owning", lambda tpm: tpm.call(*change), pinned=False)
    with pytest.raises(AccessDenied, match="the lockout hierarchy has a password") as caught:
        set_up(bare, change=LockoutChange(tries=10))
    assert "lockout_auth" in str(caught.value.hint)


@pytest.fixture
def password(tmp_path):
    path = tmp_path / "lockout"
    path.write_text(PASSWORD)
    path.chmod(0o600)
    return path


def test_a_lockout_password_is_sent_only_where_there_is_one(bare, password, make_wire):
    """One that is wrong bars the hierarchy, and an empty one is wrong where there is one."""
    from tpm2_pytss import constants as c

    set_up(bare, create=True)
    wire = make_wire(int(bare.settings.tcti.rpartition("=")[2]))
    tapped = bare.settings.model_copy(update={"tcti": wire.tcti})
    named = tapped.model_copy(update={"lockout_auth": SecretSource(file=password)})
    with Tpm2Provider("tpm", tapped) as without, Tpm2Provider("tpm", named) as provider:
        for change in (LockoutChange(tries=10), LockoutChange(clear=True)):
            with pytest.raises(ConfigError, match="hierarchy has no password") as caught:
                set_up(provider, change=change)
            assert "lockout_auth" in str(caught.value.hint)
        assert not {0x139, 0x13A} & {*wire.commands}  # neither lock reset nor parameters
        own = ("hierarchy_change_auth", c.ESYS_TR.LOCKOUT, PASSWORD)
        bare.service.run("owning", lambda tpm: tpm.call(*own), pinned=False)
        for change in (LockoutChange(tries=10), LockoutChange(clear=True)):
            with pytest.raises(AccessDenied, match="hierarchy has a password") as caught:
                set_up(without, change=change)
            assert "lockout_auth" in str(caught.value.hint)
        assert not {0x139, 0x13A} & {*wire.commands}
        assert set_up(provider, change=LockoutChange(tries=10)).lockout.limit == 10
        assert {0x13A} <= {*wire.commands}


def test_a_wrong_lockout_password_is_barred_and_that_is_said(bare, password):
    from tpm2_pytss import constants as c

    set_up(bare, create=True, change=LockoutChange(lockout_recovery=777))
    own = ("hierarchy_change_auth", c.ESYS_TR.LOCKOUT, "another")
    bare.service.run("owning", lambda tpm: tpm.call(*own), pinned=False)
    named = bare.settings.model_copy(update={"lockout_auth": SecretSource(file=password)})
    with Tpm2Provider("tpm", named) as provider:
        with pytest.raises(AccessDenied, match="refused the password of the lockout") as caught:
            set_up(provider, change=LockoutChange(tries=10))
        assert "accepts none for 777 seconds" in str(caught.value)
        assert not isinstance(caught.value, LockedOut)
        password.write_text("another")
        for change in (LockoutChange(tries=10), LockoutChange(clear=True)):
            with pytest.raises(LockedOut, match="accepts none for 777 seconds") as caught:
                set_up(provider, change=change)
            assert "--clear-lockout" not in f"{caught.value} {caught.value.hint}"


def test_fewer_tries_than_are_counted_do_not_lock_the_tpm(settings, tmp_path):
    pin = tmp_path / "pin"
    pin.write_text("right")
    pin.chmod(0o600)
    named = settings.model_copy(update={"pin": SecretSource(file=pin)})
    with Tpm2Provider("tpm", named) as provider:
        set_up(provider, change=LockoutChange(tries=10, recovery=1000))
        provider.create_key("dev", "ecc-p256", {"pin": "yes"})
        with Dek.generate() as dek:
            wrapped = provider.wrap("dev", dek, CONTEXT)
        pin.write_text("wrong")
        for _ in range(3):
            with pytest.raises(AccessDenied, match="refused the PIN"):
                provider.unwrap(wrapped, CONTEXT)
        for tries in (2, 3):
            with pytest.raises(ConfigError, match="3 wrong tries are counted") as caught:
                set_up(provider, change=LockoutChange(tries=tries))
            assert "--clear-lockout" in str(caught.value.hint)
        assert set_up(provider).lockout.limit == 10
        assert set_up(provider, change=LockoutChange(tries=4)).lockout.limit == 4
        changed = set_up(provider, change=LockoutChange(tries=2, clear=True)).lockout
        assert (changed.limit, changed.counted, changed.locked) == (2, 0, False)


def test_who_was_refused_is_told_by_command_and_session():
    """A refusal has one code whoever it is of; only a key's own is called the PIN."""
    from tpm2_pytss import constants as c

    def said(raw, command, *arguments):
        return str(translate(TpmError(raw, command, arguments), "doing"))

    for code in (0x98E, 0x9A2):
        assert "the PIN" in said(code, "ecdh_zgen")
        assert "the storage root key" in said(code, "load")
        assert "the storage root key" in said(code, "create")
        assert "owner hierarchy" in said(code, "create_primary", c.ESYS_TR.OWNER)
        assert "endorsement hierarchy" in said(code, "policy_secret", c.ESYS_TR.ENDORSEMENT)
        assert "lockout hierarchy" in said(code, "clear", c.ESYS_TR.LOCKOUT)
        assert "an auth value" in said(code, "nv_read")
    assert "the PIN" in said(0x98E, "certify")
    assert "attestation key" in said(0xA8E, "certify")
    assert "endorsement hierarchy of the TPM is disabled" in said(
        0x185, "create_primary", c.ESYS_TR.ENDORSEMENT
    )


def test_what_is_the_tpms_fault_is_not_the_models():
    """No code that is not about the blob becomes an error for which a model is blamed."""
    for code in range(0x1000):
        error = translate(TpmError(code, "load"), "doing")
        blamed = isinstance(error, (UnwrapFailed, WrongKey))
        assert blamed == (base_code(code) == 0x0A7), hex(code)
    for layer in (0x10000, 0x60000, 0x70000, 0x80000, 0x90000, 0xA0000):
        for code in range(64):
            assert isinstance(translate(TpmError(layer + code), "doing"), ProviderUnavailable)


def test_a_tpm_that_failed_does_not_blame_the_blob(bare, wire):
    name = set_up(bare, create=True).name
    changes = {"srk_name": name, "tcti": wire.tcti}
    with (
        Tpm2Provider("tpm", bare.settings.model_copy(update=changes)) as provider,
        Dek.generate() as dek,
    ):
        provider.create_key("dev", "rsa-2048", {})
        wrapped = provider.wrap("dev", dek, CONTEXT)
        failed = []

        def fail(command):
            # From the decryption on, as a TPM in failure mode does.
            failed.extend([1] if command[6:10] == b"\x00\x00\x01\x59" else [])
            return bytes.fromhex("80010000000a00000101") if failed else None

        wire.intercept = fail
        with pytest.raises(ProviderUnavailable, match="reports a failure"):
            provider.unwrap(wrapped, CONTEXT)
        assert failed


def test_the_command_shows_and_sets_it(bare, tmp_path, monkeypatch, capsys, check_schema):
    import keymgmt.cli

    config = tmp_path / "keymgmt.toml"
    config.write_text(
        f'[providers.tpm]\nbackend = "tpm2"\nkeys = "keys"\ntcti = "{bare.settings.tcti}"\n'
    )

    def run(*arguments):
        words = ["keymgmt", "-c", str(config), "tpm", "setup", "tpm", *arguments]
        monkeypatch.setattr(sys, "argv", words)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            keymgmt.cli.main()
        out, err = capsys.readouterr()
        assert not end.value.code, err
        return out

    assert "0 of 3 wrong tries are counted" in run("--create")
    assert "the TPM locks at 32" in run("--tries", "32", "--recovery", "600", "--clear-lockout")
    shown = json.loads(run("--json"))
    assert check_schema(shown) == "keymgmt-tpm-setup/1"
    assert shown["lockout"] == {
        "counted": 0,
        "tries": 32,
        "recovery": 600,
        "lockout_recovery": 1000,
        "locked": False,
    }
    assert (shown["srk"], len(shown["srk_name"])) == ("0x81000001", 68)
