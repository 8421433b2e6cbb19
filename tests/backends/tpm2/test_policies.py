"""Policies on swtpm: PIN, PCRs, approvals, counters; what opens, and what is said otherwise."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keymgmt_tpm2 import Tpm2Provider
from keymgmt_tpm2.policy import _approval
from keymgmt_tpm2.policy._approval import Approval
from keymgmt_tpm2.policy._counter import create_counter, raise_counter, read_counter
from keymgmt_tpm2.policy._policy import (
    Approver,
    Counter,
    PcrState,
    Policy,
    approved_digest,
    first_digest,
    increment_hash,
    raise_digest,
)

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    Dek,
    LockedOut,
    ProviderUnavailable,
    SecretSource,
)

CONTEXT = b"a context"


def extend(provider, index: int, data: bytes = b"update") -> None:
    """Measure something into a PCR, as a new firmware or kernel does."""
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    digests = t.TPML_DIGEST_VALUES(
        [
            t.TPMT_HA(
                hashAlg=c.TPM2_ALG.SHA256,
                digest=t.TPMU_HA(sha256=hashlib.sha256(data).digest()),
            )
        ]
    )
    handle = c.ESYS_TR.parse(f"pcr{index}")
    provider.service.run("extending", lambda tpm: tpm.call("pcr_extend", handle, digests))


def opens(provider, wrapped) -> bool:
    with provider.unwrap(wrapped, CONTEXT):
        return True


@pytest.fixture
def dek():
    with Dek.generate() as dek:
        yield dek


@pytest.fixture
def approver_key():
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def approver_pem(approver_key, tmp_path):
    path = tmp_path / "approver.pub"
    path.write_bytes(
        approver_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return path


@pytest.fixture
def approve(approver_key):
    """Sign a boot state as an approver does, offline."""
    der = approver_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def make(state, counter=None, *, ref="", key=approver_key) -> Approval:
        approver = Approver(der, ref)
        message = Approval.message(state, counter, approver)
        return Approval(state, counter, approver, key.sign(message, ec.ECDSA(hashes.SHA256())))

    return make


@pytest.fixture
def with_pin(settings, pin_file):
    with Tpm2Provider("tpm", settings.model_copy(update={"pin": SecretSource(file=pin_file)})) as p:
        yield p


def test_offline_digests_are_those_of_the_tpm(provider, approve, approver_key, sign_raise):
    """Every step of every policy, computed here and by the TPM."""
    from tpm2_pytss import constants as c

    value = create_counter(provider, sign_raise(approver_key, 1))
    state = provider.pcrs("sha256", [0, 7, 16])
    counter, approver = Counter(0x01800100, value), approve(state).approver

    made = counter.nv_index(approver)

    def on_tpm(tpm):
        session = tpm.session(policy=True)
        tpm.call("policy_pcr", session, b"", "sha256:0,7,16")
        first = bytes(tpm.call("policy_get_digest", session))
        index = tpm.persistent(counter.index)
        operand, operation = counter.operand, c.TPM2_EO.UNSIGNED_LE
        tpm.call("policy_nv", index, index, session, operand, operation, 0)
        second = bytes(tpm.call("policy_get_digest", session))
        tpm.call("policy_restart", session)
        tpm.call("policy_nv", index, index, session, operand, operation, 0)
        tpm.call("policy_cp_hash", session, increment_hash(tpm.name_of(index)))
        raised = bytes(tpm.call("policy_get_digest", session))
        tpm.call("policy_restart", session)
        tpm.call("policy_nv_written", session, written_set=False)
        tpm.call("policy_cp_hash", session, increment_hash(made.new_name))
        return first, second, raised, bytes(tpm.call("policy_get_digest", session))

    first, second, raised, started = provider.service.run("test", on_tpm)
    assert Policy(pcrs=state).digest == first
    assert approved_digest(state, counter, approver) == second
    assert raise_digest(Counter(0x01800100, value + 1), approver) == raised
    assert first_digest(counter, approver) == started


def test_pcrs_of_every_bank(provider):
    for bank, length in (("sha1", 20), ("sha256", 32), ("sha384", 48)):
        state = provider.pcrs(bank, range(24))
        assert len(state.values) == 24
        assert {len(value) for value in state.values.values()} == {length}


def test_a_key_bound_to_pcrs_closes_when_one_changes(provider, dek):
    provider.create_key("bound", "ecc-p256", {"pcr": "sha256:7,16"})
    wrapped = provider.wrap("bound", dek, CONTEXT)
    assert opens(provider, wrapped)
    extend(provider, 16)
    with pytest.raises(AccessDenied, match=r"PCR 16 of sha256 is [0-9a-f]+\.\.\., not 0000"):
        provider.unwrap(wrapped, CONTEXT)
    assert "PCR 16" in provider.check().findings[-1].detail
    # The key is not harmed; in the old boot state it opens again.


def test_the_tpm_itself_refuses_another_boot_state(provider, dek, monkeypatch):
    """Not our comparison: a client that skips it gets nowhere."""
    from keymgmt_tpm2.policy import _authorize

    provider.create_key("bound", "ecc-p256", {"pcr": "16"})
    wrapped = provider.wrap("bound", dek, CONTEXT)
    extend(provider, 16)
    monkeypatch.setattr(_authorize, "compare", lambda wanted, now: "")
    with pytest.raises(AccessDenied, match="policy of the key does not hold"):
        provider.unwrap(wrapped, CONTEXT)


@pytest.mark.parametrize("moving", [9, 8])
def test_a_pcr_that_moves_between_policy_and_use(provider, dek, monkeypatch, moving):
    """A machine that measures what it runs extends PCR 10 all the time: so it is tried again."""
    from keymgmt_tpm2._connection.tpm import Tpm
    from tpm2_pytss import constants as c

    provider.create_key("bound", "ecc-p256", {"pcr": "8"})
    wrapped = provider.wrap("bound", dek, CONTEXT)
    ecdh, moves = Tpm.ecdh, []

    def use(tpm, *arguments):
        if len(moves) < 12:
            moves.append(1)
            # PCR 9 is of no policy here, but it moves the counter that the TPM compares.
            tpm.call("pcr_event", c.ESYS_TR.parse(f"pcr{moving}"), b"moved")
        return ecdh(tpm, *arguments)

    monkeypatch.setattr(Tpm, "ecdh", use)
    if moving == 9:
        assert opens(provider, wrapped)
        assert len(moves) == 12
    else:
        with pytest.raises(AccessDenied, match=r"PCR 8 of sha256"):
            provider.unwrap(wrapped, CONTEXT)


def test_empty_auth_opens_no_policy_key(provider, dek):
    """userWithAuth is clear, so neither a password nor an HMAC session replaces the policy."""
    from keymgmt_tpm2._errors import TpmError

    provider.create_key("bound", "ecc-p256", {"pcr": "16"})
    version = provider.keys.read("bound").newest
    point = version.public.point
    for session in ("password", "hmac"):

        def attack(tpm, session=session):
            from tpm2_pytss import constants as c

            handle = tpm.load(version.public, version.private)
            chosen = c.ESYS_TR.PASSWORD if session == "password" else tpm.session()
            return tpm.ecdh(handle, point, chosen)

        with pytest.raises(AccessDenied, match="used only with its policy") as caught:
            provider.service.run("attack", attack)
        assert isinstance(caught.value.__cause__, TpmError)


def test_a_key_with_userwithauth_is_refused_before_use(provider, dek, monkeypatch):
    """A weaker key in the key directory is not used, whoever put it there."""
    from keymgmt_tpm2 import _templates

    good = _templates.attributes_for
    provider.create_key("bound", "ecc-p256", {"pcr": "16"})
    monkeypatch.setattr(
        _templates, "attributes_for", lambda kind, policy: good(kind, policy) | 0x40
    )
    provider.create_key("weak", "ecc-p256", {"pcr": "16"})
    monkeypatch.undo()
    with pytest.raises(ProviderUnavailable, match=r"its attributes are .*userWithAuth"):
        provider.wrap("weak", dek, CONTEXT)
    assert provider.wrap("bound", dek, CONTEXT)


def test_pin(with_pin, settings, dek, tmp_path):
    info = with_pin.create_key("dev", "ecc-p256", {"pin": "yes"})
    assert info.detail["policy"] == "PIN"
    assert info.detail["dictionary_attack_protection"] == "yes"
    wrapped = with_pin.wrap("dev", dek, CONTEXT)
    assert opens(with_pin, wrapped)
    with (
        Tpm2Provider("tpm", settings) as without,
        pytest.raises(AccessDenied, match="requires a PIN"),
    ):
        without.unwrap(wrapped, CONTEXT)


def test_lockout_says_how_long(with_pin, settings, dek, tmp_path):
    with_pin.create_key("dev", "ecc-p256", {"pin": "yes"})
    with_pin.create_key("open", "ecc-p256", {})
    wrapped, other = (with_pin.wrap(key, dek, CONTEXT) for key in ("dev", "open"))
    path = tmp_path / "wrong"
    path.write_text("wrong-pin")
    path.chmod(0o600)
    wrong = settings.model_copy(
        update={"pin": SecretSource(file=path), "use_last_try": True},
    )
    for count in (1, 2, 3):
        with (
            Tpm2Provider("tpm", wrong) as provider,
            pytest.raises(AccessDenied, match=rf"refused the PIN .*{count} of 3 wrong tries"),
        ):
            provider.unwrap(wrapped, CONTEXT)
    with pytest.raises(LockedOut, match="3 of 3 tries are counted") as caught:
        with_pin.unwrap(wrapped, CONTEXT)
    assert "1000 seconds" in str(caught.value.hint)
    lockout = next(f for f in with_pin.check().findings if f.name == "lockout")
    assert (lockout.status, lockout.detail[:6]) == ("failed", "locked")
    # Keys without a PIN are outside of dictionary-attack protection.
    assert opens(with_pin, other)


def test_a_pin_that_no_tpm_takes(with_pin, pin_file):
    pin_file.write_text("x" * 33)
    with pytest.raises(AccessDenied, match="more than 32 bytes"):
        with_pin.create_key("dev", "ecc-p256", {"pin": "yes"})


def test_pcrs_and_pin(with_pin, dek):
    with_pin.create_key("both", "ecc-p256", {"pin": "yes", "pcr": "16"})
    wrapped = with_pin.wrap("both", dek, CONTEXT)
    assert opens(with_pin, wrapped)
    extend(with_pin, 16)
    with pytest.raises(AccessDenied, match="PCR 16"):
        with_pin.unwrap(wrapped, CONTEXT)
    # The policy was known not to hold, so the PIN was not spent.
    assert "0 of 3" in with_pin.check().findings[3].detail


def test_an_update_that_was_approved_locks_nothing_out(provider, dek, approver_pem, approve):
    provider.create_key("fleet", "ecc-p256", {"approver": str(approver_pem)})
    wrapped = provider.wrap("fleet", dek, CONTEXT)
    with pytest.raises(AccessDenied, match="none of its approver is installed"):
        provider.unwrap(wrapped, CONTEXT)
    before = provider.pcrs("sha256", [7, 16])
    _approval.install(provider.keys.path, approve(before))
    assert opens(provider, wrapped)
    # The next state, approved before the update, from values that nobody measured here yet.
    digest = hashlib.sha256(before.values[16] + hashlib.sha256(b"update").digest()).digest()
    after = PcrState("sha256", {7: before.values[7], 16: digest})
    _approval.install(provider.keys.path, approve(after))
    assert opens(provider, wrapped)
    extend(provider, 16)
    assert opens(provider, wrapped)
    extend(provider, 16, b"something else")
    with pytest.raises(
        AccessDenied, match="no approval for the key 'fleet' holds now: PCR 16"
    ) as c:
        provider.unwrap(wrapped, CONTEXT)
    assert "policy sign" in str(c.value.hint)


def test_an_approval_needs_its_pin_all_the_same(with_pin, settings, dek, approver_pem, approve):
    with_pin.create_key("dev", "ecc-p256", {"approver": str(approver_pem), "pin": "yes"})
    wrapped = with_pin.wrap("dev", dek, CONTEXT)
    _approval.install(with_pin.keys.path, approve(with_pin.pcrs("sha256", [7])))
    assert opens(with_pin, wrapped)
    with (
        Tpm2Provider("tpm", settings) as without,
        pytest.raises(AccessDenied, match="requires a PIN"),
    ):
        without.unwrap(wrapped, CONTEXT)


def test_raising_the_counter_outdates_an_approval(
    provider, dek, approver_pem, approver_key, approve, sign_raise
):
    provider.create_key("dev", "ecc-p256", {"approver": str(approver_pem)})
    wrapped = provider.wrap("dev", dek, CONTEXT)
    value = create_counter(provider, sign_raise(approver_key, 1))
    state = provider.pcrs("sha256", [7])
    _approval.install(provider.keys.path, approve(state, Counter(0x01800100, value)))
    assert opens(provider, wrapped)
    assert raise_counter(provider, sign_raise(approver_key, value + 1)) == value + 1
    assert read_counter(provider) == value + 1
    with pytest.raises(AccessDenied, match="approval is outdated"):
        provider.unwrap(wrapped, CONTEXT)
    newer = approve(state, Counter(0x01800100, value + 1))
    _approval.install(provider.keys.path, newer)
    assert opens(provider, wrapped)


def test_a_counter_that_its_owner_took_away_and_made_again(
    provider, dek, approver_pem, approver_key, approve, sign_raise
):
    """Neither opens anything: without it approvals are refused, and the new one outdates them."""
    provider.create_key("dev", "ecc-p256", {"approver": str(approver_pem)})
    wrapped, start = provider.wrap("dev", dek, CONTEXT), sign_raise(approver_key, 4)
    value, state = create_counter(provider, start), provider.pcrs("sha256", [7])
    for number in (value - 1, value):
        approval = approve(state, Counter(0x01800100, number))
        _approval.install(provider.keys.path, approval)
    assert opens(provider, wrapped)
    provider.service.run("undefining", lambda tpm: tpm.nv_undefine(0x01800100, tpm.session()))
    with pytest.raises(AccessDenied, match="no counter 0x01800100"):
        provider.unwrap(wrapped, CONTEXT)
    assert create_counter(provider, start) == value + 1
    with pytest.raises(AccessDenied, match="approval is outdated"):
        provider.unwrap(wrapped, CONTEXT)
    newer = approve(state, Counter(0x01800100, value + 1))
    _approval.install(provider.keys.path, newer)
    assert opens(provider, wrapped)


def test_a_fleet_shares_a_value(
    provider, dek, approver_pem, approver_key, approve, make_swtpm, set_up, tmp_path, sign_raise
):
    """One approval and one raise for two TPMs, whose counters began at different values."""
    second = set_up(make_swtpm("two"), keys=tmp_path / "keys-two")
    with Tpm2Provider("tpm", second) as other:
        before = create_counter(other, sign_raise(approver_key, 5, index=0x01800101))
        assert before == 5
        state = provider.pcrs("sha256", [7])
        approval = approve(state, Counter(0x01800100, 12))
        start, raised = sign_raise(approver_key, 12), sign_raise(approver_key, 13)
        for device in (provider, other):
            device.create_key("dev", "ecc-p256", {"approver": str(approver_pem)})
            assert create_counter(device, start) == 12
            _approval.install(device.keys.path, approval)
            wrapped = device.wrap("dev", dek, CONTEXT)
            assert opens(device, wrapped)
            assert raise_counter(device, raised) == 13
            assert raise_counter(device, raised) == 13
            assert raise_counter(device, start) == 13
            with pytest.raises(AccessDenied, match="outdated"):
                device.unwrap(wrapped, CONTEXT)


def test_a_counter_that_is_not_there(provider, dek, approver_pem, approve):
    provider.create_key("dev", "ecc-p256", {"approver": str(approver_pem)})
    wrapped = provider.wrap("dev", dek, CONTEXT)
    approval = approve(provider.pcrs("sha256", [7]), Counter(0x01800101, 1 << 60))
    _approval.install(provider.keys.path, approval)
    with pytest.raises(AccessDenied, match="no counter 0x01800101"):
        provider.unwrap(wrapped, CONTEXT)


def test_a_counter_is_made_once(provider, approver_key, sign_raise):
    value = create_counter(provider, sign_raise(approver_key, 1))
    assert create_counter(provider, sign_raise(approver_key, 1)) == value
    with pytest.raises(ConfigError, match="in use"):
        create_counter(provider, sign_raise(ec.generate_private_key(ec.SECP256R1()), 1))


@pytest.mark.parametrize("how", ["other key", "other value", "other counter", "other ref"])
def test_forged_approvals_open_nothing(
    provider, dek, approver_pem, approver_key, approve, sign_raise, how
):
    provider.create_key("dev", "ecc-p256", {"approver": str(approver_pem)})
    wrapped = provider.wrap("dev", dek, CONTEXT)
    value = create_counter(provider, sign_raise(approver_key, 1))
    state = provider.pcrs("sha256", [16])
    raise_counter(provider, sign_raise(approver_key, value + 1))
    good = approve(state, Counter(0x01800100, value))
    if how == "other key":
        bad = approve(state, key=ec.generate_private_key(ec.SECP256R1()))
    elif how == "other value":
        extend(provider, 16)
        bad = Approval(provider.pcrs("sha256", [16]), None, good.approver, good.signature)
    elif how == "other counter":
        bad = Approval(state, Counter(0x01800100, value + 9), good.approver, good.signature)
    else:
        other = approve(state, ref="other")
        bad = Approval(state, None, good.approver, other.signature)
    with pytest.raises(ConfigError, match="not signed by the key that it names"):
        bad.check()
    # Even put in place by hand, past our own check: the TPM refuses it.
    _approval.install(provider.keys.path, bad)
    with pytest.raises(AccessDenied, match="the TPM refused the approval"):
        provider.unwrap(wrapped, CONTEXT)


def test_a_ref_narrows_an_approver(provider, dek, approver_pem, approve):
    provider.create_key("dev", "ecc-p256", {"approver": str(approver_pem), "ref": "edge"})
    wrapped = provider.wrap("dev", dek, CONTEXT)
    state = provider.pcrs("sha256", [7])
    _approval.install(provider.keys.path, approve(state))
    with pytest.raises(AccessDenied, match="none of its approver"):
        provider.unwrap(wrapped, CONTEXT)
    _approval.install(provider.keys.path, approve(state, ref="edge"))
    assert opens(provider, wrapped)


def test_damaged_approvals_are_passed_over(provider, dek, approver_pem, approve):
    provider.create_key("dev", "ecc-p256", {"approver": str(approver_pem)})
    wrapped = provider.wrap("dev", dek, CONTEXT)
    _approval.install(provider.keys.path, approve(provider.pcrs("sha256", [7])))
    folder = provider.keys.path / "approvals"
    for number, content in enumerate((b"", b"{}", b"[]", b'{"format": 1}')):
        path = folder / f"{number:064x}.json"
        path.write_bytes(content)
        path.chmod(0o600)
    assert opens(provider, wrapped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pcr": "7,x", "approver": "x"}, "not a list of PCRs"),
        ({"pcr": "24"}, "numbered from 0 to 23"),
        ({"pcr": "md5:7"}, "no PCR bank 'md5'"),
        ({"pcr": "seven"}, "not a list of PCRs"),
        ({"pin": "1234"}, "yes or no"),
        ({"ref": "x"}, "belongs to the option approver"),
        ({"approver": "/does/not/exist"}, "cannot read the approver"),
        ({"pcrs": "7"}, "knows no option 'pcrs'"),
    ],
)
def test_options_that_make_no_policy(provider, options, message):
    with pytest.raises(ConfigError, match=message):
        provider.create_key("dev", "ecc-p256", options)
    assert provider.list_keys() == []


def test_an_approver_must_be_p256(provider, tmp_path):
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    path = tmp_path / "p384.pub"
    path.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ConfigError, match="P-256"):
        provider.create_key("dev", "ecc-p256", {"approver": str(path)})


def test_rotation_keeps_the_policy_and_takes_present_pcrs(provider, dek):
    provider.create_key("bound", "ecc-p256", {"pcr": "16"})
    old = provider.wrap("bound", dek, CONTEXT)
    extend(provider, 16)
    info = provider.rotate_key("bound")
    assert [v.state for v in info.versions] == ["old", "active"]
    new = provider.wrap("bound", dek, CONTEXT)
    assert (old.version, new.version) == ("1", "2")
    assert opens(provider, new)
    with pytest.raises(AccessDenied, match="PCR 16"):
        provider.unwrap(old, CONTEXT)


def test_signing_keys_have_policies_too(with_pin):
    from keymgmt._crypto.signatures import algorithm_of, verify_signature

    with_pin.create_key("release", "ecdsa-p256", {"pin": "yes", "pcr": "16"})
    signature = with_pin.sign("release", b"a message")
    assert algorithm_of(signature.public_key) == "ecdsa-p256"
    assert signature.public_key == with_pin.public_key("release")
    assert verify_signature(signature.public_key, b"a message", signature.signature)
    assert not verify_signature(signature.public_key, b"another", signature.signature)
    extend(with_pin, 16)
    with pytest.raises(AccessDenied, match="PCR 16"):
        with_pin.sign("release", b"a message")
