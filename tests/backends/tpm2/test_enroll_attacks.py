"""Attacks on enrolment: what a device, or whoever stands between, tries on the office."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keymgmt_tpm2._structures import Public, sized, u32
from keymgmt_tpm2.enroll import _exchange
from keymgmt_tpm2.enroll._certificates import AttestationError, Makers, split_file
from keymgmt_tpm2.enroll._device import make_request, respond
from keymgmt_tpm2.enroll._exchange import Request, accept, challenge
from keymgmt_tpm2.enroll._office import Decision, Device, ek_id, read_inventory
from keymgmt_tpm2.policy._policy import Approver

from keymgmt.backend import ConfigError, FormatError, Recipient

ANY = Decision(None, None, "dev")


@pytest.fixture
def enrol(genuine, roots):
    """Enrol a key of the genuine device under a decision of the office."""

    def run(decision: Decision, key: str = "dev", change=lambda request: request) -> Recipient:
        request = change(make_request(genuine, key))
        sent, kept = challenge(request, Makers(*roots))
        forced = json.loads(sent) | {"request": make_request(genuine, key).digest.hex()}
        response = respond(genuine, key, json.dumps(forced).encode())
        if request.digest.hex() != forced["request"]:
            # The device's half signs for its own request; an attacker's signs for any.
            response = sign_for(genuine, request, sent)
        return accept(kept, response, Makers(*roots), decision)

    return run


def sign_for(genuine, request: Request, sent: bytes) -> bytes:
    """The response of a genuine TPM whose software sends another request than it should."""
    from keymgmt_tpm2.enroll import _device

    digest, credential, seed = _exchange.read_challenge(sent)
    version = genuine.keys.read("dev").newest

    def operation(tpm):
        secret = _device._activate(tpm, credential, seed, None)
        value = _exchange.answer_value(bytes(secret), digest)
        return _device._certify(tpm, version, value)

    attest, signature = genuine.service.run("attacking", operation)
    return _exchange.write_response(attest, signature)


def measure(provider, index: int) -> None:
    from tpm2_pytss import constants as c

    handle = c.ESYS_TR.parse(f"pcr{index}")
    provider.service.run("measuring", lambda tpm: tpm.call("pcr_event", handle, b"rootkit"))


@pytest.fixture
def public_pem(tmp_path):
    """Make an approver; returns the file of its public key, and that key in DER."""

    def make(name: str):
        public = ec.generate_private_key(ec.SECP256R1()).public_key()
        path, form = tmp_path / f"{name}.pub", PublicFormat.SubjectPublicKeyInfo
        path.write_bytes(public.public_bytes(Encoding.PEM, form))
        return path, public.public_bytes(Encoding.DER, form)

    return make


def test_a_device_in_an_attackers_boot_state_is_refused(genuine, enrol):
    """In words the policy is the same: PCR 7 as it was."""
    reference = genuine.pcrs("sha256", [7])
    assert enrol(Decision(reference, None, "dev")).attributes["attested"] == "tpm2"
    measure(genuine, 7)
    genuine.create_key("evil", "ecc-p256", {"pcr": "7"})
    with pytest.raises(AttestationError, match="another policy than is wanted") as caught:
        enrol(Decision(reference, None, "evil"), "evil")
    hint = str(caught.value.hint)
    assert reference.values[7].hex() in hint
    assert genuine.pcrs("sha256", [7]).values[7].hex() in hint


def test_a_key_bound_to_fewer_pcrs_than_are_stated_is_refused(genuine, enrol):
    with pytest.raises(AttestationError, match="another policy"):
        enrol(Decision(genuine.pcrs("sha256", [0, 7]), None, "dev"))


def test_a_key_of_another_approver_is_refused(genuine, enrol, public_pem):
    ours, theirs = public_pem("ours"), public_pem("theirs")
    genuine.create_key("signed", "ecc-p256", {"approver": str(theirs[0]), "ref": "edge"})
    with pytest.raises(AttestationError, match="another policy"):
        enrol(Decision(Approver(ours[1], "edge"), None, "signed"), "signed")
    with pytest.raises(AttestationError, match="another policy"):
        enrol(Decision(Approver(theirs[1]), None, "signed"), "signed")
    recipient = enrol(Decision(Approver(theirs[1], "edge"), None, "signed"), "signed")
    assert recipient.attributes["approver"] == hashlib.sha256(theirs[1]).hexdigest()


def test_a_key_without_a_policy_is_refused_where_one_is_stated(genuine, enrol):
    genuine.create_key("open", "ecc-p256", {})
    with pytest.raises(AttestationError, match="another policy") as caught:
        enrol(Decision(genuine.pcrs("sha256", [7]), None, "open"), "open")
    assert "It has: none" in str(caught.value.hint)


def test_a_pin_on_top_of_the_stated_policy_is_let_through(genuine, enrol):
    genuine.create_key("both", "ecc-p256", {"pcr": "7", "pin": "yes"})
    decision = Decision(genuine.pcrs("sha256", [7]), None, "both")
    assert enrol(decision, "both").attributes["policy"].endswith("PIN")


def test_an_approver_and_values_beside_it_are_each_let_through_by_what_is_stated(
    genuine, enrol, public_pem
):
    """The TPM asks for both, so either statement of the office holds."""
    ours, theirs = public_pem("ours"), public_pem("theirs")
    genuine.create_key("both", "ecc-p256", {"approver": str(ours[0]), "pcr": "7"})
    values = genuine.pcrs("sha256", [7])
    for wanted in (Approver(ours[1]), values):
        assert enrol(Decision(wanted, None, "both"), "both")
    for wanted in (Approver(theirs[1]), genuine.pcrs("sha256", [8])):
        with pytest.raises(AttestationError, match="another policy"):
            enrol(Decision(wanted, None, "both"), "both")


def test_another_genuine_tpm_is_refused_in_the_place_of_the_device_that_was_meant(genuine, enrol):
    own = ek_id(make_request(genuine, "dev").ek)
    other = "11" * 32
    with pytest.raises(AttestationError, match=f"its endorsement key is {own}"):
        enrol(Decision(None, {other: Device(other)}, "dev"))
    assert enrol(Decision(None, {own: Device(own)}, "dev")).attributes["ek"] == own


def test_the_maker_that_is_signed_is_the_certificate_that_the_office_trusts(genuine, roots, enrol):
    """Not a name, which any of the makers could write."""
    trusted = {hashlib.sha256(anchor).hexdigest() for anchor in roots[0]}
    assert enrol(ANY).attributes["maker"] in trusted


def test_what_a_device_says_of_itself_is_not_signed(genuine, enrol):
    """Attributes that it makes up are dropped; the inventory's take their place."""
    own = ek_id(make_request(genuine, "dev").ek)

    def boast(request: Request) -> Request:
        lies = {"serial": "CEO-LAPTOP", "site": "vault 1", "tpm_attributes": "fips", "x": "y"}
        attributes = {**request.recipient.attributes, **lies}
        return dataclasses.replace(
            request, recipient=dataclasses.replace(request.recipient, attributes=attributes)
        )

    device = Device(own, "dev", {"name": "press 4", "serial": "A1"})
    attributes = dict(enrol(Decision(None, {own: device}), change=boast).attributes)
    assert attributes["serial"] == "A1"
    assert attributes["name"] == "press 4"
    assert attributes["tpm_attributes"].startswith("fixedTPM")
    assert set(attributes) == {
        *(
            "ak",
            "attested",
            "ek",
            "ek_issuer",
            "firmware",
            "maker",
            "name",
            "policy",
            "policy_digest",
        ),
        *("serial", "tpm_attributes", "tpm_name"),
    }


