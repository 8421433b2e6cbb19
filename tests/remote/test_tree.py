"""Trees of sealed models in a bucket, on a real server; and listings that are none."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import obstore
import programs
import pytest
from rounds import rewrap_killed
from s3 import SECRET, USER
from webserver import Seen, reply

import keymgmt
from keymgmt._verbs.find_models import find_models
from keymgmt.errors import ConfigError, IntegrityError, StorageDenied, StorageUnavailable

pytestmark = pytest.mark.once

SMALL = ("manifest.json", "signatures.json", "keys.json")


@pytest.fixture
def pages(monkeypatch) -> None:
    """Pages of seven objects."""
    monkeypatch.setattr("keymgmt._remote.listing._KEYS", 7)


@pytest.fixture
def tree(site, sealed, s3) -> str:
    """The location of a tree of six models, one of them inside of another, and other objects."""
    path = f"fleets/{site.root.name}"
    for name in ("a", "b/one", "b/two +", "b/two +/inner", "c.sealed", "z"):
        s3.put(sealed, f"{path}/{name}")
    for name in ("b/manifest.json.old", "readme", "z/my-manifest.json"):
        obstore.put(s3.store, f"{path}/{name}", b"{}")
    s3.put(sealed, f"{path}-of-another/m")
    return f"s3://models/{path}"


NAMES = ["a", "b/one", "b/two +", "b/two +/inner", "c.sealed", "z"]


def found(trees: Any, config: Any, **more: Any) -> list[Any]:
    return list(find_models(trees, remote=config.remote, **more))


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The addresses that were asked for."""
    from keymgmt._remote.http import Http

    urls: list[str] = []
    request = Http.request

    def counted(http: Http, method: str, url: str, **more: Any) -> Any:
        urls.append(url)
        return request(http, method, url, **more)

    monkeypatch.setattr(Http, "request", counted)
    return urls


def test_every_model_is_found_once(pages, tree, s3, config, access, asked):
    keys = config(access=access(s3.address))
    wanted = [f"{tree}/{name}" for name in NAMES]
    assert sorted(found(tree, keys)) == wanted
    assert len(asked) > 4
    assert sorted(found([f"{tree}/b", tree, f"{tree}/"], keys)) == wanted
    assert found(f"{tree}/a", keys) == [f"{tree}/a"]


def test_models_come_before_the_listing_ends(pages, tree, s3, config, access):
    models = find_models(tree, remote=config(access=access(s3.address)).remote)
    assert isinstance(next(models), str)
    s3.put(Path(__file__).parent.parent / "shared", f"{tree.removeprefix('s3://models/')}/zz")
    assert len(list(models)) == 5


def test_shards_are_those_of_the_same_tree_in_folders(tree, s3, config, access, sealed, tmp_path):
    from keymgmt._verbs.find_models import Shard

    keys = config(access=access(s3.address))
    parts = [
        {str(item).removeprefix(f"{tree}/") for item in found(tree, keys, shard=f"{number}/3")}
        for number in (1, 2, 3)
    ]
    assert sorted(name for part in parts for name in part) == NAMES
    for number, part in enumerate(parts, 1):
        shard = Shard(number, 3)
        assert part == {n for n in NAMES if shard.has(tmp_path, tmp_path / n)}


