"""``require_attested``: which recipient files are sealed to, and which are refused."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keymgmt._config.config import Config
from keymgmt._crypto.hpke import hpke_generate, hpke_public
from keymgmt._providers.data import Signature
from keymgmt._providers.recipient_file import Recipient, recipient_message, signatures_file
from keymgmt._trust.recipients import resolve_group
from keymgmt.errors import ConfigError, UntrustedPublisher


@pytest.fixture
def signer(tmp_path):
    key = ed25519.Ed25519PrivateKey.generate()
    public = key.public_key()
    (tmp_path / "enrolment.pem").write_bytes(
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return key


@pytest.fixture
def config(tmp_path, signer):
    policy = {"attestation_signers": ["enrolment.pem"], "require_attested": True}
    return Config({"policy": policy}, path=tmp_path / "keymgmt.toml")


@pytest.fixture
def save(tmp_path):
    def make(name, attributes, key=None, *, attested=True) -> tuple[str, Recipient]:
        public = hpke_public("hpke-p256", hpke_generate("hpke-p256"))
        recipient = Recipient("hpke-p256", "tpm2", "device", "1", public, attributes)
        recipient.save(tmp_path / name)
        if key is not None:
            spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            signature = Signature(key.sign(recipient_message(recipient, attested=attested)), spki)
            (tmp_path / f"{name}.sig").write_bytes(signatures_file([signature]))
        return f"@{tmp_path / name}", recipient

    return make


def test_an_attested_recipient_that_is_vouched_for(config, save, signer):
    group, recipient = save("good", {"attested": "tpm2"}, signer)
    (wrap,) = resolve_group(group, config)
    assert wrap.recipient == recipient


def test_a_recipient_made_in_software_is_refused(config, save, signer):
    group, recipient = save("software", {}, signer)
    with pytest.raises(UntrustedPublisher, match="not attested by hardware"):
        resolve_group(group, config, [recipient.fingerprint])


def test_that_it_says_so_itself_counts_for_nothing(config, save):
    group, recipient = save("liar", {"attested": "tpm2"})
    with pytest.raises(UntrustedPublisher, match="nobody states"):
        resolve_group(group, config, [recipient.fingerprint])
    group, _ = save("forged", {"attested": "tpm2"}, ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(UntrustedPublisher, match="nobody whom this config trusts"):
        resolve_group(group, config)


def test_without_signers_it_is_a_mistake():
    with pytest.raises(ConfigError, match="who attests"):
        Config({"policy": {"require_attested": True}})


def test_vouched_for_and_attested_do_not_stand_for_one_another(tmp_path, config, save, signer):
    """A software key that calls itself attested, signed as genuine by the same signer."""
    group, recipient = save("liar", {"attested": "tpm2"}, signer, attested=False)
    with pytest.raises(UntrustedPublisher, match="is not valid"):
        resolve_group(group, config, [recipient.fingerprint])
    only_vouching = Config(
        {"policy": {"recipient_signers": ["enrolment.pem"]}}, path=tmp_path / "keymgmt.toml"
    )
    assert resolve_group(group, only_vouching)
    attested, _ = save("attested", {"attested": "tpm2"}, signer)
    with pytest.raises(UntrustedPublisher, match="is not valid"):
        resolve_group(attested, only_vouching)


def test_what_was_attested_is_genuine_where_that_is_enough(tmp_path, save, signer):
    policy = {"attestation_signers": ["enrolment.pem"]}
    config = Config({"policy": policy}, path=tmp_path / "keymgmt.toml")
    group, _ = save("attested", {"attested": "tpm2"}, signer)
    assert resolve_group(group, config)
    group, _ = save("vouched", {}, signer, attested=False)
    with pytest.raises(UntrustedPublisher, match="is not valid"):
        resolve_group(group, config)


def test_one_key_does_not_do_both():
    both = {"recipient_signers": ["a.pem"], "attestation_signers": ["a.pem"]}
    with pytest.raises(ConfigError, match="two keys"):
        Config({"policy": both})


STATED = {"attested": "tpm2", "policy_digest": "aa" * 32, "approver": "bb" * 32, "maker": "cc" * 32}


def demanding(tmp_path, wanted) -> Config:
    policy = {"attestation_signers": ["enrolment.pem"], "require_attested": wanted}
    return Config({"policy": policy}, path=tmp_path / "keymgmt.toml")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"policies": ["aa" * 32]}, ""),
        ({"policies": ["11" * 32, ":".join(["AA"] * 32)]}, ""),
        ({"policies": ["aa" * 32], "approvers": ["bb" * 32], "makers": ["cc" * 32]}, ""),
        ({"policies": ["bb" * 32]}, "its policy_digest is " + "aa" * 32),
        ({"approvers": ["11" * 32]}, "its approver is " + "bb" * 32),
        ({"makers": ["11" * 32]}, "its maker is " + "cc" * 32),
        ({"policies": ["aa" * 32], "makers": ["11" * 32]}, "its maker is"),
    ],
)
def test_a_build_machine_demands_policies_approvers_and_makers(
    tmp_path, save, signer, wanted, said
):
    config = demanding(tmp_path, wanted)
    group, recipient = save("device", STATED, signer)
    if not said:
        assert resolve_group(group, config)
        return
    with pytest.raises(UntrustedPublisher, match=said):
        resolve_group(group, config, [recipient.fingerprint])


def test_what_the_office_does_not_state_fits_no_demand(tmp_path, save, signer):
    """A key that is bound to values has no approver."""
    group, _ = save("device", {"attested": "tpm2", "policy_digest": "aa" * 32}, signer)
    with pytest.raises(UntrustedPublisher, match="its approver is not stated"):
        resolve_group(group, demanding(tmp_path, {"approvers": ["bb" * 32]}))


def test_what_a_device_says_of_itself_fits_no_demand(tmp_path, save, signer):
    """The attributes are as demanded, and signed as genuine only, by the very signer."""
    group, recipient = save("liar", STATED, signer, attested=False)
    with pytest.raises(UntrustedPublisher, match="is not valid"):
        resolve_group(group, demanding(tmp_path, {"makers": ["cc" * 32]}), [recipient.fingerprint])


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("yes", "write true, false, or a table"),
        ({"makers": []}, "makers"),
        ({"makers": ["Infineon"]}, "'infineon' is not a SHA-256 digest"),
        ({"vendors": ["aa" * 32]}, "vendors"),
    ],
)
def test_a_demand_that_is_none_is_a_mistake(tmp_path, wanted, said):
    with pytest.raises(ConfigError, match=said):
        demanding(tmp_path, wanted)