@pytest.mark.parametrize(("key", "version"), [("breakglass", "1"), ("dev", "9")])
def test_a_device_does_not_choose_the_name_and_version_that_the_office_signs(enrol, key, version):
    def rename(request: Request) -> Request:
        return dataclasses.replace(
            request, recipient=dataclasses.replace(request.recipient, key=key, version=version)
        )

    with pytest.raises(AttestationError, match=f"sent its key {key}@{version}, and dev@1"):
        enrol(ANY, change=rename)


def test_the_office_must_say_which_key(enrol):
    with pytest.raises(ConfigError, match="which key of the device"):
        enrol(Decision(None, None))


def malformed(request: Request):
    """Requests that are cut, empty or of no key, in every area."""
    data = json.loads(request.to_bytes())
    rsa = request.ek.raw[:-258]
    areas = [b"", b"\0", request.ek.raw[:-1], request.ek.raw + b"\0"]
    for modulus in (b"", b"\0", bytes(256), b"\1" + bytes(255), b"\xff" * 255, b"\xff" * 512):
        areas.append(rsa + sized(modulus))
    point = request.key.raw[:-68]
    areas += [point + sized(bytes(32)) * 2, point + sized(b"") * 2, point + sized(b"\1" * 33) * 2]
    for name in ("ek", "ak", "key"):
        for area in areas:
            yield name, {**data, name: _exchange._text(area)}
    certificate = request.certificate
    for cut in (b"", certificate[:4], certificate[:200], certificate[:-1], os.urandom(300)):
        yield "ek_certificate", {**data, "ek_certificate": _exchange._text(cut)}


