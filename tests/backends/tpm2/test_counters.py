"""Counters that an approver alone moves, on a TPM whose owner has no password, as is usual."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keymgmt_tpm2 import Tpm2Provider
from keymgmt_tpm2._errors import TpmError
from keymgmt_tpm2.policy import _counter
from keymgmt_tpm2.policy._approval import Approval
from keymgmt_tpm2.policy._counter import Raise, create_counter, raise_counter, read_counter
from keymgmt_tpm2.policy._index import NvIndex
from keymgmt_tpm2.policy._policy import (
    Approver,
    Counter,
    approved_digest,
    first_digest,
    increment_hash,
    raise_digest,
)
from keymgmt_tpm2.policy._stated import read_json_file

from keymgmt.backend import ConfigError, KeyNotFound, ProviderError

INDEX = 0x01800100
POLICY_NV, POLICY_FAIL, NV_LOCKED_OUT = 0x126, 0x09D, (0x12F, 0x149)


@pytest.fixture
def key():
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def approver(key):
    return Approver(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


@pytest.fixture
def value(provider, key, sign_raise):
    """Of the counter, after its approver raised it."""
    return create_counter(provider, sign_raise(key, 3))


def refused(provider, attempt) -> int:
    """The TPM's code, after which the counter has the value that it had."""
    before = read_counter(provider)

    def operation(tpm):
        try:
            attempt(tpm, tpm.persistent(INDEX))
        except TpmError as error:
            return error.code
        raise AssertionError("the counter was moved")

    code = provider.service.run("attacking", operation)
    assert read_counter(provider) == before
    return code


def by_policy(tpm, handle, *steps, approved=None):
    """Increment in a policy session after some steps, and PolicyAuthorize where approved."""
    session = tpm.session(policy=True)
    for name, *arguments in steps:
        tpm.call(name, *[session if each == "S" else each for each in arguments])
    if approved is not None:
        approver, digest, ref, signature = approved
        ticket = tpm.verify(approver.structure(), digest + ref, signature)
        tpm.call("policy_authorize", session, digest, approver.structure().name, ticket, ref)
    tpm.call("nv_increment", handle, auth_handle=handle, session1=session)


def test_the_owner_without_a_password_cannot_move_it(provider, value):
    from tpm2_pytss import constants as c

    def owner(tpm, handle):
        tpm.call("nv_increment", handle, auth_handle=c.ESYS_TR.OWNER)

    def owner_session(tpm, handle):
        session = tpm.session()
        tpm.call("nv_increment", handle, auth_handle=c.ESYS_TR.OWNER, session1=session)

    def owner_writes(tpm, handle):
        tpm.call("nv_write", handle, bytes(8), 0, auth_handle=c.ESYS_TR.OWNER)

    def platform(tpm, handle):
        tpm.call("nv_increment", handle, auth_handle=c.ESYS_TR.PLATFORM)

    for attempt in (owner, owner_session, platform):
        assert refused(provider, attempt) in NV_LOCKED_OUT
    assert refused(provider, owner_writes)


def test_its_empty_password_does_not_move_it(provider, value):
    def password(tpm, handle):
        tpm.call("nv_increment", handle, auth_handle=handle)

    def session(tpm, handle):
        tpm.call("nv_increment", handle, auth_handle=handle, session1=tpm.session())

    def empty_policy(tpm, handle):
        by_policy(tpm, handle)

    def auth_value(tpm, handle):
        by_policy(tpm, handle, ("policy_auth_value", "S"))

    for attempt in (password, session):
        assert refused(provider, attempt) in NV_LOCKED_OUT
    for attempt in (empty_policy, auth_value):
        assert refused(provider, attempt) == POLICY_FAIL


