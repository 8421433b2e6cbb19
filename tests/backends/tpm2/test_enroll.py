"""Enrolment on swtpm with a certified endorsement key, and the ways to cheat at it."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keymgmt_tpm2 import Tpm2Provider
from keymgmt_tpm2._structures import Public, sized, u16, u32
from keymgmt_tpm2._templates import AK_ATTRIBUTES, attributes_for
from keymgmt_tpm2.enroll import _exchange
from keymgmt_tpm2.enroll._certificates import AttestationError, Makers
from keymgmt_tpm2.enroll._device import make_request, respond
from keymgmt_tpm2.enroll._exchange import Request, accept, answer_value, challenge
from keymgmt_tpm2.enroll._office import Decision, ek_id
from keymgmt_tpm2.policy._policy import Policy

from keymgmt.backend import AccessDenied, Dek, FormatError, KeyNotFound, Recipient, wrap_for

CONTEXT = b"a context"
ANY = Decision(None, None, "dev")


def software_key(kind: str = "ecc-p256", policy: Policy | None = None) -> Public:
    """The public area of a key that lives in software and claims to be in a TPM."""
    point = ec.generate_private_key(ec.SECP256R1()).public_key()
    raw = point.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    attributes = AK_ATTRIBUTES if kind == "ak" else attributes_for(kind, policy or Policy())
    scheme = u16(0x0018) + u16(0x000B) if kind == "ak" else u16(0x0010)
    head = u16(0x0023) + u16(0x000B) + u32(attributes) + sized(policy.digest if policy else b"")
    rest = u16(0x0010) + scheme + u16(3) + u16(0x0010) + sized(raw[1:33]) + sized(raw[33:])
    return Public.parse(head + rest)


@pytest.mark.parametrize("options", [{}, {"pcr": "7"}, {"pin": "yes"}, {"pin": "yes", "pcr": "7"}])
def test_an_attested_recipient(genuine, roots, options):
    genuine.create_key("key", "ecc-p256", options)
    sent, kept = challenge(
        Request.from_bytes(make_request(genuine, "key").to_bytes()), Makers(*roots)
    )
    wanted = Decision(None, None, "key")
    recipient = accept(kept, respond(genuine, "key", sent), Makers(*roots), wanted)
    assert recipient.attributes["attested"] == "tpm2"
    assert recipient.attributes["policy"] == genuine.describe_key("key").detail["policy"]
    assert "swtpm" in recipient.attributes["ek_issuer"]
    with Dek.generate() as dek:
        wrapped = wrap_for(recipient, dek, CONTEXT)
        with genuine.unwrap(wrapped, CONTEXT) as again:
            assert again == dek


def test_rsa_keys_enrol_too(genuine, roots):
    genuine.create_key("key", "rsa-2048", {})
    sent, kept = challenge(make_request(genuine, "key"), Makers(*roots))
    wanted = Decision(None, None, "key")
    recipient = accept(kept, respond(genuine, "key", sent), Makers(*roots), wanted)
    assert recipient.kind == "RSA-OAEP-256"


def test_a_tpm_without_a_certificate(provider):
    provider.create_key("dev", "ecc-p256", {})
    with pytest.raises(KeyNotFound, match="carries no certificate"):
        make_request(provider, "dev")


def test_an_unknown_maker_is_refused(genuine, roots):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Another maker")])
    from datetime import UTC, datetime, timedelta

    key = ec.generate_private_key(ec.SECP256R1())
    other = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    with pytest.raises(AttestationError, match="no trusted manufacturer"):
        challenge(make_request(genuine, "dev"), Makers([other], roots[1]))
    with pytest.raises(AttestationError, match="no trusted manufacturer"):
        challenge(make_request(genuine, "dev"), Makers(roots[0] if roots[1] else [other]))


def test_a_certificate_beside_another_endorsement_key_is_refused(genuine, roots):
    asked = make_request(genuine, "dev")
    number = rsa.generate_private_key(65537, 2048).public_key().public_numbers().n
    raw = asked.ek.raw[:-256] + number.to_bytes(256, "big")
    with pytest.raises(AttestationError, match="another endorsement key"):
        challenge(dataclasses.replace(asked, ek=Public.parse(raw)), Makers(*roots))


def test_a_ca_of_the_maker_is_no_endorsement_certificate(genuine, roots):
    asked = make_request(genuine, "dev")
    with pytest.raises(AttestationError, match="no trusted manufacturer"):
        challenge(dataclasses.replace(asked, certificate=roots[0][0]), Makers(*roots))
    with pytest.raises(AttestationError, match="not a DER certificate"):
        challenge(dataclasses.replace(asked, certificate=b"nonsense"), Makers(*roots))


def test_a_software_attestation_key_beside_a_genuine_certificate_is_refused(genuine, roots):
    """It says all the right things of itself; the TPM does not open its credential."""
    key = ec.generate_private_key(ec.SECP256R1())
    ak = software_key("ak")
    point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    ak = Public.parse(ak.raw[:-68] + sized(point[1:33]) + sized(point[33:]))
    asked = dataclasses.replace(make_request(genuine, "dev"), ak=ak)
    sent, kept = challenge(asked, Makers(*roots))
    # The device refuses a challenge for another request; past that, its TPM refuses.
    with pytest.raises(FormatError, match="not for this device's key"):
        respond(genuine, "dev", sent)
    digest, *_ = _exchange.read_challenge(sent)
    forced = json.loads(sent) | {"request": make_request(genuine, "dev").digest.hex()}
    with pytest.raises(AccessDenied, match="cannot open the credential"):
        respond(genuine, "dev", json.dumps(forced).encode())
    # So the attacker signs with a secret that he must guess.
    value = answer_value(bytes(32), digest)
    name = sized(asked.key.name)
    signer = u16(0x000B) + hashlib.sha256(u32(0x4000000B) + ak.name).digest()
    attest = bytes.fromhex("ff5443478017") + sized(signer) + sized(value) + bytes(25)
    attest += name + sized(b"")
    response = _exchange.write_response(attest, key.sign(attest, ec.ECDSA(hashes.SHA256())))
    with pytest.raises(AttestationError, match="could not open its credential"):
        accept(kept, response, Makers(*roots), ANY)


def test_an_unrestricted_attestation_key_is_refused(genuine, roots):
    """It would sign a statement that no TPM made."""
    asked = make_request(genuine, "dev")
    attributes = AK_ATTRIBUTES & ~0x10000
    ak = Public.parse(asked.ak.raw[:4] + u32(attributes) + asked.ak.raw[8:])
    with pytest.raises(AttestationError, match="proves nothing"):
        challenge(dataclasses.replace(asked, ak=ak), Makers(*roots))


def test_a_software_key_beside_a_genuine_attestation_key_is_refused(genuine, roots):
    asked = make_request(genuine, "dev")
    key = software_key("ecc-p256", asked.policy)
    recipient = dataclasses.replace(asked.recipient, public_key=key.point)
    sent, kept = challenge(dataclasses.replace(asked, key=key, recipient=recipient), Makers(*roots))
    forced = json.loads(sent) | {"request": asked.digest.hex()}
    response = respond(genuine, "dev", json.dumps(forced).encode())
    with pytest.raises(AttestationError, match=r"not to this challenge|certified another key"):
        accept(kept, response, Makers(*roots), ANY)


def test_a_recipient_of_another_key_than_the_certified_one_is_refused(genuine, roots):
    asked = make_request(genuine, "dev")
    recipient = dataclasses.replace(asked.recipient, public_key=software_key().point)
    with pytest.raises(AttestationError, match="recipient is of another key"):
        challenge(dataclasses.replace(asked, recipient=recipient), Makers(*roots))


def test_attributes_and_policy_of_the_key_are_checked(genuine, roots):
    asked = make_request(genuine, "dev")
    weak = Public.parse(asked.key.raw[:4] + u32(0x20472) + asked.key.raw[8:])
    with pytest.raises(AttestationError, match="userWithAuth"):
        challenge(dataclasses.replace(asked, key=weak), Makers(*roots))
    with pytest.raises(AttestationError, match="the key is refused"):
        challenge(dataclasses.replace(asked, policy=Policy()), Makers(*roots))
    with pytest.raises(AttestationError, match="policy is not the policy"):
        challenge(
            dataclasses.replace(asked, policy=Policy(pcrs=genuine.pcrs("sha256", [8]))),
            Makers(*roots),
        )


def test_responses_are_for_one_request_and_one_challenge(genuine, roots):
    asked = make_request(genuine, "dev")
    sent, _ = challenge(asked, Makers(*roots))
    _, other_state = challenge(asked, Makers(*roots))
    response = respond(genuine, "dev", sent)
    with pytest.raises(AttestationError, match="not to this challenge"):
        accept(other_state, response, Makers(*roots), ANY)
    attest, signature = _exchange.read_response(response)
    for bad in (attest[:-1], attest[:-1] + bytes([attest[-1] ^ 1]), b"\0" + attest[1:], b""):
        with pytest.raises(AttestationError, match=r"did not sign|malformed"):
            accept(other_state, _exchange.write_response(bad, signature), Makers(*roots), ANY)
    genuine.rotate_key("dev")
    with pytest.raises(FormatError, match="as it is now") as caught:
        respond(genuine, "dev", sent)
    assert "rotated" in str(caught.value.hint)


def test_files_that_are_none(genuine, roots):
    asked = make_request(genuine, "dev").to_bytes()
    sent, kept = challenge(Request.from_bytes(asked), Makers(*roots))
    for bad in (b"", b"{}", b"[]", b"[" * 100000, sent):
        with pytest.raises(FormatError):
            Request.from_bytes(bad)
        with pytest.raises(FormatError):
            accept(bad, sent, Makers(*roots), ANY)
        if bad is not sent:
            with pytest.raises(FormatError):
                respond(genuine, "dev", bad)
            with pytest.raises(FormatError):
                accept(kept, bad, Makers(*roots), ANY)
    for name in json.loads(asked):
        data = json.loads(asked)
        for value in (None, 1, "!", [], {}):
            with pytest.raises(FormatError):
                Request.from_bytes(json.dumps(data | {name: value}).encode())


@pytest.mark.parametrize("encrypted", [True, False])
def test_the_credential_secret_is_not_on_the_wire(
    genuine, roots, make_wire, monkeypatch, request, encrypted
):
    from keymgmt_tpm2._connection.tpm import Tpm

    secrets, activate = [], Tpm.activate

    def keep(*args):
        secret = activate(*args)
        secrets.append(bytes(secret))
        return secret

    monkeypatch.setattr(Tpm, "activate", keep)
    if not encrypted:
        request.getfixturevalue("unencrypted")
    wire = make_wire(int(genuine.settings.tcti.rpartition("=")[2]))
    settings = genuine.settings.model_copy(update={"tcti": wire.tcti})
    with Tpm2Provider("tpm", settings) as tapped:
        sent, _ = challenge(make_request(tapped, "dev"), Makers(*roots))
        respond(tapped, "dev", sent)
    assert len(secrets[0]) == 32
    assert (secrets[0] in wire.recorded) is not encrypted


def test_a_device_enrolled_with_the_commands(commands, manufactured, genuine):
    home, run = commands
    _, ca = manufactured
    authorities = []
    for path in sorted(ca.glob("*cert.pem")):
        authorities += ["--ca", path]
    run("keys", "create", "local:enrolment", "--sign")
    run("keys", "export", "local:enrolment", "--format", "pem", "-o", "enrolment.pem")
    enroll = ["tpm", "enroll"]
    run(*enroll, "request", "tpm:dev", "-o", "request")
    said = run(*enroll, "challenge", "request", "-o", "challenge", "--state", "state", *authorities)
    values = genuine.pcrs("sha256", [7])
    assert f"policy: PCR sha256:7 is {values.values[7].hex()}" in said
    assert (home / "state").stat().st_mode & 0o777 == 0o600
    run(*enroll, "respond", "tpm:dev", "challenge", "-o", "response")
    (home / "values.json").write_text(run("tpm", "pcrs", "tpm", "--pcr", "7", "--json"))
    accept = [*enroll, "accept", "response", "--state", "state", "-o", "dev.recipient"]
    accept += [*authorities, "--key", "dev", "--pcr-values", "values.json"]
    ek = ek_id(make_request(genuine, "dev").ek)
    refused = run(*accept, code=3)
    assert f"Its endorsement key is {ek}" in refused
    assert f"endorsement key {ek}" in said
    assert not (home / "dev.recipient").exists()
    said = run(*accept, "--ek", ek, "--sign", "local:enrolment")
    assert "is in a TPM certified by" in said
    assert not (home / "state").exists()

    (home / "model").mkdir()
    (home / "model" / "weights").write_bytes(b"weights")
    run("seal", "model", "m.sealed", "--name", "m", "--to", "@dev.recipient")
    run("unseal", "m.sealed", "out")
    # A build machine may demand more than that it is attested.
    config, stated = home / "keymgmt.toml", Recipient.load(home / "dev.recipient").attributes
    assert stated["policy_digest"] in said
    assert stated["maker"] in said
    plain = config.read_text()
    for digest, code in ((stated["policy_digest"], 0), ("11" * 32, 4)):
        wanted = f'{{ policies = ["{digest}"], makers = ["{stated["maker"]}"] }}'
        config.write_text(plain.replace("require_attested = true", f"require_attested = {wanted}"))
        run("seal", "model", f"{code}.sealed", "--name", "m", "--to", "@dev.recipient", code=code)
    config.write_text(plain)
    # One that was only exported is not sealed to.
    exported = run("keys", "export", "tpm:dev", "--format", "recipient", "-o", "plain.recipient")
    fingerprint = exported.split()[-1]
    seal = ["seal", "model", "n.sealed", "--name", "m", "--to", "@plain.recipient"]
    assert "not attested" in run(*seal, "--fingerprint", fingerprint, code=4)


def test_commands_refuse_what_does_not_fit(commands, manufactured):
    home, run = commands
    _, ca = manufactured
    root, *_ = sorted(ca.glob("*root*cert.pem")) or sorted(ca.glob("*cert.pem"))
    enroll = ["tpm", "enroll"]
    run(*enroll, "request", "tpm:dev", "-o", "request")
    assert "exists" in run(*enroll, "request", "tpm:dev", "-o", "request", code=3)
    challenge = [*enroll, "challenge", "request", "-o", "c", "--state", "s"]
    (home / "empty.pem").write_text("")
    assert "no certificates in PEM or DER" in run(*challenge, "--ca", "empty.pem", code=3)
    run("keys", "create", "local:x", "--sign")
    assert "cannot read" in run(*challenge, "--ca", "missing.pem", code=3)
    assert "enrolment challenge has the format" in run(
        *enroll, "respond", "tpm:dev", "request", "-o", "r", code=4
    )
    assert not (home / "s").exists()
    (home / "s").write_text("{}")
    (home / "s").chmod(0o644)
    accept = [*enroll, "accept", "request", "-o", "x", "--state", "s", "--ca", root]
    assert "others can use it" in run(*accept, code=3)