def test_malformed_requests_end_in_the_usual_error(genuine, roots):
    for name, data in malformed(make_request(genuine, "dev")):
        with pytest.raises((FormatError, AttestationError)):
            challenge(Request.from_bytes(json.dumps(data).encode()), Makers(*roots))
        assert name


def test_an_endorsement_key_of_another_profile_is_refused(genuine, roots):
    """One that its owner may use for other things would open credentials as it is told."""
    asked = make_request(genuine, "dev")
    free = Public.parse(asked.ek.raw[:4] + u32(0x30072) + asked.ek.raw[8:])
    with pytest.raises(AttestationError, match="attributes of its profile"):
        challenge(dataclasses.replace(asked, ek=free), Makers(*roots))


OFFICE = Path(__file__).parents[2] / "wheels" / "office"


@pytest.mark.parametrize("seed", range(4))
def test_any_change_on_the_way_to_the_office_is_refused_with_the_usual_error(seed):
    """Bytes of a recorded request and response changed, taken out, put in."""
    chance = random.Random(seed)
    makers = Makers(split_file((OFFICE / "maker.pem").read_bytes()))
    state = json.loads((OFFICE / "d1.state").read_bytes())
    files = {
        "request": json.loads((OFFICE / "d1.request").read_bytes()),
        "response": json.loads((OFFICE / "d1.response").read_bytes()),
    }
    areas = [(file, name) for file, data in files.items() for name in data if name != "format"]
    for _ in range(60):
        file, name = chance.choice([area for area in areas if area[1] != "policy"])
        area = bytearray(base64.b64decode(files[file][name]))
        at = chance.randrange(len(area) + 1)
        area[at : at + chance.randrange(4)] = chance.randbytes(chance.randrange(4))
        text = base64.b64encode(area).decode()
        if text == files[file][name]:
            continue
        changed = {kind: dict(data) for kind, data in files.items()}
        changed[file][name] = text
        request = json.dumps(changed["request"]).encode()
        kept = dict(state)
        if file == "request":
            kept["request"] = base64.b64encode(request).decode()
        with pytest.raises((FormatError, AttestationError)):
            accept(json.dumps(kept).encode(), json.dumps(changed["response"]).encode(), makers, ANY)
    kept, sent = (OFFICE / "d1.state").read_bytes(), (OFFICE / "d1.response").read_bytes()
    assert accept(kept, sent, makers, ANY).attributes["attested"] == "tpm2"


@pytest.mark.parametrize("symmetric", ["0010", "000600000043", "000602000043", "000600c00043"])
def test_an_endorsement_key_with_a_cipher_that_no_profile_has_is_refused(genuine, roots, symmetric):
    """A challenge for it could not be encrypted, or not as its TPM would decrypt."""
    asked = make_request(genuine, "dev")
    usual = bytes.fromhex("000600800043")
    assert asked.ek.raw.count(usual) == 1
    odd = Public.parse(asked.ek.raw.replace(usual, bytes.fromhex(symmetric)))
    request = Request.from_bytes(dataclasses.replace(asked, ek=odd).to_bytes())
    with pytest.raises(AttestationError, match="attributes of its profile"):
        challenge(request, Makers(*roots))


