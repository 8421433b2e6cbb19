"""Rewrap, reseal and usage: keys change, payloads do not, and nothing is lost on the way."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forks import become_nobody, in_child
from waiting import until

import keymgmt
from keymgmt import Config, errors
from keymgmt._providers.contract import SupportsBatchUnwrap
from keymgmt.sealed.folder import SealedFolder


def groups(path):
    return ["+".join(group) for group in keymgmt.inspect(path).groups]


def opens(site, path):
    with keymgmt.open(path, keys=site.config()) as model:
        assert model.read("model.bin") == (site.plain / "model.bin").read_bytes()
    return True


def test_newest_versions(site, tree_of):
    path = site.seal("local:a+local:b", "local:c")
    before = tree_of(path)
    site.provider.rotate_key("b")
    done = keymgmt.rewrap(path, keys=site.config())
    assert done.changed
    assert groups(path) == ["file:a@1+file:b@2", "file:c@1"]
    changed = {name for name, content in tree_of(path).items() if content != before[name]}
    assert changed == {"keys.json"}
    assert opens(site, path)
    site.provider.retire_version("b", "1")
    assert opens(site, path)


def test_doing_it_again_changes_nothing(site, tree_of):
    path = site.seal("local:a")
    site.provider.rotate_key("a")
    keymgmt.rewrap(path, keys=site.config(), add=["local:b"])
    keymgmt.rewrap(path, keys=site.config())
    before = tree_of(path)
    assert not keymgmt.rewrap(path, keys=site.config()).changed
    assert not keymgmt.rewrap(path, keys=site.config(), add=["local:b"]).changed
    assert tree_of(path) == before


def test_a_new_member_makes_fresh_shares_for_the_whole_group(site):
    path = site.seal("local:a+local:b")
    old = keymgmt.sealed.keys.UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
    site.provider.rotate_key("b")
    keymgmt.rewrap(path, keys=site.config())
    new = keymgmt.sealed.keys.UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
    assert old.groups[0].nonce != new.groups[0].nonce
    provider = site.provider
    for member in range(2):
        before = provider.unwrap(
            old.groups[0].recipients[member], old.groups[0].context(old.manifest, member)
        )
        after = provider.unwrap(
            new.groups[0].recipients[member], new.groups[0].context(new.manifest, member)
        )
        assert before != after


def test_dry_run_writes_nothing(site, tree_of):
    path = site.seal()
    before = tree_of(path)
    assert keymgmt.rewrap(path, keys=site.config(), add=["local:b"], dry_run=True).changed
    assert tree_of(path) == before


def test_add_and_drop(site):
    path = site.seal("local:a")
    done = keymgmt.rewrap(path, keys=site.config(), add=["local:b"], drop=["file:a"])
    assert [(state.group, state.state) for state in done.groups] == [
        ("file:a@1", "dropped"),
        ("file:b@1", "added"),
    ]
    assert groups(path) == ["file:b@1"]
    assert opens(site, path)


def test_the_last_group_that_opens_here_goes_only_by_force(site):
    path = site.seal("local:a", "local:b")
    away = site.root / "b.away"
    file = next(f for f in (site.root / "keys").iterdir() if f.name.split(".")[0] == "b")
    file.rename(away)
    (site.root / "keys" / "versions.json").unlink()  # this machine never had it
    with pytest.raises(errors.ConfigError, match="no group that opens here"):
        keymgmt.rewrap(path, keys=site.config(), drop=["file:a"])
    keymgmt.rewrap(path, keys=site.config(), drop=["file:a"], force=True)
    away.rename(file)
    assert groups(path) == ["file:b@1"]
    assert opens(site, path)


@pytest.mark.parametrize(
    ("drop", "says"),
    [
        ("file:a", "one member of the group"),
        ("file:zz", "no group"),
        ("file:a@1+file:b@1", "nobody could ever open it"),
    ],
)
def test_what_cannot_be_dropped(site, tree_of, drop, says):
    path = site.seal("local:a+local:b")
    before = tree_of(path)
    with pytest.raises(errors.ConfigError, match=says) as caught:
        keymgmt.rewrap(path, keys=site.config(), drop=[drop])
    assert caught.value.hint
    assert tree_of(path) == before


def test_a_group_to_drop_that_is_named_by_its_provider_changes_no_model_of_a_tree(site, tree_of):
    path = site.seal("local:a+local:b")
    before = tree_of(path)
    arguments = {"keys": site.config(), "add": ["local:c"], "drop": ["local:a@1+local:b"]}
    for run in (
        lambda: keymgmt.rewrap(path, **arguments),
        lambda: list(keymgmt.rewrap_tree(path.parent, **arguments)),
    ):
        with pytest.raises(errors.ConfigError, match="names a provider") as caught:
            run()
        assert caught.value.hint == "--drop file:a@1+file:b"
        assert tree_of(path) == before


def test_rewrap_never_wraps_to_a_recipient_that_was_added(site, tree_of):
    path, other = site.seal(), site.seal("local:b", target="n.sealed")
    from keymgmt.sealed.keys import UnlockPolicy

    policy = UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
    foreign = UnlockPolicy.from_bytes((other / "keys.json").read_bytes())
    forged = UnlockPolicy(policy.manifest, policy.groups + foreign.groups, policy.mac)
    (path / "keys.json").write_bytes(forged.to_bytes())
    before = tree_of(path)
    with pytest.raises(errors.IntegrityError):
        keymgmt.rewrap(path, keys=site.config(), add=["local:c"])
    assert tree_of(path) == before


def test_a_group_that_does_not_open_here_is_kept(site, tmp_path):
    path = site.seal("local:a", "local:b")
    (site.root / "keys" / "hidden").mkdir()
    file = next(f for f in (site.root / "keys").iterdir() if f.name.split(".")[0] == "b")
    file.rename(site.root / "b.away")
    (site.root / "keys" / "versions.json").unlink()  # this machine never had it
    (site.root / "keys" / "hidden").rmdir()
    site.provider.rotate_key("a")
    done = keymgmt.rewrap(path, keys=site.config())
    assert [(s.group, s.state, s.tested) for s in done.groups] == [
        ("file:a@2", "moved", True),
        ("file:b@1", "foreign", False),
    ]
    (site.root / "b.away").rename(file)
    (site.root / "keys" / "a.json").unlink(missing_ok=True)
    assert groups(path) == ["file:a@2", "file:b@1"]


REWRAP = """
import sys, keymgmt
from pathlib import Path
root, path, add = sys.argv[1:]
data = {
    "providers": {"local": {"backend": "file", "path": f"{root}/keys"}},
    "policy": {"publishers": {"pub.pem": ["*"]}},
}
config = keymgmt.Config(data, path=Path(root) / "keymgmt.toml")
keymgmt.rewrap(path, keys=config, add=[add])
"""


def test_two_rewraps_at_once_lose_nothing(site):
    path = site.seal("local:a")
    processes = [
        subprocess.Popen([sys.executable, "-c", REWRAP, site.root, path, key])
        for key in ("local:b", "local:c")
    ]
    for process in processes:
        assert process.wait(120) == 0
    assert sorted(groups(path)) == ["file:a@1", "file:b@1", "file:c@1"]
    assert opens(site, path)


@pytest.mark.once
def test_killed_rewraps_leave_the_old_state_or_the_new(site, tmp_path):
    path = site.seal("local:a")
    config = tmp_path / "keymgmt.toml"
    config.write_text(
        f'[providers.local]\nbackend = "file"\npath = "{site.root}/keys"\n'
        '[policy]\npublishers = { "pub.pem" = ["*"] }\n'
    )
    script = tmp_path / "rewrap.py"
    script.write_text(
        "import os, signal, sys, keymgmt\n"
        "calls = int(sys.argv[1])\n"
        "def counted(real):\n"
        "    def call(*arguments, **options):\n"
        "        global calls\n"
        "        calls -= 1\n"
        "        if calls < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return real(*arguments, **options)\n"
        "    return call\n"
        "os.fsync = counted(os.fsync)\n"
        "os.open = counted(os.open)\n"
        "os.replace = counted(os.replace)\n"
        f"keymgmt.rewrap({str(path)!r}, keys={str(config)!r}, add=['local:b'])\n"
    )
    codes = []
    for calls in range(0, 40, 3):
        done = subprocess.run(
            [sys.executable, script, str(calls)], capture_output=True, check=False
        )
        codes.append(done.returncode)
        assert opens(site, path)
        assert groups(path)[0] == "file:a@1"
        if done.returncode == 0:
            break
    assert -signal.SIGKILL in codes
    assert codes[-1] == 0
    assert groups(path) == ["file:a@1", "file:b@1"]


@pytest.fixture
def tree(site):
    for number in range(5):
        site.seal("local:a", target=f"tree{number}.sealed")
    folder = site.root / "tree"
    folder.mkdir()
    for number in range(5):
        below = folder / f"d{number % 2}"
        below.mkdir(exist_ok=True)
        (site.root / f"tree{number}.sealed").rename(below / f"m{number}.sealed")
    (folder / "loop").symlink_to(folder)
    return folder


def test_a_tree(site, tree):
    (tree / "d0" / "m0.sealed" / "keys.json").write_bytes(b"{}")
    site.provider.rotate_key("a")
    done = list(keymgmt.rewrap_tree(tree, keys=site.config()))
    failures = [item for item in done if isinstance(item, keymgmt.Failure)]
    assert [Path(item.path).name for item in failures] == ["m0.sealed"]
    assert sum(isinstance(item, keymgmt.Rewrapped) and item.changed for item in done) == 4
    again = list(keymgmt.rewrap_tree(tree, keys=site.config()))
    assert not any(isinstance(item, keymgmt.Rewrapped) and item.changed for item in again)


def test_a_group_that_no_model_of_a_tree_has_is_told(site, tree):
    """A misspelt group to drop must not pass for one that was dropped."""
    config = site.config()
    keymgmt.rewrap(tree / "d0" / "m0.sealed", keys=config, add=["local:b"])
    done = list(keymgmt.rewrap_tree(tree, keys=config, drop=["file:b", "file:nobody"]))
    (failure,) = (item for item in done if isinstance(item, keymgmt.Failure))
    assert failure.path == str(tree)
    assert isinstance(failure.error, errors.ConfigError)
    assert "file:nobody" in str(failure.error)
    assert sum(item.changed for item in done if isinstance(item, keymgmt.Rewrapped)) == 1
    assert groups(tree / "d0" / "m0.sealed") == ["file:a@1"]


def test_usage_of_a_tree(site, tree):
    keymgmt.rewrap(tree / "d0" / "m0.sealed", keys=site.config(), add=["local:b"])
    found = keymgmt.usage(tree)
    assert found.models == 5
    assert found.of("file", "a", "1").opens == 5
    assert len(found.of("file", "a", "1").only_way_into) == 4
    assert found.of("file", "b", "1").only_way_into == []
    assert found.of("file", "a", "2") is None
    assert found.to_json()["complete"] is True


def test_usage_says_what_it_could_not_read(site, tree):
    (tree / "d0" / "m0.sealed" / "manifest.json").write_bytes(b"{}")
    found = keymgmt.usage(tree)
    assert found.models == 4
    assert found.to_json()["complete"] is False
    assert keymgmt.usage(site.root / "nowhere").to_json()["complete"] is False


def test_reseal_is_a_new_model(site):
    path = site.seal("local:a", "local:b", name="minilm", release=4)
    old = keymgmt.inspect(path).manifest
    keymgmt.reseal(path, to=["local:c"], keys=site.config())
    new = keymgmt.inspect(path)
    assert (new.manifest.name, new.manifest.release) == ("minilm", 4)
    assert new.manifest.id != old.id
    assert new.manifest.commitment != old.commitment
    assert [list(group) for group in new.groups] == [["file:c@1"]]
    assert opens(site, path)
    assert not [p.name for p in site.root.iterdir() if p.name.endswith(".tmp")]


def test_reseal_of_a_damaged_model_keeps_it(site, tree_of):
    path = site.seal()
    payload = path / "payload" / "model.bin.floe"
    data = payload.read_bytes()
    payload.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = tree_of(path)
    with pytest.raises(errors.IntegrityError):
        keymgmt.reseal(path, to=["local:b"], keys=site.config())
    assert tree_of(path) == before
    assert not [p.name for p in site.root.iterdir() if p.name.endswith(".tmp")]


def test_reseal_does_not_replace_what_came_meanwhile(site, tree_of):
    """Another sealed model, or a target, that appears while a long reseal runs is not lost."""
    path, config = site.seal(), site.config()
    newer = site.seal(target="newer.sealed", release=9)
    content = tree_of(newer)

    def progress(done, total):
        if newer.exists():
            path.rename(site.root / "old.sealed")
            newer.rename(path)

    with pytest.raises(errors.IntegrityError, match="exchanged"):
        keymgmt.reseal(path, to=["local:b"], keys=config, progress=progress)
    assert tree_of(path) == content
    assert not [p.name for p in site.root.iterdir() if p.name.endswith(".tmp")]


def test_two_who_replace_a_model_take_turns(site, tree_of, monkeypatch):
    """Neither a seal --force nor a rewrap is lost to a reseal that runs meanwhile."""
    monkeypatch.setattr("keymgmt.sealed.folder._WAIT", 0.1)
    path, config = site.seal(), site.config()
    refused = []

    def progress(done, total):
        for change in (
            lambda: site.seal(force=True, release=9),
            lambda: keymgmt.rewrap(path, keys=config, add=["local:b"]),
            lambda: keymgmt.sign(path, key="local:stranger", keys=config),
        ):
            with pytest.raises(errors.ConfigError, match="somebody else"):
                change()
            refused.append(change)

    keymgmt.reseal(path, to=["local:b"], keys=config, progress=progress)
    assert refused
    assert groups(path) == ["file:b@1"]
    site.seal(force=True, release=9)
    assert keymgmt.inspect(path).manifest.release == 9
    assert not [p.name for p in site.root.iterdir() if p.name.endswith(".tmp")]


def test_a_target_of_reseal_that_comes_meanwhile(site):
    def progress(done, total):
        (site.root / "out.sealed").mkdir(exist_ok=True)

    with pytest.raises(errors.ConfigError, match="exists") as caught:
        keymgmt.reseal(
            site.seal(),
            site.root / "out.sealed",
            to=["local:b"],
            keys=site.config(),
            progress=progress,
        )
    assert "--force" not in caught.value.hint


def test_reseal_does_not_sign_by_default_what_nobody_verified(site):
    """[seal] sign signs what was made here; a model from elsewhere is signed by a choice."""
    path = site.seal(sign="local:stranger")
    open_to_all = site.config(publishers={}, require_signature=False)
    with pytest.raises(errors.ConfigError, match="nobody's signature") as caught:
        keymgmt.reseal(path, to=["local:b"], keys=open_to_all)
    assert "--sign" in caught.value.hint
    keymgmt.reseal(path, to=["local:b"], keys=open_to_all, sign="local:publisher")
    assert opens(site, path)


def test_reseal_without_a_signer_where_signatures_are_required(site):
    path = site.seal()
    config = site.config()
    config.seal.__dict__["sign"] = None
    with pytest.raises(errors.ConfigError, match="no key to sign with"):
        keymgmt.reseal(path, to=["local:b"], keys=config)


def test_an_unreadable_folder_in_a_tree(site, tree, tmp_path):
    def look():
        become_nobody()  # root reads every folder
        assert keymgmt.usage(tree).to_json()["complete"] is False

    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (tree / "d1").chmod(0)
    try:
        in_child(look)
    finally:
        (tree / "d1").chmod(0o755)


def test_what_a_killed_rewrap_left_is_swept_up(site):
    path = site.seal()
    (path / ".keys.json.0123456789abcdef.tmp").write_bytes(b"half")
    keymgmt.rewrap(path, keys=site.config(), add=["local:b"])
    assert sorted(p.name for p in path.iterdir()) == [
        "keys.json",
        "manifest.json",
        "payload",
        "signatures.json",
    ]


def test_more_groups_than_one_open_would_try(site):
    """An open tries few, since anybody can add some; a policy with a right MAC is tried whole."""
    keys = [f"k{number}" for number in range(70)]
    for key in keys:
        site.provider.create_key(key, "aes256", {})
    path = site.seal(*(f"local:{key}" for key in keys))
    for key in keys:
        site.provider.rotate_key(key)
    done = keymgmt.rewrap(path, keys=site.config())
    assert {group.state for group in done.groups} == {"moved"}
    assert all(group.tested for group in done.groups)
    assert groups(path) == [f"file:{key}@2" for key in keys]


def test_a_key_of_that_name_in_another_key_service_is_another_key(site, tmp_path):
    """Two sites that both call their key "a" are two groups, whatever the groups are called."""
    (tmp_path / "there").mkdir(mode=0o700)
    places = {"here": str(site.root / "keys"), "there": str(tmp_path / "there")}

    def config(*names):
        providers = {name: {"backend": "file", "path": places[name]} for name in names}
        return keymgmt.Config({"providers": providers, "policy": site.policy})

    config("there").provider("there").create_key("a", "aes256", {})
    path, both = site.seal("local:a"), config("here", "there")
    both.policy.publishers.clear()
    both.policy.publishers[str(site.root / "pub.pem")] = ["*"]
    only_there = config("there")
    only_there.policy.publishers.clear()
    only_there.policy.publishers[str(site.root / "pub.pem")] = ["*"]
    assert not keymgmt.rewrap(path, keys=both, add=["here:a"]).changed
    assert keymgmt.rewrap(path, keys=both, add=["there:a"]).changed
    keymgmt.open(path, keys=only_there).close()
    assert not keymgmt.rewrap(path, keys=both, add=["there:a", "here:a"]).changed
    assert len(groups(path)) == 2


def test_a_tree_with_the_same_model_twice(site, tree):
    """What is asked ahead for one is not taken by the other, though the questions are the same."""
    for number in range(3):
        shutil.copytree(tree / "d0" / "m0.sealed", tree / f"copy{number}.sealed")
    site.provider.rotate_key("a")
    done = list(keymgmt.rewrap_tree(tree, keys=site.config()))
    assert [(item.changed, item.exit_code) for item in done] == [(True, 0)] * 8


def test_what_killed_runs_left_in_a_tree_is_swept_up(site, tree):
    """Also where there is nothing to do any more."""
    (tree / "d0" / "m0.sealed" / ".keymgmt.lock").touch()
    (tree / "d1" / "m1.sealed" / ".keys.json.0123456789abcdef.tmp").write_bytes(b"half")
    done = list(keymgmt.rewrap_tree(tree, keys=site.config(), dry_run=True))
    assert len(list(tree.rglob(".*"))) == 2
    done = list(keymgmt.rewrap_tree(tree, keys=site.config()))
    assert [(item.changed, item.exit_code) for item in done] == [(False, 0)] * 5
    assert not list(tree.rglob(".*"))


def test_what_another_run_changed_meanwhile_is_not_overwritten(site, tree, monkeypatch):
    config, path = site.config(), tree / "d0" / "m0.sealed"
    site.provider.rotate_key("a")
    real = SealedFolder.lock
    others = [path]

    def lock(folder, **how):
        if folder.path == path and others:
            others.pop()
            keymgmt.rewrap(path, keys=config, add=["local:b"])
        return real(folder, **how)

    monkeypatch.setattr(SealedFolder, "lock", lock)
    done = {item.path: item for item in keymgmt.rewrap_tree(tree, keys=config)}
    assert done[str(path)].changed
    assert groups(path) == ["file:a@2", "file:b@1"]


def test_two_rotations_of_one_tree_at_once(site, tree, monkeypatch):
    """They take turns at each model, do not wait for each other in a circle, do nothing twice."""
    monkeypatch.setattr("keymgmt._verbs.rewrap_tree.CHUNK", 16)
    monkeypatch.setattr("keymgmt.sealed.folder._WAIT", 20)
    for number in range(59):
        shutil.copytree(tree / "d0" / "m0.sealed", tree / f"copy{number}.sealed")
    site.provider.rotate_key("a")
    config = site.config()
    begin = threading.Barrier(2)

    def rotate(_):
        begin.wait()
        return list(keymgmt.rewrap_tree(tree, keys=config))

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(rotate, range(2))
    assert {(type(item), item.exit_code) for item in one + other} == {(keymgmt.Rewrapped, 0)}
    assert sorted(a.changed + b.changed for a, b in zip(one, other, strict=True)) == [1] * 64
    assert not list(tree.rglob(".*"))


def test_a_disk_that_fails_under_one_model_of_a_tree(site, tree, monkeypatch):
    """Its keys.json is the old one, nothing lies about, and the others are done."""
    site.provider.rotate_key("a")
    path, real = tree / "d0" / "m0.sealed", os.fsync

    def fsync(descriptor):
        file = Path(f"/proc/self/fd/{descriptor}").readlink()
        if file.parent == path and file.name.startswith(".keys.json."):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        done = list(keymgmt.rewrap_tree(tree, keys=site.config()))
    (failure,) = (item for item in done if isinstance(item, keymgmt.Failure))
    assert failure.path == str(path)
    assert os.strerror(errno.EIO) in str(failure.error)
    assert groups(path) == ["file:a@1"]
    assert not list(tree.rglob(".*"))
    again = list(keymgmt.rewrap_tree(tree, keys=site.config()))
    assert [item.path for item in again if item.changed] == [str(path)]


@pytest.mark.parametrize("stop", [False, True])
def test_no_model_is_locked_while_a_result_is_handed_out(site, tree, monkeypatch, stop):
    """Whoever takes the results may take his time, or may stop."""
    monkeypatch.setattr("keymgmt._verbs.rewrap_tree.CHUNK", 2)
    site.provider.rotate_key("a")
    done = keymgmt.rewrap_tree(tree, keys=site.config())
    for item in done:
        assert item.changed
        assert not list(tree.rglob(".*"))
        keymgmt.rewrap(item.path, keys=site.config(), add=["local:b"])
        if stop:
            break
    done.close()
    assert not list(tree.rglob(".*"))
    assert all(group[0] in ("file:a@1", "file:a@2") for group in map(groups, tree.glob("*/m*")))


def test_no_model_stays_locked_while_a_key_service_is_asked(site, tree, monkeypatch):
    """It may hang, and another run waits a minute for a model."""
    monkeypatch.setattr("keymgmt._verbs.rewrap_tree.CHUNK", 2)
    site.provider.rotate_key("a")
    provider = type(site.provider)
    real = provider.unwrap_batch

    def slow(self, items):
        until(lambda: not list(tree.rglob(".*")))
        return real(self, items)

    monkeypatch.setattr(provider, "unwrap_batch", slow)
    assert all(item.changed for item in keymgmt.rewrap_tree(tree, keys=site.config()))


def test_shards_of_a_tree_join_to_the_whole(site, tree, tmp_path):
    """Each model is in one part, whatever the tree is called where the part runs."""
    (tree / "d1" / "m1.sealed" / "keys.json").write_bytes(b"{}")
    (tree / "d0" / "nowhere").symlink_to("not there")
    site.provider.rotate_key("a")
    elsewhere = tmp_path / "mounted here"
    elsewhere.symlink_to(tree)
    seen = []
    for number, place in enumerate([tree, elsewhere, tree], 1):
        done = keymgmt.rewrap_tree(place, keys=site.config(), shard=f"{number}/3")
        seen += [str(Path(item.path).relative_to(place)) for item in done]
    assert len(seen) == len(set(seen))
    whole = list(keymgmt.rewrap_tree(tree, keys=site.config()))
    assert sorted(seen) == sorted(str(Path(item.path).relative_to(tree)) for item in whole)
    assert not any(isinstance(item, keymgmt.Rewrapped) and item.changed for item in whole)
    (failure,) = keymgmt.rewrap_tree(tree / "not there", keys=site.config(), shard="3/3")
    assert isinstance(failure, keymgmt.Failure)


def test_a_model_is_in_the_same_part_for_every_verb(site, tree):
    def models(verb, **options):
        return {Path(item.path).name for item in verb(tree, keys=site.config(), **options)}

    parts = []
    for shard in ("1/3", "2/3", "3/3"):
        parts.append(part := models(keymgmt.rewrap_tree, shard=shard))
        assert part == models(keymgmt.verify_tree, shard=shard)
        assert part == models(keymgmt.sign_tree, if_signed_by=[site.root / "pub.pem"], shard=shard)
        assert part == models(keymgmt.reseal_tree, to=["local:a"], shard=shard)
        uses = keymgmt.usage(tree, shard=shard).keys
        assert part == {Path(path).name for use in uses for path in use.only_way_into}
    assert max(map(len, parts)) < 5 == sum(map(len, parts))


@pytest.mark.parametrize(
    "shard", ["", "0/2", "3/2", "1", "1/2/3", "-1/2", "1/0", "a/b", "1/9999999"]
)
def test_what_is_no_shard(site, tree, shard):
    with pytest.raises(errors.ConfigError, match="no part of a tree") as caught:
        list(keymgmt.rewrap_tree(tree, keys=site.config(), shard=shard))
    assert caught.value.hint
    with pytest.raises(errors.ConfigError, match="no part of a tree"):
        keymgmt.usage(tree, shard=shard)


def test_a_plugin_that_answers_a_batch_wrongly_stops_no_tree(site, tree, monkeypatch):
    config = site.config()
    provider = config.provider("local")
    kind = type("Batching", (type(provider), SupportsBatchUnwrap), {"unwrap_batch": lambda *_: []})
    provider.__class__ = kind
    done = list(keymgmt.rewrap_tree(tree, keys=config))
    assert [type(item) for item in done] == [keymgmt.Rewrapped] * 5


def test_dropping_a_key_drops_all_its_versions(site):
    """Models of a tree were sealed at different times; a lost site must not keep half of them."""
    path = site.seal("local:a", "local:b")
    site.provider.rotate_key("b")
    keymgmt.rewrap(path, keys=site.config())
    assert groups(path) == ["file:a@1", "file:b@2"]
    done = keymgmt.rewrap(path, keys=site.config(), drop=["file:b@1"])
    assert (groups(path), done.left) == (["file:a@1"], ())


def test_dropping_one_version_is_asked_for(site):
    path = site.seal("local:a", "local:b")
    site.provider.rotate_key("b")
    keymgmt.rewrap(path, keys=site.config())
    with pytest.raises(errors.ConfigError, match="no group file:b@1"):
        keymgmt.rewrap(path, keys=site.config(), drop=["file:b@1"], exact=True)
    keymgmt.rewrap(path, keys=site.config(), drop=["file:b@2"], exact=True)
    assert groups(path) == ["file:a@1"]


def test_what_is_left_of_a_dropped_key_is_told(site):
    path = site.seal("local:a+local:b", "local:b", "local:c")
    done = keymgmt.rewrap(path, keys=site.config(), drop=["file:b"])
    assert done.left == ("file:a@1+file:b@1",)
    assert groups(path) == ["file:a@1+file:b@1", "file:c@1"]


def test_adding_a_key_that_is_there_moves_it(site):
    path = site.seal("local:a", "local:b+local:c")
    for key in "abc":
        site.provider.rotate_key(key)
    done = keymgmt.rewrap(path, keys=site.config(), add=["local:a", "local:b+local:c"])
    assert [(state.group, state.state) for state in done.groups] == [
        ("file:a@2", "moved"),
        ("file:b@2+file:c@2", "moved"),
    ]
    assert groups(path) == ["file:a@2", "file:b@2+file:c@2"]
    assert opens(site, path)


def test_adding_a_retired_key_doubles_it_since_nothing_proves_that_it_is_the_same(site):
    path = site.seal("local:a", "local:b")
    site.provider.rotate_key("b")
    site.provider.retire_version("b", "1")
    keymgmt.rewrap(path, keys=site.config(), add=["local:b"])
    assert groups(path) == ["file:a@1", "file:b@1", "file:b@2"]


def test_exactly_these_groups(site):
    path = site.seal("local:a", "local:b")
    site.provider.rotate_key("b")
    done = keymgmt.rewrap(path, keys=site.config(), to=["local:c", "local:b"])
    assert {(state.group, state.state) for state in done.groups} == {
        ("file:a@1", "dropped"),
        ("file:b@2", "moved"),
        ("file:c@1", "added"),
    }
    assert groups(path) == ["file:b@2", "file:c@1"]
    assert not keymgmt.rewrap(path, keys=site.config(), to=["local:c", "local:b"]).changed
    with pytest.raises(errors.ConfigError, match="--set"):
        keymgmt.rewrap(path, keys=site.config(), to=["local:a"], add=["local:b"])


def test_a_retired_version_is_denied_and_not_passed_over(site):
    path = site.seal("local:a", "local:b")
    site.provider.rotate_key("b")
    site.provider.retire_version("b", "1")
    done = keymgmt.rewrap(path, keys=site.config())
    assert [state.state for state in done.groups] == ["current", "denied"]
    assert done.exit_code == 5
    assert done.groups[1].to_json()["class"] == "KeyRetired"


def test_one_member_of_another_machine_makes_a_group_foreign(site):
    """Whether the other member's service answers does not matter then."""
    path = site.seal("local:a", "local:b+local:c")
    (site.root / "keys" / "c.jwks").rename(site.root / "c.away")
    (site.root / "keys" / "versions.json").unlink()  # this machine never had it
    done = keymgmt.rewrap(path, keys=site.config())
    assert [state.state for state in done.groups] == ["current", "foreign"]
    assert done.exit_code == 0


