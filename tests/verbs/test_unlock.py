"""Unlock policies: any of groups, all of recipients, and what happens when none opens."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keymgmt
from keymgmt import Config, errors
from keymgmt._recipients import resolve_groups
from keymgmt._unlock import Unlocker
from keymgmt.sealed.keys import Group, UnlockPolicy, wrap_group


@pytest.fixture
def without(site):
    """A config of the same site on which some keys are not there."""

    def make(*missing: str, **policy) -> Config:
        keys = site.root / "fewer"
        shutil.rmtree(keys, ignore_errors=True)
        shutil.copytree(site.root / "keys", keys)
        for file in keys.iterdir():
            if file.name.split(".")[0] in missing:
                file.unlink()
        data = {
            "providers": {"local": {"backend": "file", "path": str(keys)}},
            "policy": site.policy | policy,
        }
        return Config(data, path=site.root / "keymgmt.toml")

    return make


def test_any_group_opens(site, without):
    path = site.seal("local:a", "local:b")
    with keymgmt.open(path, keys=without("a")) as model:
        assert model.group == 1


def test_every_member_of_a_group_is_needed(site, without):
    path = site.seal("local:a+local:b")
    keymgmt.open(path, keys=without()).close()
    with pytest.raises(errors.CannotUnlock) as caught:
        keymgmt.open(path, keys=without("b"))
    (attempt,) = caught.value.attempts
    assert (attempt.recipient, attempt.provider) == ("file:b@1", "local")
    assert isinstance(attempt.error, errors.WrongKey)


def test_every_recipient_is_accounted_for(site, without):
    path = site.seal("local:a", "local:b", "local:c")
    with pytest.raises(errors.CannotUnlock) as caught:
        keymgmt.open(path, keys=without("a", "b", "c"))
    assert [a.recipient for a in caught.value.attempts] == ["file:a@1", "file:b@1", "file:c@1"]
    assert caught.value.exit_code == 4


def test_a_config_without_the_backend(site):
    path = site.seal()
    config = Config({"policy": {"require_signature": False}}, path=site.root / "x.toml")
    with pytest.raises(errors.CannotUnlock) as caught:
        keymgmt.open(path, keys=config)
    assert "no providers" in caught.value.hint
    assert caught.value.attempts[0].provider is None


def test_a_backend_that_is_not_installed_stops_no_other(site):
    path = site.seal("local:a")
    data = {
        "providers": {
            "strange": {"backend": "acme-hsm"},
            "local": {"backend": "file", "path": str(site.root / "keys")},
        },
        "policy": {"require_signature": False, "prefer": ["strange"]},
    }
    keymgmt.open(path, keys=Config(data, path=site.root / "x.toml")).close()


def test_renaming_a_provider_loses_nothing(site):
    path = site.seal("local:a")
    data = {
        "providers": {"other-name": {"backend": "file", "path": str(site.root / "keys")}},
        "policy": {"require_signature": False},
    }
    keymgmt.open(path, keys=Config(data, path=site.root / "x.toml")).close()


_GROUPS = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True),
    min_size=1,
    max_size=4,
    unique_by=tuple,
)


@given(groups=_GROUPS, missing=st.sets(st.sampled_from("abc")))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_policy_opens_exactly_when_it_should(site, without, groups, missing):
    path = site.root / "p.sealed"
    to = ["+".join(f"local:{key}" for key in group) for group in groups]
    keymgmt.seal(site.plain / "model.xml", path, to=to, keys=site.config(), force=True)
    should = any(not missing & set(group) for group in groups)
    if should:
        with keymgmt.open(path, keys=without(*missing)) as model:
            assert model.read("model.xml") == (site.plain / "model.xml").read_bytes()
            assert not missing & set(groups[model.group])
    else:
        with pytest.raises(errors.CannotUnlock):
            keymgmt.open(path, keys=without(*missing))


def _edit(path, change):
    policy = UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
    (path / "keys.json").write_bytes(change(policy).to_bytes())


def test_a_recipient_that_was_added_is_said(site):
    """Anybody can wrap to a public key; without the data key nobody can make the MAC."""
    path, other = site.seal(), site.seal("local:b", target="n.sealed")
    foreign = UnlockPolicy.from_bytes((other / "keys.json").read_bytes()).groups
    _edit(path, lambda p: dataclasses.replace(p, groups=p.groups + foreign))
    with pytest.raises(errors.IntegrityError, match="MAC"):
        keymgmt.open(path, keys=site.config())


def test_recipients_are_bound_to_their_place(site):
    path = site.seal("local:a+local:b")
    _edit(
        path,
        lambda p: dataclasses.replace(
            p, groups=(Group(p.groups[0].nonce, p.groups[0].recipients[::-1]),)
        ),
    )
    with pytest.raises(errors.CannotUnlock) as caught:
        keymgmt.open(path, keys=site.config())
    assert isinstance(caught.value.attempts[0].error, errors.UnwrapFailed)


def test_a_share_alone_is_no_data_key(site):
    """Who holds one share offers it as a group of one."""
    path = site.seal("local:a+local:b")
    policy = UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
    config = site.config()
    share = config.provider("local").unwrap(
        policy.groups[0].recipients[0], policy.groups[0].context(policy.manifest, 0)
    )
    forged = wrap_group(share, policy.manifest, resolve_groups(["local:c"], config)[0])
    _edit(path, lambda p: dataclasses.replace(p, groups=(forged, *p.groups)))
    with pytest.raises(errors.IntegrityError, match="MAC"):
        keymgmt.open(path, keys=config)
    _edit(path, lambda p: dataclasses.replace(p, groups=(forged,)))
    with pytest.raises(errors.CannotUnlock):
        keymgmt.open(path, keys=config)


def test_recipients_of_another_model(site):
    path, other = site.seal(), site.seal(target="n.sealed")
    shutil.copy(other / "keys.json", path / "keys.json")
    with pytest.raises(errors.IntegrityError, match="another manifest"):
        keymgmt.open(path, keys=site.config())


def test_a_plugin_that_raises_anything_is_one_failed_candidate(site, monkeypatch):
    path = site.seal("local:a", "local:b")
    config = site.config()
    provider = config.provider("local")
    real = provider.unwrap

    def unwrap(wrapped, context):
        if wrapped.key == "a":
            raise RuntimeError("the secret is 1234")
        return real(wrapped, context)

    monkeypatch.setattr(provider, "unwrap", unwrap)
    with keymgmt.open(path, keys=config) as model:
        assert model.group == 1


def test_an_unavailable_provider_is_asked_once(site, monkeypatch):
    path = site.seal("local:a", "local:b", "local:c")
    config = site.config()
    calls = []

    def unwrap(wrapped, context):
        calls.append(wrapped.key)
        raise errors.ProviderUnavailable("down")

    monkeypatch.setattr(config.provider("local"), "unwrap", unwrap)
    with pytest.raises(errors.CannotUnlock) as caught:
        keymgmt.open(path, keys=config)
    assert calls == ["a"]
    assert len(caught.value.attempts) == 3
    assert caught.value.exit_code == 6


def test_attempts_are_bounded(site, monkeypatch):
    path = site.seal("local:a")
    policy = UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
    wrapped = policy.groups[0].recipients[0]
    many = [
        Group(policy.groups[0].nonce, (dataclasses.replace(wrapped, blob=bytes([i, j]) * 24),))
        for i in range(100)
        for j in range(10)
    ]
    _edit(path, lambda p: dataclasses.replace(p, groups=tuple(many)))
    config = site.config()
    calls = []

    def unwrap(wrapped, context):
        calls.append(wrapped)
        raise errors.UnwrapFailed("no")

    monkeypatch.setattr(config.provider("local"), "unwrap", unwrap)
    with pytest.raises(errors.CannotUnlock):
        keymgmt.open(path, keys=config)
    assert len(calls) == 64


def test_preferred_providers_come_first(site):
    (site.root / "more").mkdir(mode=0o700)
    data = {
        "providers": {
            "one": {"backend": "file", "path": str(site.root / "keys")},
            "two": {"backend": "file", "path": str(site.root / "more")},
        },
        "policy": {"require_signature": False, "prefer": ["two"]},
    }
    config = Config(data, path=site.root / "x.toml")
    assert config.provider_names == ("two", "one")
    path = site.seal("local:a")
    unlocker = Unlocker(
        config,
        keymgmt.inspect(path).manifest,
        UnlockPolicy.from_bytes((path / "keys.json").read_bytes()),
    )
    dek, _ = unlocker.unlock()
    dek.wipe()
    assert [attempt.provider for attempt in unlocker.attempts] == ["two"]