def test_an_approval_of_a_boot_state_does_not_move_it(provider, value, key, approver):
    """Nor does one with the counter in it: the refs tell them apart, and the command does."""
    from tpm2_pytss import constants as c

    state = provider.pcrs("sha256", [7])
    counter = Counter(INDEX, value)
    signature = key.sign(Approval.message(state, counter, approver), ec.ECDSA(hashes.SHA256()))
    digest = approved_digest(state, counter, approver)

    def attempt(ref):
        def run(tpm, handle):
            operand = counter.operand
            condition = ("policy_nv", handle, handle, "S", operand, c.TPM2_EO.UNSIGNED_LE, 0)
            approved = (approver, digest, ref, signature)
            by_policy(
                tpm, handle, ("policy_pcr", "S", b"", "sha256:7"), condition, approved=approved
            )

        return run

    # The TPM takes the approval, and its ref is not that of counters.
    assert refused(provider, attempt(b"")) == POLICY_FAIL
    # Under the ref of counters the signature is of something else.
    assert refused(provider, attempt(approver.counter_ref)) == 0x09B


def test_a_raise_that_was_used_does_nothing_more(provider, value, key, approver, sign_raise):
    from tpm2_pytss import constants as c

    used = sign_raise(key, value)

    def again(tpm, handle):
        operand = Counter(INDEX, value - 1).operand
        condition = ("policy_nv", handle, handle, "S", operand, c.TPM2_EO.UNSIGNED_LE, 0)
        digest = raise_digest(used.counter, approver)
        approved = (approver, digest, approver.counter_ref, used.signature)
        command = ("policy_cp_hash", "S", increment_hash(tpm.name_of(handle)))
        by_policy(tpm, handle, condition, command, approved=approved)

    def without_its_condition(tpm, handle):
        digest = raise_digest(used.counter, approver)
        approved = (approver, digest, approver.counter_ref, used.signature)
        by_policy(tpm, handle, approved=approved)

    def the_start(tpm, handle):
        digest = first_digest(used.counter, approver)
        approved = (approver, digest, approver.counter_ref, used.first)
        written = ("policy_nv_written", "S", False)
        new_name = used.counter.nv_index(approver).new_name
        command = ("policy_cp_hash", "S", increment_hash(new_name))
        by_policy(tpm, handle, written, command, approved=approved)

    assert refused(provider, again) == POLICY_NV
    assert refused(provider, without_its_condition)
    assert refused(provider, the_start)
    assert raise_counter(provider, used) == value


def test_a_raise_of_another_counter_of_the_approver_does_not_move_it(
    provider, value, key, approver, sign_raise
):
    """It names the one that is lower, and the one that is counted up."""
    from tpm2_pytss import constants as c

    other = INDEX + 1
    create_counter(provider, sign_raise(key, value + 1, index=other))
    unused = sign_raise(key, value + 50, index=other)
    digest = raise_digest(unused.counter, approver)
    approved = (approver, digest, approver.counter_ref, unused.signature)
    operand = Counter(other, unused.counter.value - 1).operand

    def attempt(command):
        def run(tpm, handle):
            lower = tpm.persistent(other)
            condition = ("policy_nv", lower, lower, "S", operand, c.TPM2_EO.UNSIGNED_LE, 0)
            by_policy(tpm, handle, condition, command, approved=approved)

        return run

    name = unused.counter.nv_index(approver).name
    assert refused(provider, attempt(("policy_cp_hash", "S", increment_hash(name)))) == POLICY_FAIL
    command = ("policy_command_code", "S", c.TPM2_CC.NV_Increment)
    assert refused(provider, attempt(command))  # and that is not what was signed


def test_another_approver_does_not_move_it(provider, value, key, sign_raise):
    stranger = ec.generate_private_key(ec.SECP256R1())
    for foreign in (
        sign_raise(stranger, value + 5),
        sign_raise(key, value + 5, ref="other"),
    ):
        with pytest.raises(KeyNotFound, match="not of the approver"):
            raise_counter(provider, foreign)
    # In the approver's name, past our own checks.
    forged = replace(sign_raise(stranger, value + 5), approver=sign_raise(key, 1).approver)
    with pytest.raises(ConfigError, match="not signed by the key that it names"):
        raise_counter(provider, forged)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr(Raise, "check", lambda self: None)
        with pytest.raises(ProviderError, match="refused the signature"):
            raise_counter(provider, forged)
    # A raise of another counter, or of a higher value than was signed.
    higher = replace(sign_raise(key, value + 1), counter=Counter(INDEX, value + 9))
    elsewhere = replace(sign_raise(key, value + 1, index=INDEX + 1), counter=Counter(INDEX, value))
    for wrong in (higher, elsewhere):
        with pytest.raises(ConfigError, match="not signed"):
            raise_counter(provider, wrong)
    assert read_counter(provider) == value


