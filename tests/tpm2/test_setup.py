"""Setting up: RSA root keys, owner passwords, foreign handles."""

from __future__ import annotations

import pytest
from keymgmt_tpm2 import Tpm2Provider, Tpm2Settings
from keymgmt_tpm2._counter import bump_counter, create_counter
from keymgmt_tpm2._setup import set_up

from keymgmt.backend import AccessDenied, Dek, SecretSource, UnsupportedOperation

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


def test_an_owner_with_a_password(bare, owned):
    with pytest.raises(AccessDenied, match="refused the auth value"):
        set_up(bare, create=True)
    with Tpm2Provider("tpm", owned) as provider:
        name = set_up(provider, create=True).name
    with Tpm2Provider("tpm", owned.model_copy(update={"srk_name": name})) as provider:
        round_trip(provider, "ecc-p256")
        value = create_counter(provider)
        assert bump_counter(provider) == value + 1
    # Opening models takes no owner.
    with Tpm2Provider("tpm", bare.settings.model_copy(update={"srk_name": name})) as user:
        with Dek.generate() as dek:
            user.unwrap(user.wrap("dev", dek, CONTEXT), CONTEXT).wipe()
        with pytest.raises(AccessDenied, match="refused the auth value"):
            bump_counter(user)


def test_the_owners_password_is_not_on_the_wire(bare, owned, wire):
    tapped = {"tcti": wire.tcti}
    with Tpm2Provider("tpm", owned.model_copy(update=tapped)) as provider:
        name = set_up(provider, create=True).name
    changes = {"srk_name": name, **tapped}
    with Tpm2Provider("tpm", owned.model_copy(update=changes)) as provider:
        create_counter(provider)
        bump_counter(provider)
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
    with pytest.raises(UnsupportedOperation, match="no storage root key") as caught:
        set_up(bare, create=True)
    assert "another handle" in str(caught.value.hint)
    with Tpm2Provider("tpm", bare.settings.model_copy(update={"srk": "0x81000010"})) as provider:
        assert set_up(provider, create=True).handle == "0x81000010"
