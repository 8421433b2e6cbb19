"""Quotes of a real emulator, checked as a service checks them, and what is no such quote."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from eventlog import ACTION, SEPARATOR, event, log
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from keymgmt_tpm2._structures import Public, sized, u16, u32
from keymgmt_tpm2.enroll._certificates import Makers
from keymgmt_tpm2.enroll._device import attestation_key, make_request, respond
from keymgmt_tpm2.enroll._exchange import accept, challenge
from keymgmt_tpm2.enroll._office import Decision
from keymgmt_tpm2.policy._approval import install
from keymgmt_tpm2.policy._policy import Counter, PcrState
from keymgmt_tpm2.quote import AttestationError, DevicePolicy, Devices
from keymgmt_tpm2.quote._evidence import TpmEvidence, TpmEvidenceSettings
from keymgmt_tpm2.quote._file import Quote
from office import Signer, boot

from keymgmt.backend import (
    ConfigError,
    FormatError,
    ProviderUnavailable,
    load_evidence,
)

BOOTED = [(4, b"a kernel"), (7, b"secure boot")]
ASKED = hashlib.sha256(b"a request").digest()
OTHER = hashlib.sha256(b"another request").digest()


@pytest.fixture
def office(tmp_path) -> Signer:
    return Signer(tmp_path / "office.pem")


@pytest.fixture
def enrolled(genuine, roots, office, tmp_path):
    """The recipient of a device that the office enrolled, in the folder of devices."""
    sent, kept = challenge(make_request(genuine, "plain_key"), Makers(*roots))
    answer = respond(genuine, "plain_key", sent)
    recipient = accept(kept, answer, Makers(*roots), Decision(None, None, "plain_key"))
    office.state(recipient, tmp_path / "devices" / "press4.recipient")
    return recipient


@pytest.fixture
def genuine(genuine):
    boot(genuine, *BOOTED)
    genuine.create_key("plain_key", "ecc-p256", {})
    return genuine


@pytest.fixture
def evidence(genuine):
    """Evidence of that device; members of its settings as arguments."""

    def make(**changes) -> TpmEvidence:
        used = genuine.settings
        values = {"keys": used.keys, "tcti": used.tcti, "srk_name": used.srk_name, "pcrs": "7"}
        return TpmEvidence(TpmEvidenceSettings(**(values | changes)))

    return make


@pytest.fixture
def policy(enrolled, office, tmp_path):
    """A policy with its files read; members as arguments."""

    def make(**members) -> Devices:
        values = {"devices": tmp_path / "devices", "attesters": [office.pem], "any_state": True}
        return Devices.read(DevicePolicy(**(values | members)))

    return make


@pytest.fixture
def values_file(tmp_path):
    def write(state: PcrState, name="values.json"):
        (tmp_path / name).write_text(json.dumps(state.to_json()))
        return tmp_path / name

    return write


def change(evidence: bytes, **members) -> bytes:
    return json.dumps(json.loads(evidence) | members).encode()


def twin(quote: Quote):
    """A key in software, its public area like the quote's, and the statement as of that key."""
    key = ec.generate_private_key(ec.SECP256R1())
    point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    ak = Public.parse(quote.ak.raw[:-68] + sized(point[1:33]) + sized(point[33:]))
    signer = u16(0x000B) + hashlib.sha256(u32(0x4000000B) + ak.name).digest()
    return key, ak, quote.attest.replace(quote.attest[8:42], signer)


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_an_enrolled_device_in_its_boot_state(genuine, evidence, policy, values_file, enrolled):
    assert load_evidence("tpm2") is TpmEvidence
    quote = evidence().quote(ASKED)
    said = policy().judge(Quote.verify(quote, ASKED))
    assert said == {"ek": enrolled.attributes["ek"], "firmware": enrolled.attributes["firmware"]}
    state = genuine.pcrs("sha256", [7])
    other = PcrState("sha256", {7: b"\1\2" * 16})
    files = [values_file(other, "other"), values_file(state)]
    assert policy(any_state=False, pcr_values=files).judge(Quote.verify(quote, ASKED))
    with pytest.raises(AttestationError, match="another boot state: PCR 7 of sha256 is"):
        policy(any_state=False, pcr_values=files[:1]).judge(Quote.verify(quote, ASKED))


def test_a_quote_of_another_request(evidence, policy):
    quote = evidence().quote(ASKED)
    with pytest.raises(AttestationError, match="of another request"):
        policy().judge(Quote.verify(quote, OTHER))


