"""Unlock policies: any of groups, all of recipients, and what happens when none opens."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keymgmt
from keymgmt import Config, errors
from keymgmt._trust.recipients import resolve_groups
from keymgmt._trust.unlock import Unlocker
from keymgmt.backend import SupportsBatchUnwrap
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
        (keys / "versions.json").unlink()  # it never had them
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


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (errors.UnsupportedOperation("not with this module"), 6),
        (errors.ProviderError("the service refused"), 6),
        (RuntimeError("a plugin broke"), 6),
        (errors.KeyNotFound("gone"), 6),
        (errors.KeyRetired("retired"), 5),
        (errors.LockedOut("locked"), 5),
        (errors.WrongKey("another machine's"), 4),
        (errors.UnwrapFailed("does not authenticate"), 4),
    ],
)
def test_the_model_is_to_blame_for_nothing_that_a_provider_lacks(site, monkeypatch, raised, code):
    path = site.seal("local:a")
    config = site.config()

    def unwrap(wrapped, context):
        raise raised

    monkeypatch.setattr(config.provider("local"), "unwrap", unwrap)
    with pytest.raises(errors.CannotUnlock) as caught:
        keymgmt.open(path, keys=config)
    assert caught.value.exit_code == code


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


def _forged(path, count):
    """As many recipients in front as ``count`` says, all of the model's own key name."""

    def longer(policy):
        wrapped = policy.groups[0].recipients[0]
        many = tuple(
            Group(
                bytes([i % 256, i // 256]) * 8,
                (dataclasses.replace(wrapped, blob=bytes([i % 256, i // 256]) * 40),),
            )
            for i in range(count)
        )
        return dataclasses.replace(policy, groups=many + policy.groups)

    _edit(path, longer)


@pytest.mark.parametrize(
    ("error", "requests"),
    [
        (errors.UnwrapFailed("no"), 64),
        (errors.AccessDenied("no"), 64),
        # The service said so: it was asked.
        (errors.WrongKey("no"), 64),
    ],
)
def test_what_asks_a_service_is_bounded(site, monkeypatch, error, requests):
    path = site.seal("local:a")
    _forged(path, 200)
    config = site.config()
    provider = config.provider("local")
    monkeypatch.setattr(type(provider), "local", False)
    calls = []

    def unwrap(wrapped, context):
        calls.append(wrapped)
        raise error from OSError("the answer of a service")

    monkeypatch.setattr(provider, "unwrap", unwrap)
    monkeypatch.setattr("keymgmt._trust.unlock.unwrap_many", lambda *_: ())  # one at a time
    with pytest.raises(errors.CannotUnlock) as caught:
        keymgmt.open(path, keys=config)
    assert len(calls) == requests
    assert "64 requests were made" in str(caught.value.attempts[-1].error)


def test_a_wrong_key_that_is_known_without_asking_costs_nothing(site, monkeypatch):
    path = site.seal("local:a")
    _forged(path, 200)
    config = site.config()
    provider = config.provider("local")
    monkeypatch.setattr(type(provider), "local", False)
    real, calls = provider.unwrap, []

    def unwrap(wrapped, context):
        calls.append(wrapped)
        if len(calls) <= 200:
            raise errors.WrongKey("another public key")
        return real(wrapped, context)

    monkeypatch.setattr(provider, "unwrap", unwrap)
    with pytest.raises(errors.IntegrityError, match="MAC"):
        keymgmt.open(path, keys=config)
    assert len(calls) == 201


@pytest.mark.parametrize("count", [70, pytest.param(10_000, marks=pytest.mark.once)])
def test_any_number_of_sites_with_a_file_key_of_one_name(site, tmp_path, count):
    """Each site has its own key ``a``; the one that opens here is the last of them."""
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    data = {
        "providers": {
            "mine": {"backend": "file", "path": str(site.root / "keys")},
            "other": {"backend": "file", "path": str(other)},
        },
        "policy": {"require_signature": False},
    }
    config = Config(data, path=site.root / "x.toml")
    config.provider("other").create_key("a", "aes256", {})
    path = site.seal("mine:a", keys=config, sign=None)
    manifest = keymgmt.inspect(path).manifest
    with keymgmt.open(path, keys=config) as model:
        theirs, mine = (resolve_groups([f"{name}:a"], config)[0] for name in ("other", "mine"))
        policy = UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
        groups = [wrap_group(model._dek, policy.manifest, theirs) for _ in range(count)]
        groups.append(wrap_group(model._dek, policy.manifest, mine))
        made = UnlockPolicy.make(model._dek, manifest, policy.manifest, groups)
        (path / "keys.json").write_bytes(made.to_bytes())
    del data["providers"]["other"]
    with keymgmt.open(path, keys=Config(data, path=site.root / "x.toml")) as model:
        assert model.group == count
        assert model.failed == ()


class Batching:
    """Makes a provider one of a service that unwraps in batches, and counts its requests."""

    def __init__(self, provider, monkeypatch):
        self.single, self.batches = [], []
        real = provider.unwrap

        def unwrap(wrapped, context):
            self.single.append(wrapped)
            return answer(wrapped, context)

        def unwrap_batch(items):
            self.batches.append(len(items))
            answers = []
            for wrapped, context in items:
                try:
                    answers.append(answer(wrapped, context))
                except errors.ProviderError as error:
                    answers.append(error)
            return answers

        def answer(wrapped, context):
            # A file tells another key of its name; services cannot.
            try:
                return real(wrapped, context)
            except errors.ProviderError:
                raise errors.UnwrapFailed("it does not authenticate") from None

        kind = type(provider)
        batching = type(kind.__name__, (kind, SupportsBatchUnwrap), {"unwrap_batch": None})
        batching.__abstractmethods__ = frozenset()
        provider.__class__ = batching
        monkeypatch.setattr(provider, "unwrap", unwrap)
        monkeypatch.setattr(provider, "unwrap_batch", unwrap_batch)
        monkeypatch.setattr(batching, "local", False)


def test_a_service_with_batches_is_asked_in_batches(site, monkeypatch):
    path = site.seal("local:a")
    _forged(path, 700)
    config = site.config()
    service = Batching(config.provider("local"), monkeypatch)
    # A stranger wrote the policy; the group at its end opens all the same, and then the MAC tells.
    with pytest.raises(errors.IntegrityError, match="MAC"):
        keymgmt.open(path, keys=config)
    assert len(service.single) <= 1
    assert service.batches == [256, 256, 188]


def test_a_copied_blob_in_front_does_not_stand_for_the_real_one(site):
    path = site.seal("local:a")

    def copied(policy):
        (group,) = policy.groups
        return dataclasses.replace(policy, groups=(Group(bytes(16), group.recipients), group))

    policy = UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
    with keymgmt.open(path, keys=site.config()) as model:
        changed = copied(policy)
        made = UnlockPolicy.make(model._dek, model.manifest, policy.manifest, list(changed.groups))
    (path / "keys.json").write_bytes(made.to_bytes())
    with keymgmt.open(path, keys=site.config()) as model:
        assert model.group == 1


def test_members_that_ask_nobody_are_asked_first(site, monkeypatch):
    data = {
        "providers": {
            "far": {"backend": "acme-far"},
            "local": {"backend": "file", "path": str(site.root / "keys")},
        },
        "policy": {"require_signature": False},
    }
    config = Config(data, path=site.root / "x.toml")
    config._tables["far"]["backend"] = "file"
    config._tables["far"]["path"] = str(site.root / "keys")
    asked = []
    for name in ("far", "local"):
        provider = config.provider(name)
        provider.__class__ = type(name, (type(provider),), {"local": name == "local"})

        def unwrap(wrapped, context, name=name):
            asked.append(name)
            raise errors.WrongKey("no")

        monkeypatch.setattr(provider, "unwrap", unwrap)
        config._tables[name]["backend"] = f"acme-{name}"
    path = site.seal("local:a")
    policy = UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
    wrapped = policy.groups[0].recipients[0]
    both = Group(
        bytes(16),
        tuple(dataclasses.replace(wrapped, backend=f"acme-{name}") for name in ("far", "local")),
    )
    changed = dataclasses.replace(policy, groups=(both,))
    unlocker = Unlocker(config, keymgmt.inspect(path).manifest, changed)
    with pytest.raises(errors.CannotUnlock):
        unlocker.unlock()
    assert asked == ["local"]


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