def test_a_signature_that_fails_leaves_no_attested_file(commands, manufactured, genuine):
    home, run = commands
    _, ca = manufactured
    authorities = [text for path in sorted(ca.glob("*cert.pem")) for text in ("--ca", path)]
    enroll = ["tpm", "enroll"]
    run(*enroll, "request", "tpm:dev", "-o", "request")
    run(*enroll, "challenge", "request", "-o", "challenge", "--state", "state", *authorities)
    run(*enroll, "respond", "tpm:dev", "challenge", "-o", "response")
    accept = [*enroll, "accept", "response", "--state", "state", "-o", "dev.recipient"]
    accept += [*authorities, "--key", "dev", "--any-device", "--any-policy"]
    run(*accept, "--sign", "local:nobody", code=6)
    assert not (home / "dev.recipient").exists()
    # Nor where the signature cannot be written; and then it can be tried again.
    run("keys", "create", "local:enrolment", "--sign")
    (home / "dev.recipient.sig").write_text("somebody's")
    assert "exists" in run(*accept, "--sign", "local:enrolment", code=3)
    assert not (home / "dev.recipient").exists()
    assert (home / "dev.recipient.sig").read_text() == "somebody's"
    (home / "dev.recipient.sig").unlink()
    run(*accept, "--sign", "local:enrolment")
    assert (home / "dev.recipient.sig").exists()


def test_a_challenge_is_written_with_its_state_or_not_at_all(commands, manufactured):
    home, run = commands
    _, ca = manufactured
    authorities = [text for path in sorted(ca.glob("*cert.pem")) for text in ("--ca", path)]
    run("tpm", "enroll", "request", "tpm:dev", "-o", "request")
    (home / "challenge").write_text("another")
    asked = ["tpm", "enroll", "challenge", "request", "-o", "challenge", "--state", "state"]
    assert "exists" in run(*asked, *authorities, code=3)
    assert not (home / "state").exists()
    assert (home / "challenge").read_text() == "another"


def test_the_office_must_decide(commands, manufactured):
    home, run = commands
    _, ca = manufactured
    authorities = [text for path in sorted(ca.glob("*cert.pem")) for text in ("--ca", path)]
    run("tpm", "enroll", "request", "tpm:dev", "-o", "request")
    ask = ["tpm", "enroll", "challenge", "request", "-o", "challenge", "--state", "state"]
    run(*ask, *authorities)
    run("tpm", "enroll", "respond", "tpm:dev", "challenge", "-o", "response")
    accept = ["tpm", "enroll", "accept", "response", "--state", "state", "-o", "r", *authorities]
    assert "which policy must the key have?" in run(*accept, "--any-device", code=3)
    assert "whose TPM is it?" in run(*accept, "--any-policy", code=3)
    both = ["--any-policy", "--any-device", "--ek", "11" * 32]
    assert "whose TPM is it?" in run(*accept, *both, code=3)
    assert not (home / "r").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,site\na,b\n", "has the columns"),
        ("ek,ek\n" + "1" * 64 + ",x\n", "has the columns"),
        ("ek,colour\n" + "1" * 64 + ",red\n", "has the columns"),
        ("ek,name\nnonsense,a\n", "is no hash of an endorsement key"),
        ("ek,name\n" + "1" * 64 + "\n", "has not 2 fields"),
        ("ek,name\n" + "1" * 64 + ",a,b\n", "has not 2 fields"),
        ("ek,name\n" + ("1" * 64 + ",a\n") * 2, "for the second time"),
        ("ek,name\n" + "1" * 64 + ",\u202eevil\n", "not printable ASCII"),
        ("ek,key\n" + "1" * 64 + ",../x\n", "is no key"),
    ],
)
def test_an_inventory_that_is_wrong(tmp_path, text, said):
    path = tmp_path / "inventory.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_inventory(path)


def test_an_inventory_that_others_can_write(tmp_path):
    path = tmp_path / "inventory.csv"
    path.write_text("ek,name,site,serial\n" + "AB" * 32 + ",press 4,,A1\n")
    (device,) = read_inventory(path).values()
    assert device == Device("ab" * 32, None, {"name": "press 4", "serial": "A1"})
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="others can write it"):
        read_inventory(path)
