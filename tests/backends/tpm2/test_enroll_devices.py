"""Devices whose endorsement key, its certificate or the chain is not where most have it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from keymgmt_tpm2 import Tpm2Provider, Tpm2Settings
from keymgmt_tpm2._templates import EK_PROFILES, ak_template
from keymgmt_tpm2.enroll import _device
from keymgmt_tpm2.enroll._certificates import AttestationError, Makers
from keymgmt_tpm2.enroll._device import make_request, respond
from keymgmt_tpm2.enroll._exchange import Request, accept, challenge
from keymgmt_tpm2.enroll._nv import read_chain, read_nv
from keymgmt_tpm2.enroll._office import Decision, ek_id

from keymgmt.backend import (
    AccessDenied,
    FormatError,
    KeyNotFound,
    ProviderUnavailable,
    Recipient,
    SecretSource,
    UnsupportedOperation,
)

ANY = Decision(None, None, "dev")
SECRET = b"the endorsement password 5"
PLATFORM_NV = 0x62072801
"""As makers define the indices of their certificates: written and deleted by the platform only."""


class Maker:
    """Who certifies endorsement keys: a root, and an authority below it."""

    def __init__(self) -> None:
        self.keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "sub")}
        self.root = self._authority("root", "root")
        self.sub = self._authority("sub", "root")

    def _authority(self, name: str, issuer: str) -> bytes:
        constraint = x509.BasicConstraints(ca=True, path_length=None)
        return self._issue(name, self.keys[name].public_key(), issuer, [(constraint, True)])

    def certify(self, key, issuer: str = "root") -> bytes:
        maker = x509.NameAttribute(x509.ObjectIdentifier("2.23.133.2.1"), "id:41434D45")
        alternative = x509.SubjectAlternativeName([x509.DirectoryName(x509.Name([maker]))])
        purpose = x509.ExtendedKeyUsage([x509.ObjectIdentifier("2.23.133.8.1")])
        return self._issue("", key, issuer, [(alternative, True), (purpose, False)])

    def _issue(self, name: str, key, issuer: str, extensions) -> bytes:
        names = [
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)] if each else [])
            for each in (name, issuer)
        ]
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[0])
            .issuer_name(names[1])
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(days=1))
            .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self.keys[issuer], hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker()


@pytest.fixture
def device(provider) -> Tpm2Provider:
    """A TPM that carries no certificate, with a key."""
    provider.create_key("dev", "ecc-p256", {})
    return provider


def run(provider, operation):
    return provider.service.run("preparing", operation, seconds=60)


def store(provider, index: int, content: bytes, *, attributes=PLATFORM_NV, write=True) -> None:
    """Put content into an NV index as makers do, or leave the index unwritten."""
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    def operation(tpm):
        public = t.TPM2B_NV_PUBLIC(
            nvPublic=t.TPMS_NV_PUBLIC(
                nvIndex=index,
                nameAlg=c.TPM2_ALG.SHA256,
                attributes=c.TPMA_NV(attributes & ~0x20000800),
                dataSize=len(content),
            )
        )
        platform = c.ESYS_TR.PLATFORM
        handle = tpm.call("nv_define_space", b"", public, auth_handle=platform)
        for start in range(0, len(content) if write else 0, 512):
            part = content[start : start + 512]
            tpm.call("nv_write", handle, part, start, auth_handle=platform)

    run(provider, operation)


def ek_of(provider, name: str):
    """The endorsement key that this TPM makes of a profile."""

    def operation(tpm):
        (handle, *_) = _device._candidates(tpm, [EK_PROFILES[name]])
        return tpm.public_of(handle)

    return run(provider, operation)


def enrol(provider, anchors, between=(), decision=ANY, certificate=None) -> Recipient:
    asked = Request.from_bytes(make_request(provider, "dev", certificate).to_bytes())
    sent, kept = challenge(asked, Makers(anchors, between))
    response = respond(provider, "dev", sent, certificate)
    return accept(kept, response, Makers(anchors, between), decision)


@pytest.mark.parametrize("name", ["L-1", "L-2", "H-1", "H-2", "H-3", "H-6"])
def test_every_kind_of_endorsement_key(device, maker, name):
    ek = ek_of(device, name)
    store(device, EK_PROFILES[name].index, maker.certify(ek.key()) + b"\xff" * 40)
    assert enrol(device, [maker.root]).attributes["ek"] == ek_id(ek)
    # It is found where it is kept as well, and then it need not be made.
    from tpm2_pytss import constants as c

    def keep(tpm):
        (handle, *_) = _device._candidates(tpm, [EK_PROFILES[name]])
        tpm.call("evict_control", c.ESYS_TR.OWNER, handle, 0x81010016)

    run(device, keep)
    assert enrol(device, [maker.root]).attributes["ek"] == ek_id(ek)


def test_a_makers_device_that_has_only_the_p384_key(genuine, roots):
    """As swtpm's own maker certified it; without the RSA certificate and the kept keys."""
    from tpm2_pytss import constants as c

    def forget(tpm):
        handle = tpm.persistent(0x01C00002)
        tpm.call("nv_undefine_space", handle, auth_handle=c.ESYS_TR.PLATFORM)
        for number in (0x81010001, 0x81010016):
            tpm.call("evict_control", c.ESYS_TR.OWNER, tpm.persistent(number), number)

    run(genuine, forget)
    assert make_request(genuine, "dev").ek.curve == 4
    assert enrol(genuine, *roots).attributes["attested"] == "tpm2"