def test_a_tree_is_rewrapped_and_counted(pages, tree, s3, config, access):
    keys = config(access=access(s3.address))
    path = tree.removeprefix("s3://models/")
    before = s3.read(f"{path}/z/keys.json")
    tried = list(keymgmt.rewrap_tree(tree, add=["local:b"], keys=keys, dry_run=True))
    assert [item.changed for item in tried if isinstance(item, keymgmt.Rewrapped)] == [True] * 6
    assert s3.read(f"{path}/z/keys.json") == before
    done = list(keymgmt.rewrap_tree(tree, add=["local:b"], keys=keys))
    assert sorted(item.path for item in done) == [f"{tree}/{name}" for name in NAMES]
    assert all(isinstance(item, keymgmt.Rewrapped) and item.changed for item in done)
    again = list(keymgmt.rewrap_tree(tree, add=["local:b"], keys=keys))
    assert not any(item.changed for item in again if isinstance(item, keymgmt.Rewrapped))
    usage = keymgmt.usage(tree, keys=keys)
    assert (usage.models, usage.failures) == (6, ())
    assert {(use.key, use.opens) for use in usage.keys} == {("a", 6), ("b", 6)}
    need = keymgmt.needs("local:b@1", tree, keys=keys)
    assert (need.verdict, len(need.opens), need.only_way_into) == ("needed", 6, ())
    verified = list(keymgmt.verify_tree(tree, keys=keys))
    assert [getattr(item, "state", item) for item in verified] == ["verified"] * 6
    # Another tree, of which the name begins alike.
    assert len(keymgmt.inspect(f"{tree}-of-another/m", keys=keys).groups) == 1


def test_the_requests_of_a_rewrap(site, tree, s3, config, access, asked):
    """Three files are read of a model; a changed one is written, and read back."""
    site.provider.rotate_key("a")
    keys = config(access=access(s3.address))
    for requests in (5, 3):
        asked.clear()
        assert len(list(keymgmt.rewrap_tree(tree, keys=keys))) == 6
        assert len(asked) == 1 + 6 * requests


def test_a_rewrap_goes_on_where_it_was(tree, s3, config, access, asked, tmp_path):
    """Of a finished model nothing is requested but its name and ETag, in the listing."""
    keys = config(access=access(s3.address))

    def run() -> dict[str, bool]:
        done = keymgmt.rewrap_tree(tree, add=["local:b"], keys=keys, resume=tmp_path / "journal")
        asked.clear()
        names = {}
        for item in done:
            assert isinstance(item, keymgmt.Rewrapped), item
            names[item.path.removeprefix(f"{tree}/")] = item.skipped
        return names

    assert run() == dict.fromkeys(NAMES, False)
    assert run() == dict.fromkeys(NAMES, True)
    assert len(asked) == 1
    keymgmt.rewrap(f"{tree}/z", add=["local:c"], keys=keys)
    assert run() == dict.fromkeys(NAMES, True) | {"z": False}
    assert len(asked) > 1
    assert run() == dict.fromkeys(NAMES, True)


def test_the_etags_of_a_listing_are_those_of_the_objects(pages, tree, s3, config, access):
    """Also of a model whose two files are on two pages; where they are further apart, of none."""
    from keymgmt._trust.candidate import Candidate

    keys = config(access=access(s3.address))
    path = tree.removeprefix("s3://models/")
    for number in range(20):
        obstore.put(s3.store, f"{path}/z/l{number}", b"")
    etags: dict[str, str] = {}
    for model in find_models(tree, remote=keys.remote, etags=etags):
        with Candidate.read(model, keys.remote) as candidate:
            candidate.policy()
            assert etags.pop(model, "") == (
                "" if model.endswith("/z") else candidate.folder.stamp("keys.json")
            )
    assert not etags


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_rewrap_of_a_tree_killed_at_random_points(site, sealed, s3, s3_config):
    path = f"killed/{site.root.name}"
    for number in range(24):
        s3.put(sealed, f"{path}/m{number}")
    rewrap_killed(
        f"s3://models/{path}",
        s3_config,
        lambda: site.provider.rotate_key("a"),
        lambda model: s3.read(f"{model.removeprefix('s3://models/')}/keys.json"),
        site.root / "journal",
        30,
    )