def test_a_device_that_booted_something_else(genuine, evidence, policy, values_file):
    wanted = policy(any_state=False, pcr_values=[values_file(genuine.pcrs("sha256", [7]))])
    before = evidence().quote(ASKED)
    boot(genuine, (7, b"rootkit"))
    after = evidence().quote(ASKED)
    with pytest.raises(AttestationError, match="another boot state"):
        wanted.judge(Quote.verify(after, ASKED))
    # Nor with the values that it had, which are not those of the quote.
    lie = change(after, state=json.loads(before)["state"])
    with pytest.raises(AttestationError, match="other PCR values than the evidence lists"):
        wanted.judge(Quote.verify(lie, ASKED))


def test_the_pcrs_that_a_policy_asks_for_are_quoted(genuine, evidence, policy, values_file):
    """A device does not choose which of its PCRs count, nor of which bank."""
    wanted = policy(any_state=False, pcr_values=[values_file(genuine.pcrs("sha256", [4, 7]))])
    assert wanted.judge(Quote.verify(evidence(pcrs="4,7,8").quote(ASKED), ASKED))
    with pytest.raises(AttestationError, match=r"PCR 4 of sha256 is missing"):
        wanted.judge(Quote.verify(evidence(pcrs="7").quote(ASKED), ASKED))
    quote = json.loads(evidence(pcrs="4,7").quote(ASKED))
    quote["state"]["bank"] = "sha384"
    quote["state"]["pcrs"] = {i: v + v[:32] for i, v in quote["state"]["pcrs"].items()}
    with pytest.raises(AttestationError, match="other PCR values"):
        wanted.judge(Quote.verify(json.dumps(quote).encode(), ASKED))


def test_a_machine_that_was_not_enrolled(make_swtpm, set_up, evidence, policy):
    """Another genuine-looking TPM, whose attestation key has all the right attributes."""
    other = set_up(make_swtpm("two"))
    stranger = evidence(tcti=other.tcti, srk_name=other.srk_name)
    with pytest.raises(AttestationError, match="is of no enrolled device"):
        policy().judge(Quote.verify(stranger.quote(ASKED), ASKED))
    with pytest.raises(ValueError, match="srk_name is required"):
        evidence(srk_name=None)


def test_a_quote_made_in_software(evidence, policy):
    """A key of the attacker's in the shape of an attestation key signs what it likes."""
    genuine_quote = Quote.from_bytes(evidence().quote(ASKED))
    key, ak, attest = twin(genuine_quote)
    signature = key.sign(attest, ec.ECDSA(hashes.SHA256()))
    forged = Quote(ak, attest, signature, genuine_quote.state)
    forged.check(ASKED)  # the form is right
    with pytest.raises(AttestationError, match="is of no enrolled device"):
        policy().judge(Quote.verify(forged.to_bytes(), ASKED))
    for lie in (
        dataclasses.replace(forged, ak=genuine_quote.ak),
        dataclasses.replace(genuine_quote, signature=signature),
    ):
        with pytest.raises(AttestationError, match="did not sign the quote"):
            policy().judge(Quote.verify(lie.to_bytes(), ASKED))


def test_a_key_that_is_not_restricted_proves_nothing(evidence, policy):
    """Such a key signs whatever a program makes up."""
    quote = Quote.from_bytes(evidence().quote(ASKED))
    raw = bytearray(quote.ak.raw)
    raw[5] &= ~1 & 0xFF  # restricted
    lie = dataclasses.replace(quote, ak=Public.parse(bytes(raw)))
    with pytest.raises(AttestationError, match="proves nothing"):
        policy().judge(Quote.verify(lie.to_bytes(), ASKED))


def test_a_certification_is_no_quote(genuine, evidence, policy):
    """What the attestation key says at enrolment is not taken for what a quote says."""
    version = genuine.keys.read("plain_key").newest

    def certify(tpm):
        session = tpm.session()
        ak, key = attestation_key(tpm), tpm.load(version.public, version.private)
        return tpm.certify(key, ak, ASKED, session)

    attest, signature = genuine.service.run("certifying", certify)
    quote = Quote.from_bytes(evidence().quote(ASKED))
    lie = dataclasses.replace(quote, attest=attest, signature=signature)
    with pytest.raises(AttestationError, match="something other than a quote"):
        policy().judge(Quote.verify(lie.to_bytes(), ASKED))