def test_a_size_that_this_tpm_does_not_make(device, maker):
    store(device, EK_PROFILES["H-7"].index, maker.certify(rsa_key(4096)))
    with pytest.raises(UnsupportedOperation, match="of no endorsement key of this TPM"):
        make_request(device, "dev")


def rsa_key(bits: int):
    return rsa.generate_private_key(65537, bits).public_key()


def test_a_nonce_and_a_template_of_the_maker(device, maker):
    """Both make another endorsement key than the profile's template alone."""
    plain = ek_of(device, "L-2")
    store(device, EK_PROFILES["L-2"].nonce_at, b"a nonce of the maker")
    with_nonce = ek_of(device, "L-2")
    changed = EK_PROFILES["H-2"].template[:-4] + b"\0\x20" + b"\7" * 32 + b"\0\x20" + bytes(32)
    store(device, EK_PROFILES["H-2"].template_at, changed)
    with_template = ek_of(device, "H-2")
    assert len({plain.unique, with_nonce.unique, with_template.unique}) == 3
    store(device, EK_PROFILES["H-2"].index, maker.certify(with_template.key()))
    assert enrol(device, [maker.root]).attributes["ek"] == ek_id(with_template)
    store(device, EK_PROFILES["L-2"].index, maker.certify(with_nonce.key()))
    assert enrol(device, [maker.root]).attributes["ek"] == ek_id(with_nonce)


@pytest.mark.parametrize("name", ["L-1", "H-3"])
def test_a_certificate_that_the_maker_publishes(device, maker, name):
    certificate = maker.certify(ek_of(device, name).key())
    with pytest.raises(KeyNotFound, match="carries no certificate") as caught:
        make_request(device, "dev")
    assert "--ek-certificate" in str(caught.value.hint)
    assert enrol(device, [maker.root], certificate=certificate)
    sent, _ = challenge(make_request(device, "dev", certificate), Makers([maker.root]))
    with pytest.raises(KeyNotFound):
        respond(device, "dev", sent)


def test_a_published_certificate_goes_before_the_one_in_the_tpm(device, maker):
    store(device, EK_PROFILES["L-2"].index, b"\x30\x82 something odd")
    with pytest.raises(UnsupportedOperation, match="certificate is not readable"):
        make_request(device, "dev")
    certificate = maker.certify(ek_of(device, "L-2").key())
    assert enrol(device, [maker.root], certificate=certificate)
    sent, _ = challenge(make_request(device, "dev", certificate), Makers([maker.root]))
    store(device, EK_PROFILES["H-2"].index, maker.certify(ek_of(device, "H-2").key()))
    with pytest.raises((FormatError, UnsupportedOperation)):
        respond(device, "dev", sent)


def test_a_certificate_of_another_device(device, maker):
    foreign = maker.certify(ec.generate_private_key(ec.SECP256R1()).public_key())
    with pytest.raises(UnsupportedOperation, match="of no endorsement key of this TPM"):
        make_request(device, "dev", foreign)


def test_a_chain_in_the_tpm_stands_between_and_is_trusted_for_nothing(device, maker):
    store(device, EK_PROFILES["L-2"].index, maker.certify(ek_of(device, "L-2").key(), "sub"))
    with pytest.raises(AttestationError, match="issuer CN=sub"):
        enrol(device, [maker.root])
    # One after the other, over two indices, with padding.
    content = b"\0\0\xff" + maker.root + b"\0" * 9 + maker.sub + b"\xff" * 30
    store(device, 0x01C00100, content[:500])
    store(device, 0x01C00101, content[500:])
    assert make_request(device, "dev").chain == maker.root + maker.sub
    assert enrol(device, [maker.root])
    # The root that it brings along is no anchor.
    with pytest.raises(AttestationError, match="no trusted manufacturer"):
        enrol(device, [Maker().root])


