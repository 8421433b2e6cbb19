"""Finding every model of a tree, and retiring what none of them needs."""

from __future__ import annotations

import os
import random
import shutil
import tracemalloc
from pathlib import Path

import pytest

import keymgmt
from keymgmt import errors
from keymgmt._verbs.find_models import Failure, find_models


@pytest.fixture
def tree(site):
    """A folder with one model, sealed to version 1 of ``local:a``, which has a version 2."""
    folder = site.root / "tree"
    folder.mkdir()
    site.seal("local:a").rename(folder / "m.sealed")
    site.provider.rotate_key("a")
    return folder


def look(site, *trees, key="local:a@1", **options):
    return keymgmt.needs(key, *trees, keys=site.config(), **options)


def names(tree):
    return [
        f"!{Path(item.path).name}" if isinstance(item, Failure) else item.name
        for item in find_models(tree)
    ]


def test_whoever_opens_is_listed(site, tree):
    other = site.seal("local:a", "local:b", target="other.sealed")
    need = look(site, tree, other)
    assert need.verdict == "needed"
    assert need.opens == (str(tree / "m.sealed"),)
    assert need.only_way_into == need.opens
    with pytest.raises(errors.ConfigError, match=r"opens 1 model.*m\.sealed") as caught:
        need.check()
    assert f"keymgmt rewrap {tree}" in caught.value.hint
    list(keymgmt.rewrap_tree(tree, keys=site.config()))
    need = look(site, tree, other)
    assert (need.verdict, need.models, need.proved) == ("not_referenced", 2, True)
    need.check()


def test_a_model_behind_a_link_is_seen_once(site, tree):
    (tree / "m.sealed").rename(site.root / "store.sealed")
    for name in ("m.sealed", "again.sealed"):
        (tree / name).symlink_to("../store.sealed")
    need = look(site, tree)
    assert need.verdict == "needed"
    assert (need.models, len(need.opens)) == (1, 1)
    assert {(link.path, link.target) for link in need.links} == {
        (str(tree / name), str(site.root / "store.sealed")) for name in ("m.sealed", "again.sealed")
    }
    assert look(site, tree, site.root / "store.sealed").models == 1


def test_a_folder_of_models_behind_a_link(site, tree):
    live = site.root / "live"
    live.mkdir()
    (live / "now").symlink_to("../tree")
    assert look(site, live).verdict == "needed"
    # The second tree adds nothing to the first, and is no empty one.
    assert look(site, tree, live).failures == ()
    assert keymgmt.usage(live).models == 1


def make_model(folder):
    (folder / "payload").mkdir(parents=True)
    for name in ("manifest.json", "keys.json"):
        (folder / name).touch()


def reached(folders):
    """The real paths of all models, by a search that remembers each folder."""
    seen, waiting = set(), [os.path.realpath(folder) for folder in folders]
    while waiting:
        folder = waiting.pop()
        if folder not in seen:
            seen.add(folder)
            waiting += [os.path.realpath(each.path) for each in os.scandir(folder) if each.is_dir()]
    return sorted(folder for folder in seen if Path(folder, "manifest.json").exists())


@pytest.mark.parametrize("seed", range(40))
def test_a_maze_of_links(tmp_path, seed):
    """Whatever links lead where, each model is found, and once."""
    choose = random.Random(seed)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for number in range(choose.randint(0, 6)):
        folders.append(choose.choice(folders) / f"d{number}")
    for number in range(choose.randint(0, 6)):
        folders.append(choose.choice(folders) / f"m{number}.sealed")
        make_model(folders[-1])
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(choose.randint(0, 8)):
        link = choose.choice(folders) / f"{choose.choice('az')}{number}"
        link.symlink_to(choose.choice([*folders, tmp_path]))
    trees = [choose.choice(folders) for _ in range(choose.randint(1, 3))]
    found = [item for item in find_models(trees) if not isinstance(item, Failure)]
    assert sorted(map(os.path.realpath, found)) == reached(trees)


def test_a_tree_is_walked_in_the_same_memory_however_many_models_it_has(tmp_path):
    for number in range(2000):
        make_model(tmp_path / f"d{number % 50}" / f"m{number}.sealed")
    memory = []
    tracemalloc.start()
    try:
        for number, _ in enumerate(find_models(tmp_path)):
            if number in (1000, 1999):
                memory.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert memory[1] - memory[0] < 20_000


@pytest.mark.parametrize("where", ["empty", "misspelt"])
def test_a_tree_without_a_model_retires_nothing(site, tree, where):
    (site.root / "empty").mkdir()
    list(keymgmt.rewrap_tree(tree, keys=site.config()))
    need = look(site, tree, site.root / where)
    assert need.verdict == "unknown"
    with pytest.raises(errors.ConfigError, match=where):
        need.check()
    assert keymgmt.usage(site.root / where).to_json()["complete"] is False