def test_an_approver_of_boot_states(genuine, evidence, policy, tmp_path):
    ours, theirs = Signer(tmp_path / "ours.pem"), Signer(tmp_path / "theirs.pem")
    wanted = policy(any_state=False, approver=ours.pem, counter=3)
    state = genuine.pcrs("sha256", [7])
    folder = genuine.settings.keys
    with pytest.raises(AttestationError, match="sent none of the approver"):
        wanted.judge(Quote.verify(evidence().quote(ASKED), ASKED))
    install(folder, theirs.approve(state))
    with pytest.raises(AttestationError, match="sent none of the approver"):
        wanted.judge(Quote.verify(evidence().quote(ASKED), ASKED))
    install(folder, ours.approve(state, Counter(0x01800100, 2)))
    with pytest.raises(AttestationError, match="its counter allows 2, less than 3"):
        wanted.judge(Quote.verify(evidence().quote(ASKED), ASKED))
    forged = dataclasses.replace(ours.approve(state), signature=theirs.approve(state).signature)
    lie = dataclasses.replace(Quote.from_bytes(evidence().quote(ASKED)), approvals=(forged,))
    with pytest.raises(AttestationError, match="not signed by the key"):
        wanted.judge(Quote.verify(lie.to_bytes(), ASKED))
    approval = ours.approve(state, Counter(0x01800100, 3))
    install(folder, approval)
    assert wanted.judge(Quote.verify(evidence().quote(ASKED), ASKED))["approval"] == approval.id
    boot(genuine, (7, b"rootkit"))
    with pytest.raises(AttestationError, match="sent none of the approver"):
        wanted.judge(Quote.verify(evidence().quote(ASKED), ASKED))  # it sends what fits
    lie = dataclasses.replace(Quote.from_bytes(evidence().quote(ASKED)), approvals=(approval,))
    with pytest.raises(AttestationError, match=r"no approval of this boot state: .*PCR 7"):
        wanted.judge(Quote.verify(lie.to_bytes(), ASKED))


def test_event_logs_of_known_machines(genuine, evidence, policy, tmp_path):
    """A device is let in whose events are known, in a mixture that no known machine has."""
    known = [tmp_path / "known1", tmp_path / "known2"]
    first = log(event(4, ACTION, b"a kernel"), event(4, ACTION, b"shim 1"))
    known[0].write_bytes(first + event(4, SEPARATOR, bytes(4)))
    known[1].write_bytes(log(event(4, ACTION, b"kernel 2"), event(9, ACTION, b"not compared")))
    wanted = policy(any_state=False, event_logs=known, event_pcrs="4")
    sent = tmp_path / "sent"
    device = evidence(pcrs="4,7", event_log=sent)
    measured = [(4, b"shim 1"), (4, bytes(4)), (4, b"kernel 2"), (8, b"anything")]
    boot(genuine, *measured)
    sent.write_bytes(log(*(event(index, ACTION, data) for index, data in BOOTED + measured)))
    quote = device.quote(ASKED)
    assert wanted.judge(Quote.verify(quote, ASKED))
    with pytest.raises(AttestationError, match="are not all quoted"):
        wanted.judge(Quote.verify(evidence(pcrs="7", event_log=sent).quote(ASKED), ASKED))
    with pytest.raises(AttestationError, match="sent no event log"):
        wanted.judge(Quote.verify(evidence(pcrs="4").quote(ASKED), ASKED))
    # Something else is measured: the log that tells of it is refused, and so is one that does not.
    honest = sent.read_bytes() + event(4, ACTION, b"rootkit")
    boot(genuine, (4, b"rootkit"))
    with pytest.raises(AttestationError, match="the event log is not of what PCR 4 holds"):
        wanted.judge(Quote.verify(device.quote(ASKED), ASKED))
    sent.write_bytes(honest)
    digest = hashlib.sha256(b"rootkit").hexdigest()
    with pytest.raises(AttestationError, match=f"is in no known event log: {digest}"):
        wanted.judge(Quote.verify(device.quote(ASKED), ASKED))


def test_an_event_log_that_is_too_long_or_gone_is_said(evidence, tmp_path):
    sent = tmp_path / "log"
    with pytest.raises(ProviderUnavailable, match="event log"):
        evidence(event_log=sent).quote(ASKED)
    sent.write_bytes(bytes((256 << 10) + 1))
    with pytest.raises(ProviderUnavailable, match="event log"):
        evidence(event_log=sent).quote(ASKED)


def test_only_some_of_the_devices(evidence, policy, enrolled):
    quote = evidence().quote(ASKED)
    assert policy(eks=[enrolled.attributes["ek"].upper()]).judge(Quote.verify(quote, ASKED))
    with pytest.raises(ConfigError, match="has no device that was enrolled"):
        policy(eks=["11" * 32])


def test_what_the_office_did_not_sign_is_refused(policy, office, enrolled, tmp_path):
    """Nor is what it vouched for, and did not prove; nor another content under its signature."""
    file = tmp_path / "devices" / "other.recipient"
    stranger = Signer(tmp_path / "stranger.pem")
    stranger.state(enrolled, file)
    with pytest.raises(ConfigError, match=r"other\.recipient is refused"):
        policy()
    office.state(enrolled, file, attested=False)
    with pytest.raises(ConfigError, match=r"other\.recipient is refused"):
        policy()
    office.state(enrolled, file)
    attributes = {**enrolled.attributes, "ak": "000b" + "22" * 32}
    file.write_bytes(dataclasses.replace(enrolled, attributes=attributes).to_bytes())
    with pytest.raises(ConfigError, match=r"other\.recipient is refused"):
        policy()
    (file.with_name(f"{file.name}.sig")).unlink()
    with pytest.raises(ConfigError, match=r"other\.recipient is refused"):
        policy()


