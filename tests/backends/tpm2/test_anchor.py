"""The anchor in a TPM of what remembers releases: restored disks, power cuts, who may move it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from keymgmt_tpm2 import Tpm2Provider
from keymgmt_tpm2._errors import TpmError
from keymgmt_tpm2.policy._anchor import Anchor, create_anchor
from keymgmt_tpm2.policy._counter import DEFAULT_INDEX, create_counter, read_counter
from keymgmt_tpm2.policy._index import NV_ANCHOR, NvIndex

from keymgmt import errors
from keymgmt._trust.release_memory import ReleaseMemory
from keymgmt.backend import (
    ANCHOR_FIRST,
    ANCHOR_START,
    AccessDenied,
    ConfigError,
    KeyNotFound,
    ProviderUnavailable,
    SecretSource,
    anchor_after,
)

INDEX = 0x01800102
STEP = bytes(range(32))


def extend(provider, index: int) -> None:
    """Measure something, as an update does."""
    from tpm2_pytss import constants as c

    handle = c.ESYS_TR.parse(f"pcr{index}")
    provider.service.run("measuring", lambda tpm: tpm.call("pcr_event", handle, b"update"))


@pytest.fixture
def pinned(settings):
    """Makes an anchor and returns a provider that pins it; closed at the end."""
    made = []

    def make(key=None, **changes):
        with Tpm2Provider("tpm", settings) as provider:
            name = create_anchor(provider.service, key).name.hex()
        provider = Tpm2Provider("tpm", settings.model_copy(update={"anchor": name, **changes}))
        made.append(provider)
        return provider

    yield make
    for provider in made:
        provider.close()


def memory(provider, folder: Path) -> ReleaseMemory:
    return ReleaseMemory(folder / "releases.json", lambda call: call(provider), "tpm")


def test_it_is_the_hash_chain_that_the_core_wants(pinned):
    provider = pinned()
    assert provider.anchor() == ANCHOR_START
    provider.move_anchor(ANCHOR_START, STEP)
    after = anchor_after(ANCHOR_START, STEP)
    assert provider.anchor() == after
    provider.move_anchor(ANCHOR_START, STEP)  # as where an answer was lost
    assert provider.anchor() == after
    with pytest.raises(AccessDenied, match="has moved meanwhile"):
        provider.move_anchor(ANCHOR_START, bytes(32))


def test_a_restored_disk_is_noticed_and_a_power_cut_heals(pinned, swtpm, tmp_path):
    """The TPM loses its power between the file and the index, and in the middle of the command."""
    provider = pinned()
    first = memory(provider, tmp_path)
    first.remember("a", 1)
    disk = tmp_path / "disk-of-yesterday"
    shutil.copy(first.path, disk)
    first.remember("a", 2)

    class Cut:
        """The provider on a machine that goes off before the index moves."""

        anchor = staticmethod(provider.anchor)

        def move_anchor(self, value, step):
            swtpm.kill()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ReleaseMemory(first.path, lambda call: call(Cut()), "tpm").remember("b", 9)
    swtpm.start()
    assert first.recall().releases == {"a": 2}
    prepared = first.path.read_bytes()
    first.remember("b", 3)
    assert first.recall().releases == {"a": 2, "b": 3}
    newest = first.path.read_bytes()
    swtpm.restart()
    for old in (disk.read_bytes(), prepared):
        first.path.write_bytes(old)
        with pytest.raises(errors.RollbackError, match="not the newest"):
            first.recall()
    first.path.unlink()
    with pytest.raises(errors.RollbackError, match="gone"):
        first.recall()
    first.path.write_bytes(newest)
    assert first.recall().releases == {"a": 2, "b": 3}


def test_a_move_whose_answer_was_lost(pinned, wire, tmp_path):
    """The index moved, and the machine does not know: it looks again and moves it once."""
    provider = pinned(tcti=wire.tcti)
    lost = wire.lose(0x136)  # TPM2_NV_Extend
    first = memory(provider, tmp_path)
    first.remember("a", 1)
    assert lost
    assert first.recall().releases == {"a": 1}
    assert provider.anchor() == anchor_after(ANCHOR_START, first.recall().step)


def test_its_policy_says_where_it_moves(provider, pinned):
    """The one of a key: elsewhere it is read, and moved by nobody."""
    provider.create_key("dev", "ecc-p256", {"pcr": "16"})
    bound = pinned("dev")
    bound.move_anchor(ANCHOR_START, STEP)
    extend(provider, 16)
    value = bound.anchor()
    closed = "the anchor 0x01800102 is bound to another boot state"
    with pytest.raises(AccessDenied, match=closed) as caught:
        bound.move_anchor(value, STEP)
    for command in ("keymgmt keys rotate tpm:dev;", "anchor create tpm:dev --again;"):
        assert command in str(caught.value.hint)
    found = next(each for each in bound.check().findings if each.name == "anchor")
    assert (found.status, closed in found.detail) == ("failed", True)
    assert bound.anchor() == value
    # The owner without a password, and the index's empty one.
    from tpm2_pytss import constants as c

    for auth in (c.ESYS_TR.OWNER, None):

        def attack(tpm, auth=auth):
            handle = tpm.persistent(INDEX)
            try:
                tpm.call("nv_extend", handle, STEP, auth_handle=auth or handle)
            except TpmError as error:
                return error.code
            return 0

        assert provider.service.run("attacking", attack) in (0x149, 0x12F)
    assert bound.anchor() == value


def test_an_approver_lets_it_move_after_an_update(provider, pinned, tmp_path):
    from cryptography.hazmat.primitives import hashes
    from keymgmt_tpm2.policy import _approval
    from keymgmt_tpm2.policy._approval import Approval
    from keymgmt_tpm2.policy._policy import Approver

    key = ec.generate_private_key(ec.SECP256R1())
    pem = tmp_path / "approver.pub"
    form = PublicFormat.SubjectPublicKeyInfo
    pem.write_bytes(key.public_key().public_bytes(Encoding.PEM, form))
    provider.create_key("dev", "ecc-p256", {"approver": str(pem)})
    approver = Approver(key.public_key().public_bytes(Encoding.DER, form))

    def approve():
        state = provider.pcrs("sha256", [16])
        signature = key.sign(Approval.message(state, None, approver), ec.ECDSA(hashes.SHA256()))
        _approval.install(provider.keys.path, Approval(state, None, approver, signature))

    with pytest.raises(AccessDenied, match="none of its approver"):
        create_anchor(provider.service, "dev")
    approve()
    bound = pinned("dev")
    bound.move_anchor(ANCHOR_START, STEP)
    extend(provider, 16)
    value = bound.anchor()
    with pytest.raises(AccessDenied, match="no approval for the anchor"):
        bound.move_anchor(value, STEP)
    approve()
    bound.move_anchor(value, STEP)
    assert bound.anchor() == anchor_after(value, STEP)


def test_the_pin_of_its_key_is_not_asked_for(settings, pinned, pin_file):
    with Tpm2Provider("tpm", settings.model_copy(update={"pin": SecretSource(file=pin_file)})) as p:
        p.create_key("dev", "ecc-p256", {"pin": "yes", "pcr": "7"})
    bound = pinned("dev")
    bound.move_anchor(ANCHOR_START, STEP)
    assert bound.anchor() != ANCHOR_START


def test_an_owner_who_makes_it_again_in_another_boot_state(provider, pinned, tmp_path):
    """He has no password, and gets an empty index of the same name that is refused."""
    provider.create_key("dev", "ecc-p256", {"pcr": "16"})
    policy = provider.keys.read("dev").newest.policy
    bound = pinned("dev")
    first = memory(bound, tmp_path)
    first.remember("a", 5)
    extend(provider, 16)

    def again(tpm):
        session = tpm.session()
        tpm.nv_undefine(INDEX, session)
        tpm.nv_define(NvIndex(INDEX, NV_ANCHOR, 32, policy.digest), session, "")

    provider.service.run("attacking", again)
    first.path.unlink()
    with pytest.raises(KeyNotFound, match="made anew and never set up") as caught:
        first.recall()
    assert "anchor create tpm:dev --again" in str(caught.value.hint)

    # With another policy it is another one.
    def other(tpm):
        session = tpm.session()
        tpm.nv_undefine(INDEX, session)
        handle = tpm.nv_define(NvIndex(INDEX, 0x02060044, 32), session, "")
        tpm.call("nv_extend", handle, ANCHOR_FIRST, auth_handle=handle)

    provider.service.run("attacking", other)
    with pytest.raises(KeyNotFound, match="not the one that the config pins"):
        first.recall()
    provider.service.run("attacking", lambda tpm: tpm.nv_undefine(INDEX, tpm.session()))
    with pytest.raises(KeyNotFound, match="no anchor"):
        first.recall()


def test_a_key_that_is_gone_or_another(provider, pinned):
    provider.create_key("dev", "ecc-p256", {"pcr": "7"})
    bound = pinned("dev")
    provider.rotate_key("dev")
    bound.move_anchor(ANCHOR_START, STEP)  # its older version still says how
    value, file = bound.anchor(), provider.keys.path / "dev.json"
    content = file.read_bytes()
    # One that cannot be read is none that is not there.
    file.write_text("{")
    with pytest.raises(ProviderUnavailable, match=r"dev\.json"):
        bound.move_anchor(value, STEP)
    file.unlink()
    with pytest.raises(AccessDenied, match="has the policy") as caught:
        bound.move_anchor(value, STEP)
    assert "anchor create tpm:KEY --again" in str(caught.value.hint)
    shutil.rmtree(provider.keys.path)
    with pytest.raises(ProviderUnavailable, match="does not exist"):
        bound.move_anchor(value, STEP)
    provider.keys.path.mkdir(mode=0o700)
    (provider.keys.path / "bad.json").write_text("{")
    file.write_bytes(content)
    bound.move_anchor(value, STEP)


def test_a_key_that_keeps_nobody_out(settings, provider, pin_file):
    with Tpm2Provider("tpm", settings.model_copy(update={"pin": SecretSource(file=pin_file)})) as p:
        p.create_key("locked", "ecc-p256", {"pin": "yes"})
    provider.create_key("open", "ecc-p256", {})
    for key, asks in (("locked", "nothing but its PIN"), ("open", "nothing, so")):
        with pytest.raises(ConfigError, match=asks):
            create_anchor(provider.service, key)


@pytest.mark.parametrize("again", [False, True])
def test_what_is_at_its_index_and_no_anchor_stays(settings, provider, sign_raise, again):
    """Also with --again, and whoever made it."""
    from tpm2_pytss import constants as c

    def another(tpm):
        handle = tpm.nv_define(NvIndex(INDEX, 0x00060006, 16), tpm.session(), "")
        tpm.call("nv_write", handle, b"somebody's bytes", 0, auth_handle=c.ESYS_TR.OWNER)

    provider.service.run("another program", another)
    value = create_counter(provider, sign_raise(ec.generate_private_key(ec.SECP256R1()), 3))
    for index in (settings.anchor_index, f"{DEFAULT_INDEX:#010x}"):
        with Tpm2Provider("tpm", settings.model_copy(update={"anchor_index": index})) as other:
            with pytest.raises(ConfigError, match="is no anchor") as caught:
                create_anchor(other.service, None, again=again)
            assert "anchor_index" in str(caught.value.hint)
    assert read_counter(provider) == value
    read = lambda tpm: tpm.call(  # noqa: E731
        "nv_read", tpm.persistent(INDEX), 16, 0, auth_handle=c.ESYS_TR.OWNER
    )
    assert bytes(provider.service.run("reading", read)) == b"somebody's bytes"


def test_an_answer_that_was_lost_when_it_was_made(wire, settings):
    lost = wire.lose(0x136)  # TPM2_NV_Extend
    with Tpm2Provider("tpm", settings.model_copy(update={"tcti": wire.tcti})) as tapped:
        name = create_anchor(tapped.service, None).name
        assert lost
        assert create_anchor(tapped.service, None).name == name


def test_one_that_somebody_made_beforehand_with_an_auth_value(provider, pinned, define_with_auth):
    """An index that was never written has the name of ours, whatever its auth value."""
    provider.create_key("dev", "ecc-p256", {"pcr": "7"})
    index = Anchor.of(provider.service, provider.keys.read("dev").newest.policy).index
    provider.service.run("defining", lambda tpm: define_with_auth(tpm, index))
    bound = pinned("dev")
    bound.move_anchor(ANCHOR_START, STEP)
    assert bound.anchor() == anchor_after(ANCHOR_START, STEP)


def test_a_disabled_owner_hierarchy_is_no_missing_index(provider, pinned, sign_raise):
    from tpm2_pytss import constants as c

    bound = pinned()
    create_counter(provider, sign_raise(ec.generate_private_key(ec.SECP256R1()), 3))
    owner = c.ESYS_TR.OWNER
    bound.service.run("off", lambda tpm: tpm.call("hierarchy_control", owner, owner, False))
    for look in (bound.anchor, lambda: read_counter(provider)):
        with pytest.raises(ProviderUnavailable, match="owner hierarchy of the TPM is disabled"):
            look()


def test_a_policy_that_does_not_hold_takes_nothing_away(provider, pinned):
    first = pinned()
    first.move_anchor(ANCHOR_START, STEP)
    provider.create_key("dev", "ecc-p256", {"pcr": "16"})
    extend(provider, 16)
    with pytest.raises(AccessDenied, match="another boot state"):
        create_anchor(provider.service, "dev", again=True)
    assert first.anchor() == anchor_after(ANCHOR_START, STEP)
    with pytest.raises(ConfigError, match="in use") as caught:
        create_anchor(provider.service, None)
    assert "--again" in str(caught.value.hint)


def test_without_an_anchor_in_the_config(provider):
    with pytest.raises(ConfigError, match="has no anchor") as caught:
        provider.anchor()
    assert "keymgmt tpm anchor create tpm" in str(caught.value.hint)


def test_what_lies_between_does_not_answer_for_the_tpm(pinned, wire):
    """An old answer to TPM2_NV_Read is not of this session."""
    provider = pinned(tcti=wire.tcti)
    kept = []

    def answer(command):
        if int.from_bytes(command[6:10], "big") != 0x14E:  # TPM2_NV_Read
            return None
        if not kept:
            kept.append(wire.ask(command))
        return kept[0]

    wire.intercept = answer
    assert provider.anchor() == ANCHOR_START
    with Tpm2Provider("tpm", provider.settings) as again, pytest.raises(errors.ProviderError):
        again.anchor()


@pytest.mark.parametrize(
    "changes", [{"anchor": "000b12"}, {"anchor_index": "0x81000001"}, {"anchor_index": "seven"}]
)
def test_settings_that_name_no_anchor(settings, changes):
    with pytest.raises(ValueError, match=r"name of an anchor|NV index of the owner"):
        type(settings)(keys=settings.keys, **changes)


def test_models_share_one_anchor(commands, tmp_path):
    """From the config to the index, through the commands; a restored file closes the models."""
    home, run = commands
    made = json.loads(run("tpm", "anchor", "create", "tpm:dev", "--json"))
    assert made["moved_by"].startswith("PCR")
    run("keys", "create", "local:publisher", "--sign")
    run("keys", "export", "local:publisher", "--format", "pem", "-o", "pub.pem")
    config = home / "keymgmt.toml"
    head, _, _ = config.read_text().partition("[policy]")
    head = head.replace("[providers.tpm]\n", f'[providers.tpm]\nanchor = "{made["name"]}"\n')
    config.write_text(
        head + '[policy]\nremember_releases = { file = "releases.json", anchor = "tpm" }\n'
        'publishers = { "pub.pem" = ["*"] }\n'
    )
    run("keys", "create", "local:models")
    (home / "model").mkdir()
    (home / "model" / "net.xml").write_text("<net/>")
    for name, release in (("one", 1), ("one", 2), ("two", 1)):
        options = ["--name", name, "--release", release, "--sign", "local:publisher"]
        run("seal", "model", f"{name}-{release}.sealed", "--to", "local:models", *options)
    assert "nothing is bound" in run("tpm", "anchor", "show", "tpm")
    assert "an old file would be accepted" in run("doctor")
    run("verify", "one-1.sealed")
    old = (home / "releases.json").read_bytes()
    run("verify", "one-2.sealed")
    run("verify", "two-1.sealed")
    assert "older than release 2" in run("verify", "one-1.sealed", code=4)
    (home / "releases.json").write_bytes(old)
    assert "not the newest" in run("verify", "one-1.sealed", code=3)
    assert "not the newest" in run("doctor", code=1)
    shown = json.loads(run("tpm", "anchor", "show", "tpm", "--json"))
    assert (shown["name"], shown["moved"]) == (made["name"], True)
    (home / "releases.json").unlink()
    assert "is gone" in run("verify", "one-2.sealed", code=3)
    said = run("doctor", code=1)
    assert "is gone" in said
    assert "0x01800102, as pinned, and can be moved" in said
    # Made again without the key it has another name, and anybody moves it.
    said = run("tpm", "anchor", "create", "tpm", "--again")
    assert "moved by: whoever may use this TPM" in said
    assert "counts as new" in said
    assert made["name"] in said
    assert "the one that the config pins" in run("tpm", "anchor", "create", "tpm:dev", "--again")
    # Where that TPM is not reached, as on a build machine.
    there = config.read_text()
    config.write_text(re.sub(r'tcti = "[^"]+"', 'tcti = "device:/dev/none"', there))
    said = run("verify", "--signature-only", "one-2.sealed")
    assert "the anchor of what is remembered: not asked" in said
    assert "could not be checked" in run("sign", "one-2.sealed", "local:publisher")
    run("verify", "one-2.sealed", code=6)