def test_a_link_to_itself_is_told_and_ends_nothing(site, tree):
    (tree / "self").symlink_to("self")
    (tree / "dangling").symlink_to("nowhere")
    (tree / "around").symlink_to(".")
    (tree / "z.sealed").symlink_to("m.sealed")
    need = look(site, tree)
    assert need.opens
    assert {Path(failure.path).name for failure in need.failures} == {"self", "dangling"}
    assert "link" in str(need.failures[0].error)
    done = list(keymgmt.rewrap_tree(tree, keys=site.config()))
    assert sum(isinstance(item, keymgmt.Rewrapped) and item.changed for item in done) == 1


@pytest.mark.parametrize(
    "missing",
    ["manifest.json", "keys.json", "payload/model.bin.floe", "payload", "signatures.json"],
)
def test_half_a_copy_is_not_passed_over(site, tree, missing):
    """Who sealed to version 1 needs it to open what an interrupted copy will be."""
    half = tree / "half.sealed"
    shutil.copytree(tree / "m.sealed", half)
    shutil.rmtree(half / missing) if missing == "payload" else (half / missing).unlink()
    list(keymgmt.rewrap_tree(tree / "m.sealed", keys=site.config()))
    assert look(site, tree).verdict != "not_referenced"
    assert look(site, tree, names_only=True).verdict != "not_referenced"