def test_a_device_that_was_enrolled_before_its_attestation_key_was_written_down(
    policy, office, enrolled, tmp_path, caplog
):
    attributes = {name: each for name, each in enrolled.attributes.items() if name != "ak"}
    old = dataclasses.replace(enrolled, attributes=attributes)
    office.state(old, tmp_path / "devices" / "press4.recipient")
    with pytest.raises(ConfigError, match="has no device that was enrolled"):
        policy()
    assert "enrol that device again" in caplog.text


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"any_state": False}, "which boot state"),
        ({"approver": "approver.pem"}, "which boot state"),
        ({"any_state": False, "event_logs": ["log"]}, "belong together"),
        ({"event_pcrs": "7"}, "belong together"),
        ({"any_state": False, "event_logs": ["log"], "event_pcrs": "99"}, "from 0 to 23"),
        ({"attesters": []}, "at least 1"),
    ],
)
def test_policies_that_say_nothing_certain(members, reason, tmp_path):
    values = {"devices": "devices", "attesters": ["office.pem"], "any_state": True}
    with pytest.raises(ValueError, match=reason):
        DevicePolicy.model_validate(values | members, context={"base": tmp_path})


def test_files_of_a_policy_that_are_wrong(policy, values_file, tmp_path):
    zeros = values_file(PcrState("sha256", {16: bytes(32)}), "zeros")
    with pytest.raises(ConfigError, match="keep nobody out"):
        policy(any_state=False, pcr_values=[zeros])
    state = values_file(PcrState("sha256", {7: b"\1\2" * 16}))
    state.chmod(0o666)
    with pytest.raises(ConfigError, match="table of PCR values"):
        policy(any_state=False, pcr_values=[state])
    bad = tmp_path / "log"
    bad.write_bytes(b"no log")
    with pytest.raises(ConfigError, match="is no event log"):
        policy(any_state=False, event_logs=[bad], event_pcrs="7")
    bad.write_bytes(log(event(4, ACTION, b"x")))
    with pytest.raises(ConfigError, match="has an event of PCR 7"):
        policy(any_state=False, event_logs=[bad], event_pcrs="4,7")


def test_evidence_that_is_garbled(evidence, policy):
    """Cut anywhere, or with any byte of its parts changed: a typed refusal, and never an answer."""
    wanted, quote = policy(), evidence().quote(ASKED)

    def refused(content: bytes) -> None:
        with pytest.raises((AttestationError, FormatError)):
            wanted.judge(Quote.verify(content, ASKED))

    for length in range(0, len(quote), 97):
        refused(quote[:length])
    refused(change(quote, more=1))
    refused(change(quote, approvals=[1]))
    refused(change(quote, approvals=[{}] * 9))
    refused(change(quote, event_log=None))
    refused(change(quote, format="keymgmt.tpm2-quote/2"))
    refused(b"[" * 100_000)
    for name in ("ak", "attest", "signature"):
        part = base64.b64decode(json.loads(quote)[name])
        for length in range(len(part)):
            refused(change(quote, **{name: text(part[:length])}))
        refused(change(quote, **{name: text(part + b"\0")}))

    @given(
        st.sampled_from(["ak", "attest", "signature"]), st.integers(0, 10**6), st.integers(1, 255)
    )
    @hypothesis_settings(
        max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def one_byte(name: str, at: int, mask: int) -> None:
        part = bytearray(base64.b64decode(json.loads(quote)[name]))
        part[at % len(part)] ^= mask
        refused(change(quote, **{name: text(bytes(part))}))

    one_byte()


def test_a_statement_whose_parts_are_rearranged_is_refused(evidence, policy):
    """Signed by the enrolled key's twin in software: the structure itself is checked."""
    quote = Quote.from_bytes(evidence().quote(ASKED))
    key, ak, good = twin(quote)

    def check(attest: bytes) -> None:
        signature = key.sign(attest, ec.ECDSA(hashes.SHA256()))
        Quote(ak, attest, signature, quote.state).check(ASKED)

    check(good)
    wrong = [good[:length] for length in range(len(good))]
    wrong += [good + b"\0", b"\xfe" + good[1:], good.replace(ASKED, ASKED[:31] + b"\0")]
    wrong += [quote.attest]  # its signer is the other key
    for attest in wrong:
        with pytest.raises(AttestationError):
            check(attest)


def test_a_service_checks_quotes_without_the_library_of_a_tpm():
    code = "import sys, keymgmt_tpm2.quote; sys.exit('tpm2_pytss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