def test_two_rotations_at_once(site, tree, s3, config, access):
    """Whoever comes second to a model is refused there, looks again, and finds it done."""
    site.provider.rotate_key("a")
    keys = config(access=access(s3.address))
    begin = threading.Barrier(2)

    def rotate(_: int) -> list[keymgmt.Rewrapped | keymgmt.Failure]:
        begin.wait()
        return list(keymgmt.rewrap_tree(tree, keys=keys))

    with ThreadPoolExecutor(2) as pool:
        done = [item for run in pool.map(rotate, range(2)) for item in run]
    assert {type(item) for item in done} == {keymgmt.Rewrapped}, done
    changed = [item.path for item in done if isinstance(item, keymgmt.Rewrapped) and item.changed]
    assert sorted(changed) == [f"{tree}/{name}" for name in NAMES]
    usage = keymgmt.usage(tree, keys=keys)
    assert [(use.version, use.opens) for use in usage.keys] == [("2", 6)]
    assert {type(item) for item in keymgmt.verify_tree(tree, keys=keys)} == {keymgmt.Done}


@pytest.mark.parametrize("times", [1, 2])
def test_a_second_rewrap_at_the_same_time_is_refused(
    pages, tree, s3, config, access, monkeypatch, times
):
    """Another run replaces the groups of one model between our last look and our writing."""
    from keymgmt._remote.folder import RemoteFolder

    keys = config(access=access(s3.address))
    replace = RemoteFolder._replace
    met: list[str] = []

    def late(folder: Any, name: str, content: bytes) -> None:
        if folder.path == f"{tree}/c.sealed" and len(met) < times:
            met.append(folder.path)
            other: dict[str, Any] = {"add": ["local:c"]} if len(met) == 1 else {"drop": ["file:c"]}
            monkeypatch.setattr(RemoteFolder, "_replace", replace)
            keymgmt.rewrap(folder.path, keys=keys, **other)
            monkeypatch.setattr(RemoteFolder, "_replace", late)
        replace(folder, name, content)

    monkeypatch.setattr(RemoteFolder, "_replace", late)
    done = list(keymgmt.rewrap_tree(tree, add=["local:b"], keys=keys))
    assert len(done) == 6
    failed = [item for item in done if isinstance(item, keymgmt.Failure)]
    groups = keymgmt.inspect(f"{tree}/c.sealed", keys=keys).groups
    names = [name for group in groups for name in group]
    if times == 1:
        # It was done again, and nobody's group is lost.
        assert not failed
        assert sorted(names) == ["file:a@1", "file:b@1", "file:c@1"]
        return
    assert [(item.path, type(item.error)) for item in failed] == [
        (f"{tree}/c.sealed", IntegrityError)
    ]
    assert "replaced by somebody else" in str(failed[0].error)
    assert names == ["file:a@1"]


def test_a_wrong_login_is_not_an_empty_tree(tree, s3, config, access):
    [failure] = found(tree, config(access=access(s3.address, secret="another")))
    assert (failure.path, type(failure.error)) == (tree, StorageDenied)
    assert "403" in str(failure.error)
    assert "Signature=" not in str(failure.error)


def test_nothing_below(s3, config, access):
    [failure] = found("s3://models/nothing", config(access=access(s3.address)))
    assert "there is no sealed model at or below" in str(failure.error)


