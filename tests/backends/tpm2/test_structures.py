"""What is read from files and devices: any bytes are one thing or one kind of error."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from keymgmt_tpm2._keys import KeyDirectory
from keymgmt_tpm2._structures import Public, describe_attributes, sized, verifier_public
from keymgmt_tpm2._templates import KINDS, key_template, problem_with
from keymgmt_tpm2.enroll._exchange import Request
from keymgmt_tpm2.policy._approval import Approval, install, installed
from keymgmt_tpm2.policy._commands import _counter
from keymgmt_tpm2.policy._policy import Approver, PcrState, Policy, parse_pcrs

from keymgmt.backend import ConfigError, FormatError, JsonReader, ProviderUnavailable

OFFICE = Path(__file__).parents[2] / "wheels" / "office"
KEY = ec.generate_private_key(ec.SECP256R1())
DER = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
POINT = KEY.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
POLICIES = (
    Policy(),
    Policy(pin=True),
    Policy(pcrs=PcrState("sha256", {7: bytes(32)})),
    Policy(approver=Approver(DER, "ref"), pin=True),
)


def filled(kind: str, policy: Policy) -> bytes:
    """A template with a key in it."""
    if kind == "rsa-2048":
        return key_template(kind, policy)[:-2] + sized(b"\x91" * 256)
    return key_template(kind, policy)[:-4] + sized(POINT[1:33]) + sized(POINT[33:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_we_ask_for_is_what_we_accept(kind, policy):
    public = Public.parse(filled(kind, policy))
    assert problem_with(public, kind, policy) is None
    assert public.policy == policy.digest
    assert len(public.name) == 34
    words = describe_attributes(public.attributes)
    assert ("userWithAuth" in words) == (not policy.digest)
    assert ("noDA" in words) == (not policy.pin)
    written = json.loads(json.dumps(policy.to_json()))
    assert Policy.read(JsonReader(written, "the policy")) == policy


@pytest.mark.parametrize("kind", KINDS)
def test_every_changed_byte_is_refused_or_another_key(kind):
    policy = POLICIES[2]
    good = filled(kind, policy)
    original = Public.parse(good)
    for position in range(len(good)):
        changed = bytearray(good)
        changed[position] ^= 1
        try:
            public = Public.parse(bytes(changed))
        except ValueError:
            continue
        assert problem_with(public, kind, policy) or public.unique != original.unique


@given(st.binary(max_size=200))
def test_any_bytes_are_a_public_area_or_a_value_error(data):
    for content in (data, filled("ecc-p256", POLICIES[0])[:20] + data):
        try:
            public = Public.parse(content)
        except ValueError:
            continue
        assert public.raw == content


def test_leading_zeros_of_a_coordinate_come_back():
    """A TPM may leave them out; the point is always 65 bytes."""
    short = key_template("ecc-p256", POLICIES[0])[:-4] + sized(b"\x07") + sized(POINT[33:])
    point = Public.parse(short).point
    assert len(point) == 65
    assert point[1:33] == b"\0" * 31 + b"\x07"


def test_only_p256_and_rsa_verify_approvals():
    assert verifier_public(KEY.public_key()).der() == DER
    signer = rsa.generate_private_key(65537, 2048).public_key()
    assert verifier_public(signer).key() == signer
    for other in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 1024)):
        with pytest.raises(ValueError, match="P-256"):
            verifier_public(other.public_key())


def huge_exponent() -> bytes:
    """An RSA key whose exponent is larger than a TPM has room for."""
    modulus = rsa.generate_private_key(65537, 2048).public_key().public_numbers().n
    key = rsa.RSAPublicNumbers((1 << 40) + 1, modulus).public_key()
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


STRANGE = {
    "kind": DER.replace(bytes.fromhex("2a8648ce3d0201"), bytes.fromhex("2a8648ce3d0263")),
    "curve": DER.replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d030163")),
    "exponent": huge_exponent(),
}
"""Keys that are well-formed, and of an algorithm or a size that is not known here."""


@pytest.mark.parametrize("strange", STRANGE)
def test_a_key_of_an_unknown_kind_is_malformed_wherever_it_lies(strange, tmp_path, caplog):
    """One device's file must not end the work on the files of all others."""
    public_key = base64.b64encode(STRANGE[strange]).decode()
    with pytest.raises(ValueError, match=r"TPM|key"):
        Approver(STRANGE[strange])
    request = json.loads((OFFICE / "d1.request").read_bytes())
    request["policy"]["approver"] = {"public_key": public_key, "ref": ""}
    with pytest.raises(FormatError, match="request is malformed"):
        Request.from_bytes(json.dumps(request).encode())
    signature = bytes.fromhex("3006020101020101")
    approval = Approval(PcrState("sha256", {7: bytes(32)}), None, Approver(DER), signature)
    wrong = json.loads(approval.to_bytes())
    wrong["approver"]["public_key"] = public_key
    beside = install(tmp_path, approval).with_name("0" * 64 + ".json")
    beside.write_text(json.dumps(wrong))
    beside.chmod(0o600)
    assert installed(tmp_path) == [approval]
    assert f"{beside} is passed over" in caplog.text


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("7", ("sha256", (7,))), ("sha1:2,0,2", ("sha1", (0, 2))), ("sha384:23", ("sha384", (23,)))],
)
def test_lists_of_pcrs(text, parsed):
    assert parse_pcrs(text) == parsed


@pytest.mark.parametrize(
    "text", ["7", "0x01800100", "0x01800100=", "0x01800100=-1", f"0x01800100={10**20}", "x=1", "=1"]
)
def test_what_is_no_counter_of_an_approval(text):
    with pytest.raises(ConfigError, match=r"--counter|no NV index"):
        _counter(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=10), children, max_size=3)
    ),
    max_leaves=8,
)


def key_file() -> dict:
    public = base64.b64encode(filled("ecc-p256", POLICIES[2])).decode()
    version = {"version": "1", "created": "2026-01-01T00:00:00Z", "retired": False}
    version |= {"public": public, "private": "AAAA", "policy": POLICIES[2].to_json()}
    return {"format": "keymgmt.tpm2-key/1", "key": "dev", "kind": "ecc-p256", "versions": [version]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys")
    path.chmod(0o700)
    return KeyDirectory(path, "tpm")


def test_the_key_file_of_these_tests_is_good(directory):
    (directory.path / "dev.json").write_text(json.dumps(key_file()))
    assert directory.read("dev").info().newest == "1"


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_change_of_a_key_file_is_a_key_or_unavailable(directory, data):
    content = key_file()
    place = data.draw(st.sampled_from([content, content["versions"][0]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    (directory.path / "dev.json").write_text(json.dumps(content))
    try:
        directory.read("dev")
    except ProviderUnavailable:
        return


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_change_of_an_approval_is_one_or_refused(data):
    state = PcrState("sha256", {7: bytes(32)})
    signature = bytes.fromhex("3006020101020101")
    content = json.loads(Approval(state, None, Approver(DER), signature).to_bytes())
    places = [content, content["state"], content["approver"]]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    try:
        Approval.read(JsonReader(content, "the approval"))
    except (FormatError, ValueError):
        return


@settings(deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_request_or_a_format_error(content):
    with pytest.raises(FormatError):
        Request.from_bytes(content)
