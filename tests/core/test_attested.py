"""``require_attested``: which recipient files are sealed to, and which are refused."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keymgmt._config import Config
from keymgmt._hpke import hpke_generate, hpke_public
from keymgmt._provider import Signature
from keymgmt._recipient import Recipient, recipient_message, sign_recipient
from keymgmt._recipients import resolve_group
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
    policy = {"recipient_signers": ["enrolment.pem"], "require_attested": True}
    return Config({"policy": policy}, path=tmp_path / "keymgmt.toml")


@pytest.fixture
def save(tmp_path):
    def make(name, attributes, key=None) -> tuple[str, Recipient]:
        public = hpke_public("hpke-p256", hpke_generate("hpke-p256"))
        recipient = Recipient("hpke-p256", "tpm2", "device", "1", public, attributes)
        recipient.save(tmp_path / name)
        if key is not None:
            spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            signature = Signature(key.sign(recipient_message(recipient)), spki)
            (tmp_path / f"{name}.sig").write_bytes(sign_recipient([signature]))
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
    with pytest.raises(UntrustedPublisher, match="nobody vouches"):
        resolve_group(group, config, [recipient.fingerprint])
    group, _ = save("forged", {"attested": "tpm2"}, ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(UntrustedPublisher, match="nobody whom this config trusts"):
        resolve_group(group, config)


def test_without_signers_it_is_a_mistake():
    with pytest.raises(ConfigError, match="who vouches"):
        Config({"policy": {"require_attested": True}})