def test_indices_of_the_chain_that_cannot_be_read_hide_no_other(device, maker, make_wire):
    store(device, EK_PROFILES["L-2"].index, maker.certify(ek_of(device, "L-2").key(), "sub"))
    store(device, 0x01C00100, maker.sub, write=False)
    store(device, 0x01C00101, maker.sub, attributes=PLATFORM_NV & ~0x60000)  # for the platform only
    store(device, 0x01C00102, maker.sub)
    assert make_request(device, "dev").chain == maker.sub
    # A TPM that gives nothing of it is not asked for ever.
    wire = make_wire(int(device.settings.tcti.rpartition("=")[2]))
    empty = bytes.fromhex("800200000015000000000000000200000000010000")
    wire.intercept = lambda command: empty if command[6:10] == bytes.fromhex("0000014e") else None
    changes = {"tcti": wire.tcti}
    with Tpm2Provider("tpm", device.settings.model_copy(update=changes)) as tapped:
        assert run(tapped, lambda tpm: read_nv(tpm, 0x01C00102)) == b""
    # What may be there another time is no chain that is not there.
    wire.intercept = lambda command: (
        bytes.fromhex("80010000000a00000922")
        if command[6:10] == bytes.fromhex("0000014e")
        else None
    )
    with (
        Tpm2Provider("tpm", device.settings.model_copy(update=changes)) as tapped,
        pytest.raises(ProviderUnavailable, match="busy"),
    ):
        tapped.service.run("reading", read_chain, seconds=1)


def test_a_response_with_a_pin_waits_for_its_turn(genuine, roots, monkeypatch, pin_file):
    """Or another process could use up tries between the look at their number and the PIN."""
    turns = {}
    wait = genuine.service._turn

    def turn(seconds, *, alone):
        turns[key] = alone
        return wait(seconds, alone=alone)

    # As behind a resource manager, where only a PIN takes turns between processes.
    monkeypatch.setattr(Tpm2Settings, "resource_managed", True)
    genuine.create_key("pinned", "ecc-p256", {"pin": "yes"})
    sent = {}
    for key in ("dev", "pinned"):
        asked = Request.from_bytes(make_request(genuine, key).to_bytes())
        sent[key], _ = challenge(asked, Makers(*roots))
    monkeypatch.setattr(genuine.service, "_turn", turn)
    for key in ("dev", "pinned"):
        respond(genuine, key, sent[key])
    assert turns == {"dev": False, "pinned": True}


def test_an_endorsement_hierarchy_with_a_password(device, maker, tmp_path, make_wire):
    store(device, EK_PROFILES["L-2"].index, maker.certify(ek_of(device, "L-2").key()))
    from tpm2_pytss import constants as c

    hierarchy = c.ESYS_TR.ENDORSEMENT
    run(device, lambda tpm: tpm.call("hierarchy_change_auth", hierarchy, SECRET))
    with pytest.raises(AccessDenied, match="password of the endorsement hierarchy") as caught:
        make_request(device, "dev")
    assert "endorsement_auth" in str(caught.value.hint)
    path = tmp_path / "endorsement"
    path.write_bytes(SECRET + b"\n")
    path.chmod(0o600)
    wire = make_wire(int(device.settings.tcti.rpartition("=")[2]))
    changes = {"tcti": wire.tcti, "endorsement_auth": SecretSource(file=path)}
    with Tpm2Provider("tpm", device.settings.model_copy(update=changes)) as tapped:
        assert enrol(tapped, [maker.root])
        assert len(wire.recorded) > 1000
        assert SECRET not in wire.recorded
        path.write_bytes(b"another")
        with pytest.raises(AccessDenied, match="password of the endorsement hierarchy"):
            make_request(tapped, "dev")


def test_the_firmware_version_is_the_one_that_the_tpm_has(device, maker):
    store(device, EK_PROFILES["L-2"].index, maker.certify(ek_of(device, "L-2").key()))
    said = next(each.detail for each in device.check().findings if each.name == "TPM")
    firmware = enrol(device, [maker.root]).attributes["firmware"]
    assert f"firmware {firmware}," in said


def test_an_attestation_key_whose_statements_hide_the_firmware_is_refused(
    device, maker, monkeypatch
):
    """It is genuine, and under the owner: its TPM puts a disguised version into what it signs."""

    store(device, EK_PROFILES["L-2"].index, maker.certify(ek_of(device, "L-2").key()))

    def under_the_owner(tpm):
        return tpm.create_primary("owner", ak_template(), tpm.session())

    monkeypatch.setattr(_device, "attestation_key", under_the_owner)
    with pytest.raises(AttestationError, match="not a primary key of the endorsement hierarchy"):
        enrol(device, [maker.root])


def test_doctor_looks_for_the_certificate(device, maker):
    def said():
        found = {each.name: each for each in device.check().findings}
        return found["endorsement key certificate"]

    assert said().status == "ok"
    assert "none in the TPM: enrolment takes --ek-certificate" in said().detail
    store(device, EK_PROFILES["L-2"].index, maker.certify(ek_of(device, "L-2").key(), "sub"))
    store(device, 0x01C00100, maker.sub)
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert f"L-2 by CN=sub, until {tomorrow:%Y-%m-%d}" in said().detail
    assert f"with {len(maker.sub)} bytes of the chain" in said().detail
    store(device, EK_PROFILES["H-3"].index, b"\xff" * 100)
    assert said().status == "warning"
    assert "H-3: not a DER certificate" in said().detail
