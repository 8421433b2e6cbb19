"""Rotation on a real server, where one key has two names and two services have one."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rounds import rewrap_killed

import keymgmt

COUNT = itertools.count()
MOUNTS = {"site": "here", "other": "there"}


class Services:
    """Two Transit engines of one server, each with a fresh key ``al`` and a key ``am``."""

    def __init__(self, bao: Any, folder: Path) -> None:
        self.folder = folder
        number = next(COUNT)
        self.al, self.am = f"al{number}", f"am{number}"
        for mount in MOUNTS.values():
            bao.transit(mount, self.al, self.am)
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(bao.root)
        self._common = {
            "backend": "vault",
            "address": bao.address,
            "ca_file": str(bao.authority.ca_file),
            "auth": {"method": "token", "token": {"file": str(token)}},
        }
        (folder / "model.onnx").write_bytes(b"model")

    def config(self, *names: str, alias: bool = False, **tables: Any) -> keymgmt.Config:
        tables = {
            name: {**self._common, "mount": MOUNTS[name], **tables.get(name, {})} for name in names
        }
        if alias:
            tables["site"]["keys"] = {"prod": {"name": self.al}}
        return keymgmt.Config({"providers": tables, "policy": {"require_signature": False}})

    def seal(self, path: Path, to: list[str], config: keymgmt.Config) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        keymgmt.seal(self.folder / "model.onnx", path, to=to, keys=config)
        return path


@pytest.fixture
def services(bao, tmp_path) -> Services:
    return Services(bao, tmp_path)


def opens(path: Path, config: keymgmt.Config) -> bool:
    try:
        with keymgmt.open(path, keys=config) as model:
            return bool(model.read("model.onnx") == b"model")
    except keymgmt.errors.KeymgmtError:
        return False


def test_a_key_under_another_name_is_not_unused(services):
    tree, plain = services.folder / "tree", services.config("site")
    with services.config("site", alias=True) as sealing, plain:
        services.seal(tree / "m.sealed", ["site:prod"], sealing)
        services.seal(tree / "n.sealed", [f"site:{services.am}"], sealing)
        sealing.provider("site").rotate_key("prod")
        key = f"site:{services.al}@1"
        need = keymgmt.needs(key, tree, keys=plain)
        assert need.only_way_into == (str(tree / "m.sealed"),)
        # The weaker way does not see it, which is why it has to be asked for.
        assert keymgmt.needs(key, tree, keys=plain, names_only=True).verdict == "not_referenced"
        # And from the other side: the retiring config has the other name.
        services.seal(tree / "o.sealed", [f"site:{services.al}"], plain)
        plain.provider("site").rotate_key(services.al)
        need = keymgmt.needs("site:prod@2", tree, keys=sealing)
        assert need.opens == (str(tree / "o.sealed"),)
        # Retired, it cannot be tried any more, and until it is deleted that can be undone.
        plain.provider("site").retire_version(services.al, "1")
        need = keymgmt.needs(f"site:{services.al}", tree / "m.sealed", keys=plain)
        assert (need.verdict, need.proved) == ("unknown", False)


def test_without_the_right_to_try_nobody_knows(services, bao):
    tree = services.folder / "tree"
    with services.config("site") as sealing:
        services.seal(tree / "m.sealed", [f"site:{services.al}"], sealing)
        sealing.provider("site").rotate_key(services.al)
    path = f"here/keys/{services.al}"
    rotates = f'path "{path}" {{ capabilities = ["read"] }}'
    (services.folder / "token").write_text(bao.token(rotates))
    with services.config("site") as rotating:
        need = keymgmt.needs(f"site:{services.al}@1", tree, keys=rotating)
        assert need.verdict == "unknown"
        with pytest.raises(keymgmt.errors.ConfigError, match="nobody knows") as caught:
            need.check()
        assert "decrypt" in str(caught.value.hint)


@pytest.fixture
def two_sites(services) -> Path:
    """Six models that each of two services opens; both keys have a second version."""
    tree = services.folder / "tree"
    with services.config("site", "other") as sealing:
        first = services.seal(
            tree / "m0.sealed", [f"site:{services.al}", f"other:{services.am}"], sealing
        )
        for number in range(1, 6):
            shutil.copytree(first, tree / f"m{number}.sealed")
        for name, key in (("site", services.al), ("other", services.am)):
            provider: Any = sealing.provider(name)
            provider.rotate_key(key)
    return tree


def rewrap(tree: Path, config: keymgmt.Config, **options: Any) -> list[keymgmt.Rewrapped]:
    done = list(keymgmt.rewrap_tree(tree, keys=config, **options))
    assert all(isinstance(item, keymgmt.Rewrapped) for item in done), done
    return done  # type: ignore[return-value]


def down(port: int) -> dict[str, Any]:
    return {"address": f"https://127.0.0.1:{port}", "timeout": 1.0}


def states(done: list[keymgmt.Rewrapped]) -> set[tuple[str, ...]]:
    return {tuple(group.state for group in item.groups) for item in done}


def test_a_service_that_is_down_is_told_and_asked_once(services, two_sites, free_port, monkeypatch):
    with services.config("site") as alone:
        config = services.config("site", "other", other=down(free_port))
        provider = config.provider("other")
        asked: list[str] = []
        for name in ("unwrap", "unwrap_batch", "wrap"):
            call = getattr(provider, name)

            def count(*arguments: Any, call: Callable[..., Any] = call, name: str = name) -> Any:
                asked.append(name)
                return call(*arguments)

            monkeypatch.setattr(provider, name, count)
        with config:
            done = rewrap(two_sites, config)
            assert states(done) == {("moved", "unreachable")}
            assert {item.exit_code for item in done} == {6}
            group = done[0].groups[1].to_json()
            assert group["class"] == "ProviderUnavailable"
            assert group["hint"]
            assert asked == ["unwrap_batch"]
        # Who has only the one site's key sees the other's group as foreign, and nothing is wrong.
        done = rewrap(two_sites, alone)
        assert states(done) == {("current", "foreign")}
        assert {item.exit_code for item in done} == {0}


@pytest.mark.parametrize("resume", [None, "journal"])
def test_a_service_that_goes_down_in_the_middle(services, gateway, monkeypatch, resume):
    """What it answered for is done, the rest is told, and the next run does it: nothing twice."""
    journal = {"resume": services.folder / resume} if resume else {}
    monkeypatch.setattr("keymgmt._verbs.rewrap_tree.CHUNK", 4)
    tree, front = services.folder / "tree", gateway()
    with services.config("site") as sealing:
        for number in range(12):
            services.seal(tree / f"m{number:02}.sealed", [f"site:{services.al}"], sealing)
        sealing.provider("site").rotate_key(services.al)
    asked = []

    def down(method: str, path: str, body: Any) -> bool | None:
        asked.append(path)
        # Four requests for each chunk: unwrap, look, wrap, unwrap.
        return False if len([one for one in asked if "here/" in one]) > 6 else None

    front.before = down
    through = {"address": front.address, "ca_file": None, "timeout": 2.0}
    with services.config("site", site=through) as config:
        first = rewrap(tree, config, **journal)
    assert [item.changed for item in first] == [True] * 4 + [False] * 8
    assert {item.exit_code for item in first[4:]} == {6}
    assert not list(tree.rglob(".*"))
    asked.clear()
    front.before = lambda *_: None
    front.seen.clear()
    with services.config("site", site=through) as config:
        again = rewrap(tree, config, **journal)
    assert [item.changed for item in again] == [False] * 4 + [True] * 8
    assert [item.skipped for item in again] == [bool(resume)] * 4 + [False] * 8
    assert {item.exit_code for item in again} == {0}
    # In batches: less than one request a model. With a journal the four are not asked for, but the
    # key is: whether it was rotated meanwhile.
    asked = [path for _, path, _ in front.seen if path.startswith("here/")]
    assert len(asked) == (10 if resume else 11)


@pytest.mark.nightly
@pytest.mark.once
@pytest.mark.timeout(900)
def test_a_rewrap_of_a_tree_killed_at_random_points(services, bao):
    tree, file = services.folder / "tree", services.folder / "keymgmt.toml"
    file.write_text(
        f'[policy]\nrequire_signature = false\n[providers.site]\nbackend = "vault"\n'
        f'address = "{bao.address}"\nca_file = "{bao.authority.ca_file}"\nmount = "here"\n'
        f'auth = {{ method = "token", token = {{ file = "{services.folder}/token" }} }}\n'
    )
    with services.config("site") as config:
        first = services.seal(tree / "m0.sealed", [f"site:{services.al}"], config)
        for number in range(1, 48):
            shutil.copytree(first, tree / f"m{number}.sealed")
        provider: Any = config.provider("site")
        rewrap_killed(
            tree,
            file,
            lambda: provider.rotate_key(services.al),
            lambda path: (Path(path) / "keys.json").read_bytes(),
            services.folder / "journal",
            50,
        )
    assert not list(tree.rglob(".*"))


def test_a_service_that_denies_is_told(services, two_sites, bao):
    key = services.al
    rights = (
        f'path "here/keys/{key}" {{ capabilities = ["read"] }} '
        f'path "here/encrypt/{key}" {{ capabilities = ["update"] }} '
        f'path "here/decrypt/{key}" {{ capabilities = ["update"] }}'
    )
    (services.folder / "token").write_text(bao.token(rights))
    with services.config("site", "other") as config:
        done = rewrap(two_sites, config)
    assert states(done) == {("moved", "denied")}
    assert {item.exit_code for item in done} == {5}
    assert done[0].groups[1].to_json()["class"] == "AccessDenied"


def test_no_group_left_is_not_said_of_a_service_that_is_down(services, two_sites, free_port):
    """With --force as the way out, a passing fault would cost the last way in."""
    config = services.config("site", "other", other=down(free_port))
    model = two_sites / "m0.sealed"
    before = (model / "keys.json").read_bytes()
    with config, pytest.raises(keymgmt.errors.ProviderUnavailable, match="nobody knows") as caught:
        keymgmt.rewrap(model, drop=[f"vault:{services.al}"], keys=config)
    assert "--force" not in str(caught.value.hint)
    assert (model / "keys.json").read_bytes() == before


def test_a_rate_limit_is_told_as_what_it_is(services, two_sites, bao):
    """It passes; --force would not, and would cost the last way in."""
    quota = "sys/quotas/rate-limit/rotation"
    model = two_sites / "m0.sealed"
    with services.config("site", "other", other={"timeout": 1.0}) as config:
        bao.do("POST", quota, {"path": "there/", "rate": 0.001, "interval": "1h"})
        try:
            with contextlib.suppress(keymgmt.errors.KeymgmtError):
                # The one request that the quota lets through.
                keymgmt.rewrap(model, keys=config, dry_run=True)
            with pytest.raises(keymgmt.errors.ProviderUnavailable, match="nobody knows"):
                keymgmt.rewrap(model, drop=[f"vault:{services.al}"], keys=config)
            done = rewrap(two_sites, config)
        finally:
            bao.do("DELETE", quota)
    assert states(done) == {("moved", "unreachable")}
    assert "rate limit" in str(done[0].groups[1].error)


def test_models_of_another_site_alone_are_no_fault(services):
    tree = services.folder / "tree"
    with services.config("site", "other") as sealing, services.config("site") as config:
        provider: Any = sealing.provider("other")
        provider.create_key(f"{services.am}-theirs", "aes256-gcm96", {})
        services.seal(tree / "theirs.sealed", [f"other:{services.am}-theirs"], sealing)
        services.seal(tree / "ours.sealed", [f"site:{services.al}"], sealing)
        done = rewrap(tree, config)
        assert states(done) == {("foreign",), ("current",)}
        assert {item.exit_code for item in done} == {0}
        # What nobody's data key vouches for may be damaged, and is not passed over.
        services.seal(tree / "same-name.sealed", [f"other:{services.al}"], sealing)
        (odd,) = (item for item in rewrap(tree, config) if "same-name" in item.path)
        assert [group.state for group in odd.groups] == ["damaged"]
        assert odd.exit_code == 4


MEMBERS = ["site:AL", "site:prod", "site:AM", "other:AL"]
GROUP = st.lists(st.sampled_from(MEMBERS), min_size=1, max_size=2, unique=True).filter(
    # Two names of one key are one key, and then the group is no pair.
    lambda members: {"site:AL", "site:prod"} - set(members) or len(members) < 2
)
MODEL = st.fixed_dictionaries(
    {
        # Mostly what the retired version alone opens: that is what can be lost.
        "to": st.one_of(
            st.sampled_from([[["site:AL"]], [["site:prod"]], [["site:prod", "site:AM"]]]),
            st.lists(GROUP, min_size=1, max_size=3, unique_by="+".join),
        ),
        "sealed": st.sampled_from(["before", "before", "after"]),
        "rewrapped": st.sampled_from([False, False, True]),
        "place": st.sampled_from(["direct", "deep", "link", "folder link", "inside", "twice"]),
        "damage": st.sampled_from(
            [None, None, None, "cut keys", "no manifest", "foreign manifest"]
        ),
    }
)


def spell(services: Services, groups: list[list[str]]) -> list[str]:
    return [
        "+".join(member.replace("AL", services.al).replace("AM", services.am) for member in members)
        for members in groups
    ]


def put(tree: Path, path: Path, place: str, number: int) -> Iterator[Path]:
    """Move a sealed model to where a tree has such things."""
    name = f"m{number}.sealed"
    if place in ("link", "folder link"):
        store = tree.parent / f"store{number}"
        store.mkdir()
        path.rename(store / name)
        (tree / f"link{number}").symlink_to(store / name if place == "link" else store)
        yield store / name
        return
    folder = {"deep": tree / "a" / f"b{number}", "inside": tree / "outer.sealed"}.get(place, tree)
    folder.mkdir(parents=True, exist_ok=True)
    if place == "twice":
        shutil.copytree(path, folder / f"copy{number}.sealed")
        yield folder / f"copy{number}.sealed"
    path.rename(folder / name)
    yield folder / name


def damage(path: Path, how: str | None) -> None:
    if how == "cut keys":
        content = (path / "keys.json").read_bytes()
        (path / "keys.json").write_bytes(content[: len(content) // 2])
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    elif how == "foreign manifest":
        (path / "manifest.json").write_text('{"name": "app"}')


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(models=st.lists(MODEL, min_size=1, max_size=4), alias=st.booleans(), loop=st.booleans())
def test_nothing_is_lost_that_was_not_listed(bao, tmp_path_factory, models, alias, loop):
    """A retired version leaves no model that opened before and does not after, unless listed."""
    services = Services(bao, tmp_path_factory.mktemp("retire"))
    tree = services.folder / "tree"
    tree.mkdir()
    if loop:
        (tree / "loop").symlink_to(tree)
    everything = services.config("site", "other", alias=True)
    provider: Any = everything.provider("site")
    made: list[Path] = []

    def make(moment: str) -> None:
        for number, model in enumerate(models):
            if model["sealed"] != moment:
                continue
            path = services.folder / "new.sealed"
            services.seal(path, spell(services, model["to"]), everything)
            for each in put(tree, path, model["place"], number):
                made.append(each)
                if model["rewrapped"] and moment == "before":
                    rewrap.append(each)
                harm.append((each, model["damage"]))

    rewrap: list[Path] = []
    harm: list[tuple[Path, str | None]] = []
    with everything, services.config("site", alias=alias) as retiring:
        make("before")
        provider.rotate_key(services.al)
        make("after")
        for path in rewrap:
            keymgmt.rewrap(path, keys=everything)
        for path, how in harm:
            damage(path, how)
        before = {path for path in made if opens(path, everything)}
        need = keymgmt.needs(f"site:{services.al}@1", tree, keys=retiring)
        provider.retire_version(services.al, "1")
        lost = {path for path in before if not opens(path, everything)}
    listed = {os.path.realpath(path) for path in need.opens}
    listed |= {os.path.realpath(failure.path) for failure in need.failures}
    assert {os.path.realpath(path) for path in lost} <= listed
    only = {os.path.realpath(path) for path in need.only_way_into}
    assert only & {os.path.realpath(path) for path in before} <= set(map(os.path.realpath, lost))
    if need.verdict == "not_referenced":
        assert not lost