def test_who_may_wrap_and_not_unwrap_is_no_key_of_another(site, monkeypatch):
    """A key of the same name in a service where this user only wraps is not the one that opened."""
    (site.root / "more").mkdir(mode=0o700)
    data = {
        "providers": {
            "one": {"backend": "file", "path": str(site.root / "keys")},
            "two": {"backend": "file", "path": str(site.root / "more")},
        },
        "policy": site.policy,
    }
    config = Config(data, path=site.root / "keymgmt.toml")
    config.provider("two").create_key("a", "aes256", {})
    path = site.seal("one:a", keys=config, sign="one:publisher")
    before = (path / "keys.json").read_bytes()

    def denied(wrapped, context):
        raise errors.AccessDenied("the policy does not allow decrypt")

    monkeypatch.setattr(config.provider("two"), "unwrap", denied)
    done = keymgmt.rewrap(path, to=["two:a"], keys=config, force=True)
    assert done.changed
    assert (path / "keys.json").read_bytes() != before
    # It opens with the other service's key alone.
    fresh = Config(data, path=site.root / "keymgmt.toml")
    with keymgmt.open(path, keys=fresh) as model:
        assert model.opened_by == ("two",)
    del data["providers"]["two"]
    with pytest.raises(errors.CannotUnlock):
        keymgmt.open(path, keys=Config(data, path=site.root / "keymgmt.toml"))