def test_a_copy_that_was_cut_off(site, tree):
    half = tree / "half.sealed"
    half.mkdir()
    content = (tree / "m.sealed" / "keys.json").read_bytes()
    for length in (40, len(content) // 2, len(content) - 1):
        (half / "keys.json").write_bytes(content[:length])
        assert names(tree) == ["half.sealed", "m.sealed"]
    (half / "keys.json").unlink()
    (half / "manifest.json").write_bytes((tree / "m.sealed" / "manifest.json").read_bytes())
    assert names(tree) == ["half.sealed", "m.sealed"]


def test_a_model_in_a_models_folder(site, tree):
    inner = tree / "outer.sealed" / "old.sealed"
    list(keymgmt.rewrap_tree(tree, keys=site.config()))
    shutil.copytree(tree / "m.sealed", tree / "outer.sealed")
    site.provider.rotate_key("b")
    shutil.copytree(site.seal("local:b", target="b.sealed"), inner)
    site.provider.rotate_key("b")
    assert look(site, tree, key="local:b@2").opens == (str(inner),)


@pytest.mark.parametrize(
    "content",
    [
        b'{"name": "app", "manifest_version": 3}',
        b"{ // with a comment\n}",
        b"",
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_foreign_manifest_hides_nothing_and_is_no_model(site, tree, content):
    web = tree / "web"
    web.mkdir()
    (web / "manifest.json").write_bytes(content)
    (tree / "m.sealed").rename(web / "m.sealed")
    assert names(tree) == ["m.sealed"]
    assert look(site, tree).opens


def test_odd_things_in_a_tree(site, tree):
    (tree / "manifest.json").mkdir()
    os.mkfifo(tree / "keys.json")
    (tree / os.fsdecode(b"\xff\xfe")).mkdir()
    (tree / "new\nline").symlink_to("m.sealed")
    assert sorted(names(tree)) == ["m.sealed"]
    assert names(tree / "m.sealed" / "manifest.json") == ["!manifest.json"]


def test_what_a_killed_seal_left_is_no_model(site, tree):
    left = tree / ".n.sealed.0123456789abcdef.tmp" / "payload"
    left.mkdir(parents=True)
    (left / "model.bin.floe").write_bytes(b"half")
    assert names(tree) == ["m.sealed"]


def test_another_service_with_a_key_of_that_name_does_not_stop_it(site, tree, tmp_path):
    """Names say 2 models; one of them is another site's, and no rewrap here changes that."""
    (tmp_path / "there").mkdir(mode=0o700)
    places = {"here": str(site.root / "keys"), "there": str(tmp_path / "there")}
    data = {name: {"backend": "file", "path": place} for name, place in places.items()}
    policy = {"publishers": {str(site.root / "pub.pem"): ["*"]}}
    both = keymgmt.Config({"providers": data, "policy": policy})
    both.provider("there").create_key("a", "aes256", {})
    sealed = tree / "there.sealed"
    keymgmt.seal(site.plain, sealed, to=["there:a"], sign="here:publisher", keys=both)
    only = str(tree / "m.sealed")
    by_name = keymgmt.usage(tree).of("file", "a", "1")
    assert (by_name.opens, by_name.known_by) == (2, "name")
    proved = keymgmt.usage(tree, prove=both)
    assert {(use.identity, use.opens, *use.only_way_into) for use in proved.keys} == {
        ("here", 1, only),
        ("there", 1, str(sealed)),
    }
    assert look(site, tree).opens == (only,)
    list(keymgmt.rewrap_tree(only, keys=site.config()))
    assert look(site, tree).verdict == "not_referenced"
    assert look(site, tree, names_only=True).opens == (str(sealed),)
    # With the config of one site alone, the other's key is known by its name and no more.
    partly = keymgmt.usage(tree, prove=site.config())
    assert {(use.known_by, use.identity, use.version) for use in partly.keys} == {
        ("provider", "local", "2"),
        ("name", "", "1"),
    }


def test_devices_with_one_key_name_are_told_apart_by_their_public_keys(site):
    prints = []
    for number in range(3):
        home = site.root / f"device{number}"
        home.mkdir(mode=0o700)
        device = keymgmt.Config({"providers": {"d": {"backend": "file", "path": str(home)}}})
        device.provider("d").create_key("dev", "hpke-x25519", {})
        recipient = device.provider("d").export_recipient("dev")
        recipient.save(site.root / f"{number}.recipient")
        prints.append(recipient.fingerprint)
    to = [f"@{site.root}/{number}.recipient" for number in range(3)]
    tree = site.seal(*to, fingerprints=prints)
    found = keymgmt.usage(tree)
    assert [(use.known_by, use.opens, use.only_way_into) for use in found.keys] == [
        ("public key", 1, [])
    ] * 3
    assert len({use.identity for use in found.keys}) == 3
    # To an AES key none of them can belong, whatever its version is called.
    site.provider.rotate_key("a")
    assert look(site, tree).verdict == "not_referenced"


@pytest.mark.parametrize(
    "error",
    [errors.AccessDenied, errors.ProviderUnavailable, errors.LockedOut, errors.ProviderError],
)
def test_what_cannot_be_tried_is_unknown(site, tree, monkeypatch, error):
    config = site.config()
    asked = []

    def refuse(self, wrapped, context):
        asked.append(wrapped)
        raise error("not today", hint="ask again")

    shutil.copytree(tree / "m.sealed", tree / "n.sealed")
    monkeypatch.setattr(type(config.provider("local")), "unwrap", refuse)
    monkeypatch.setattr("keymgmt._verbs.prove.unwrap_many", lambda *_: ())  # one at a time
    need = keymgmt.needs("local:a@1", tree, keys=config)
    assert need.verdict == "unknown"
    with pytest.raises(errors.ConfigError, match="not today") as caught:
        need.check()
    assert caught.value.hint == "ask again"
    # A service that is down, or refuses, is not asked for every model.
    assert len(asked) == (2 if error is errors.ProviderError else 1)
    assert keymgmt.usage(tree, prove=config).to_json()["complete"] is False


def test_a_retired_version_that_cannot_be_tried_is_unknown(site, tree):
    """Its number is also that of another site's key, which may be the same key by another name."""
    site.provider.create_key("old", "aes256", {})
    site.provider.rotate_key("old")
    site.provider.retire_version("old", "1")
    # What opens is opened by a version that is not retired, and so by another one.
    need = look(site, tree, key="local:old")
    assert (need.verdict, need.proved) == ("not_referenced", False)
    site.provider.retire_version("a", "1")
    need = look(site, tree, key="local:old")
    assert (need.verdict, need.proved, need.opens) == ("unknown", False, ())
    with pytest.raises(errors.ConfigError, match="local:old@1 is retired, so it cannot be tried"):
        need.check()
    assert look(site, tree, key="local:old", names_only=True).verdict == "not_referenced"
    assert look(site, tree, key="local:a").only_way_into == (str(tree / "m.sealed"),)
    # A wrap by a public key is none of a key that has no public part.
    site.provider.create_key("device", "hpke-x25519", {})
    site.provider.export_recipient("device").save(site.root / "d.recipient")
    prints = [site.provider.export_recipient("device").fingerprint]
    sealed = site.seal(f"@{site.root}/d.recipient", fingerprints=prints, target="d.sealed")
    site.provider.delete_key("device")
    assert look(site, sealed, key="local:old").verdict == "not_referenced"


def test_a_version_that_is_not_there(site, tree):
    with pytest.raises(errors.KeyNotFound, match="no version '7'"):
        look(site, tree, key="local:a@7")
    with pytest.raises(errors.KeyNotFound, match="nowhere"):
        look(site, tree, key="local:nowhere")