def page(*names: str, then: str = "", more: str = "", extra: str = "") -> bytes:
    listed = "".join(f"<Contents><Key>{name}</Key></Contents>" for name in names)
    token = f"<NextContinuationToken>{then}</NextContinuationToken>" if then else ""
    more = more or ("true" if then else "false")
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"{extra}<IsTruncated>{more}</IsTruncated>{listed}{token}</ListBucketResult>"
    ).encode()


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (page("t/b/manifest.json")[:-30], "no XML, or not all of it"),
        (b"", "no XML"),
        (b"\xff\xfe<", "no XML"),
        (b"<html/>", "no ListBucketResult"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]>' + page(), "document type"),
        (page(more="perhaps"), "whether it is the last"),
        (page(more="true"), "whether it is the last"),
        (page(then="one"), "again and again"),
        (page("t/b/manifest.json", extra="<KeyCount>2</KeyCount>"), "another number of names"),
        (page("other/manifest.json"), "not asked for"),
        (page("t/b/manifest.json", extra="<A>" + "x" * (16 << 20) + "</A>"), "longer than"),
    ],
)
def test_a_page_that_is_none(second, says, serve, config, access, quick):
    """What was found before is given, and then the error: it is not the end of the tree."""

    def answer(request: Seen, handler: Any) -> None:
        asked = parse_qs(urlsplit(request.path).query)
        first = "continuation-token" not in asked
        assert asked["prefix"] == ["t/"]
        reply(handler, 200, page("t/a/manifest.json", then="one") if first else second)

    web = serve(answer)
    good, failure = found("s3://models/t", config(access=access(web.url)))
    assert (good, failure.path) == ("s3://models/t/a", "s3://models/t")
    assert isinstance(failure.error, StorageUnavailable)
    assert says in str(failure.error)


@pytest.mark.parametrize(
    "name", ["t/../manifest.json", "t//manifest.json", "t/a?b/manifest.json", "t/é/manifest.json"]
)
def test_a_name_that_is_no_location(name, serve, config, access):
    web = serve(lambda _, handler: reply(handler, 200, page(name, "t/b/manifest.json")))
    failure, good = found("s3://models/t", config(access=access(web.url)))
    assert "is no location of a model" in str(failure.error)
    assert good == "s3://models/t/b"


def test_a_listing_that_breaks_off(serve, config, access, quick):
    def broken(_: Seen, handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(page("t/a/manifest.json"))
        handler.close_connection = True

    [failure] = found("s3://models/t", config(access=access(serve(broken).url)))
    assert "cut its answer short" in str(failure.error)


@pytest.mark.parametrize("origin", ["gs://models", "az://models"])
def test_other_buckets_are_not_listed(origin, config):
    [failure] = found(f"{origin}/t", config())
    assert isinstance(failure.error, ConfigError)
    assert "not in " + origin[:5] in str(failure.error)
    [failure] = list(find_models(f"{origin}/t"))
    assert "not a folder of this machine" in str(failure.error)


def test_a_bucket_of_amazon_is_asked_by_its_own_host(config, access):
    """Not run against Amazon; where the request goes is looked at."""
    from keymgmt._remote.bucket import bucket_query
    from keymgmt._remote.location import Location

    keys = config(access=access(None))
    query = {"list-type": "2", "prefix": "a b/"}
    _, url = bucket_query(Location.parse("s3://models/t"), keys.remote, query)
    assert url.startswith(
        "https://models.s3.us-east-1.amazonaws.com/?list-type=2&prefix=a%20b%2F&x-keymgmt=/&X-Amz-"
    )


def test_the_environment_signs_listings(tree, s3, config, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.address)
    keys = config(access={"s3://models": {"auth": "environment"}})
    assert sorted(found(tree, keys)) == [f"{tree}/{name}" for name in NAMES]


def test_the_command_line(tree, s3_config):
    def run(*arguments: str, code: int = 0) -> list[Any]:
        done = programs.run_keymgmt("-c", s3_config, *arguments, "--json")
        assert done.returncode == code, done.stderr
        if arguments[0] == "keys":
            return [json.loads(done.stdout)]
        return [json.loads(line) for line in done.stdout.splitlines()]

    parts = [
        run("rewrap", tree, "--add", "local:b", "--shard", f"{part}/2")[-1]["changed"]
        for part in (1, 2)
    ]
    assert sum(parts) == 6
    assert run("rewrap", tree, "--dry-run")[-1]["models"] == 6
    assert run("verify", tree)[-1]["states"] == {"verified": 6}
    assert run("keys", "usage", tree)[0]["models"] == 6
    refused = run("keys", "retire", "local:a@1", "--tree", tree, code=3)[0]
    assert (refused["verdict"], len(refused["opens"])) == ("needed", 6)