def test_an_owner_who_makes_it_again_brings_no_old_value_back(provider, value, key, sign_raise):
    """He needs the raise to start it, goes on above, and so outdates and never revives."""

    def away(tpm):
        tpm.nv_undefine(INDEX, tpm.session())

    provider.service.run("undefining", away)
    with pytest.raises(KeyNotFound, match="no counter"):
        read_counter(provider)
    assert create_counter(provider, sign_raise(key, 1)) == value + 1
    # One that somebody else may move is not the approver's, so no approval holds by it.
    provider.service.run("undefining", away)
    index = NvIndex(INDEX, 0x02060012, 8)

    def own(tpm):
        from tpm2_pytss import constants as c

        handle = tpm.nv_define(index, tpm.session(), "")
        tpm.call("nv_increment", handle, auth_handle=c.ESYS_TR.OWNER)

    provider.service.run("defining", own)
    with pytest.raises(ConfigError, match="none of ours"):
        raise_counter(provider, sign_raise(key, value + 9))
    assert sign_raise(key, 1).counter.nv_index(sign_raise(key, 1).approver).name != index.name


def test_one_that_was_never_started_is_started_by_the_next_create(provider, key, sign_raise):
    """As after a power cut between the two."""
    wanted = sign_raise(key, 2)
    index = wanted.counter.nv_index(wanted.approver)
    provider.service.run("defining", lambda tpm: tpm.nv_define(index, tpm.session(), ""))
    with pytest.raises(KeyNotFound, match="never started"):
        read_counter(provider)
    with pytest.raises(KeyNotFound, match="never started"):
        raise_counter(provider, wanted)
    assert create_counter(provider, wanted) == 2


def test_one_that_was_cut_after_its_start_goes_on(provider, key, sign_raise, monkeypatch):
    wanted = sign_raise(key, 4)
    increment, made = _counter._increment, []

    def cut(*args):
        if made:
            raise KeyboardInterrupt
        made.append(increment(*args))

    with monkeypatch.context() as patched:
        patched.setattr(_counter, "_increment", cut)
        with pytest.raises(KeyboardInterrupt):
            create_counter(provider, wanted)
    assert read_counter(provider) == 1
    assert create_counter(provider, wanted) == 4


def test_one_that_somebody_made_beforehand_with_an_auth_value(
    provider, key, sign_raise, define_with_auth
):
    """An index that was never started has the name of ours, whatever its auth value."""
    wanted = sign_raise(key, 2)
    provider.service.run(
        "defining", lambda tpm: define_with_auth(tpm, wanted.counter.nv_index(wanted.approver))
    )
    assert create_counter(provider, wanted) == 2


def test_a_lost_answer_is_no_second_step(provider, key, sign_raise, wire, settings):
    value = create_counter(provider, sign_raise(key, 1))
    lost = wire.lose(0x134)  # TPM2_NV_Increment
    with Tpm2Provider("tpm", settings.model_copy(update={"tcti": wire.tcti})) as tapped:
        assert raise_counter(tapped, sign_raise(key, value + 1)) == value + 1
    assert lost
    assert read_counter(provider) == value + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("first"),
        lambda d: d | {"more": 1},
        lambda d: d["counter"].update(value="0"),
        lambda d: d["counter"].update(index="0x40000001"),
        lambda d: d["counter"].update(value=3),
        lambda d: d.update(first="AA=="),
        lambda d: d.update(format="keymgmt.tpm2-counter/2"),
        lambda d: d["approver"].update(public_key="AA=="),
    ],
)
def test_files_that_are_no_raise(key, sign_raise, tmp_path, change):
    good = sign_raise(key, 3)
    path = tmp_path / "a.raise"
    path.write_bytes(good.to_bytes())
    assert read_json_file(path, "raise of a counter", Raise.read) == good
    data = json.loads(good.to_bytes())
    changed = change(data)
    path.write_text(
        json.dumps(changed if isinstance(changed, dict) and "more" in changed else data)
    )
    with pytest.raises(ConfigError, match="is no raise of a counter"):
        read_json_file(path, "raise of a counter", Raise.read)
