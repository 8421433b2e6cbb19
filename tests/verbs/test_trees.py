"""sign, verify and reseal over trees."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

import keymgmt
from keymgmt import errors
from keymgmt._crypto.signatures import PublicKey
from keymgmt._verbs import seal as seal_module


@pytest.fixture
def rotated(site):
    """A tree of three models, signed by the first version of ``local:publisher``; its second."""
    tree = site.root / "tree"
    tree.mkdir()
    for name in ("a", "b", "c"):
        site.seal(target=f"tree/{name}.sealed", name=name)
    site.provider.rotate_key("publisher")
    (site.root / "new.pem").write_bytes(PublicKey(site.provider.public_key("publisher")).to_pem())
    return tree


def signed(site, tree, **options):
    old = site.root / "pub.pem"
    options = {"if_signed_by": [old], "key": "local:publisher", "keys": site.config()} | options
    done = list(keymgmt.sign_tree(tree, **options))
    return {Path(item.path).stem: getattr(item, "state", None) or item.error for item in done}


def signers(path):
    return len(keymgmt.inspect(path).signers)


def test_only_what_the_old_key_signed_is_signed_again(site, rotated):
    # Planted: unsigned by the old key, signed by a stranger, and a good one that was changed.
    site.seal(target="tree/planted.sealed", sign="local:stranger", name="planted")
    changed = rotated / "changed.sealed"
    shutil.copytree(rotated / "a.sealed", changed)
    payload = changed / "payload" / "model.bin.floe"
    data = payload.read_bytes()
    payload.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    copied = rotated / "copied.sealed"
    shutil.copytree(rotated / "planted.sealed", copied)
    shutil.copy(rotated / "a.sealed" / "signatures.json", copied)
    done = signed(site, rotated)
    assert {name: state for name, state in done.items() if isinstance(state, str)} == dict.fromkeys(
        "abc", "signed"
    )
    assert isinstance(done["planted"], errors.UntrustedPublisher)
    assert isinstance(done["copied"], errors.UntrustedPublisher)
    assert isinstance(done["changed"], errors.IntegrityError)
    assert "pub.pem" in str(done["planted"])
    assert [signers(rotated / f"{name}.sealed") for name in ("a", "planted", "changed")] == [
        2,
        1,
        1,
    ]
    only_new = site.config(publishers={"new.pem": ["*"]})
    for name in "abc":
        keymgmt.open(rotated / f"{name}.sealed", keys=only_new).close()
    with pytest.raises(errors.UntrustedPublisher):
        keymgmt.open(rotated / "planted.sealed", keys=only_new)


def test_doing_it_again_changes_nothing(site, rotated, tree_of):
    signed(site, rotated)
    before = tree_of(rotated)
    assert set(signed(site, rotated).values()) == {"current"}
    assert tree_of(rotated) == before


def test_the_old_key_vouches_for_the_names_that_it_may_publish(site, rotated):
    config = site.config(publishers={"pub.pem": ["a", "b"], "new.pem": ["*"]})
    done = signed(site, rotated, keys=config)
    assert (done["a"], done["b"]) == ("signed", "signed")
    assert isinstance(done["c"], errors.UntrustedPublisher)


def test_a_tree_is_not_signed_just_so(site, rotated):
    with pytest.raises(errors.ConfigError, match="put there") as caught:
        signed(site, rotated, if_signed_by=[])
    assert "--if-signed-by" in caught.value.hint


def test_one_model_may_be_signed_so_too(site, rotated):
    stranger = [site.root / "stranger.pem"]
    with pytest.raises(errors.UntrustedPublisher):
        keymgmt.sign(rotated / "a.sealed", keys=site.config(), if_signed_by=stranger)
    assert signers(rotated / "a.sealed") == 1


@pytest.mark.parametrize("signature_only", [False, True])
def test_verify_of_a_tree(site, rotated, signature_only):
    payload = rotated / "b.sealed" / "payload" / "model.bin.floe"
    data = payload.read_bytes()
    payload.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = list(keymgmt.verify_tree(rotated, keys=site.config(), signature_only=signature_only))
    (failure,) = (item for item in done if isinstance(item, keymgmt.Failure))
    assert failure.path == str(rotated / "b.sealed")
    assert isinstance(failure.error, errors.IntegrityError)
    assert [item.to_json()["name"] for item in done if item is not failure] == ["a", "c"]


def test_reseal_of_a_tree(site, rotated):
    (rotated / "b.sealed" / "LICENSE").write_text("mine")
    before = {name: keymgmt.inspect(rotated / f"{name}.sealed").manifest.id for name in "abc"}
    done = list(keymgmt.reseal_tree(rotated, to=["local:b"], keys=site.config()))
    assert sorted(getattr(item, "state", "failed") for item in done) == [
        "failed",
        "resealed",
        "resealed",
    ]
    after = {name: keymgmt.inspect(rotated / f"{name}.sealed").manifest.id for name in "abc"}
    assert [before[name] != after[name] for name in "abc"] == [True, False, True]
    assert (rotated / "b.sealed" / "LICENSE").read_text() == "mine"


def test_an_interrupted_reseal_goes_on_where_it_was(site, monkeypatch):
    def sealed_at(moment, *names, **options):
        monkeypatch.setattr(seal_module, "utc_text", lambda: moment)
        for name in names:
            site.seal(target=f"tree/{name}.sealed", name=name, **options)

    tree = site.root / "tree"
    tree.mkdir()
    sealed_at("2020-01-01T00:00:00Z", "a", "b")
    # Planted: by what it says of itself it would be passed over.
    sealed_at("2999-01-01T00:00:00Z", "planted", sign="local:stranger")
    options = {"to": ["local:b"], "keys": site.config()}
    keymgmt.reseal(tree / "a.sealed", **options)  # as far as a run came that was ended here
    ids = [keymgmt.inspect(tree / f"{name}.sealed").manifest.id for name in "ab"]
    options["created_before"] = datetime(2021, 1, 1, tzinfo=UTC)
    done = list(keymgmt.reseal_tree(tree, **options))
    assert [getattr(item, "state", "failed") for item in done] == ["current", "resealed", "failed"]
    assert isinstance(done[2].error, errors.UntrustedPublisher)
    now = [keymgmt.inspect(tree / f"{name}.sealed").manifest.id for name in "ab"]
    assert [old == new for old, new in zip(ids, now, strict=True)] == [True, False]
    assert done[0].to_json().keys() == done[1].to_json().keys()
    options["created_before"] = datetime(2021, 1, 1)
    with pytest.raises(errors.ConfigError, match="time zone"):
        next(keymgmt.reseal_tree(tree, **options))
