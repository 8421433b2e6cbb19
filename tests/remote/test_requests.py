"""The requests and connections of a command, counted at the server; and how long it waits."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from s3 import USER
from waiting import until
from webserver import Answer, Seen, Web, etag_of, files_of, reply

import keymgmt
from keymgmt._remote.folder import RemoteFolder
from keymgmt._remote.patience import MIB, Patience
from keymgmt._remote.storage import Part, Storage
from keymgmt.cli._output import is_tree
from keymgmt.errors import IntegrityError, SealedModelError, StorageUnavailable
from keymgmt.testing._process import in_fork

pytestmark = pytest.mark.once
SMALL = ("manifest.json", "signatures.json", "keys.json")
Config = Callable[..., Any]


def bucket_of(root: Path, connections: set[Any] | None = None) -> Answer:
    """A server that speaks S3 as far as it is read here; ``root`` is the bucket ``models``."""
    files = files_of(root.parent)

    def answer(request: Seen, handler: Any) -> None:
        if connections is not None:
            connections.add(handler.connection)
        query = parse_qs(urlsplit(request.path).query)
        if request.method == "PUT":
            file = root.parent / request.path.partition("?")[0].lstrip("/")
            assert request.headers["if-match"] == etag_of(file.read_bytes())
            file.write_bytes(request.body)
            reply(handler, 200, ETag=etag_of(request.body))
            return
        if "list-type" not in query:
            files(request, handler)
            return
        found = [str(file.relative_to(root)) for file in sorted(root.rglob("manifest.json"))]
        keys = "".join(
            f"<Contents><Key>{name}</Key></Contents>"
            for name in found
            if name.startswith(query["prefix"][0])
        )
        page = f"<ListBucketResult><IsTruncated>false</IsTruncated>{keys}</ListBucketResult>"
        reply(handler, 200, page.encode())

    return answer


@pytest.fixture
def bucket(site) -> Path:
    """The folder of a bucket with a tree of six models."""
    (site.root / "models/tree").mkdir(parents=True)
    for number in range(6):
        site.seal(target=f"models/tree/{number}")
    return Path(site.root / "models")


def names(web: Web) -> list[str]:
    return [seen.path.partition("?")[0].removeprefix("/models/") for seen in web.seen]


def test_the_models_of_a_tree_share_their_connections(bucket, serve, config, access, monkeypatch):
    """One TLS context and one store that signs for all of them; and all is closed at the end."""
    store = pytest.importorskip("obstore.store")
    connections: set[Any] = set()
    web = serve(bucket_of(bucket, connections), tls=True)
    made: list[object] = []
    for module, name in ((ssl, "create_default_context"), (store, "S3Store")):
        make = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, make=make, **n: made.append(make) or make(*a, **n)
        )
    with config(access=access(web.url)) as keys:
        states = [item.state for item in keymgmt.verify_tree("s3://models/tree", keys=keys)]
        assert states == ["verified"] * 6
        # Two stores: for the files, and for the one page of the listing.
        assert len(made) == 3
        # As many as there are requests at once, and not as many as there are models.
        assert len(connections) <= 8
    until(lambda: all(each.fileno() == -1 for each in connections))


def test_models_of_a_web_server_share_their_connections(bucket, serve, config):
    connections: set[Any] = set()
    web = serve(bucket_of(bucket, connections), tls=True)
    with config() as keys:
        for number in range(6):
            assert keymgmt.inspect(f"{web.url}/models/tree/{number}", keys=keys).groups
    assert len(connections) <= len(SMALL)
    until(lambda: all(each.fileno() == -1 for each in connections))


def test_a_child_has_connections_of_its_own(bucket, site, serve, config):
    connections: set[Any] = set()
    web = serve(bucket_of(bucket, connections), tls=True)
    with config() as keys, keymgmt.open(f"{web.url}/models/tree/1", keys=keys) as model:
        ours = set(connections)
        connections.clear()
        plain = len((site.plain / "model.bin").read_bytes())
        assert in_fork(lambda: str(len(model.read("model.bin"))), 60) == str(plain)
        where = f"{web.url}/models/tree/3"
        assert in_fork(lambda: keymgmt.inspect(where, keys=keys).path, 60) == where
        assert not connections & ours
        assert model.read("model.xml")
        assert connections & ours  # whose connections are as good as before


def test_the_small_files_are_requested_beside_one_another(bucket, serve, config):
    asked: set[str] = set()
    all_of_them = threading.Event()
    files = bucket_of(bucket)

    def answer(request: Seen, handler: Any) -> None:
        asked.add(request.path.rpartition("/")[2])
        if asked.issuperset(SMALL):
            all_of_them.set()
        assert all_of_them.wait(60)
        files(request, handler)

    web = serve(answer)
    assert keymgmt.inspect(f"{web.url}/models/tree/1", keys=config(timeout=60, deadline=60))
    assert sorted(names(web)) == sorted(f"tree/1/{name}" for name in SMALL)


def test_whether_it_is_a_tree_costs_no_request(bucket, serve, config, access):
    web = serve(bucket_of(bucket))
    keys = config(access=access(web.url))
    assert not is_tree("s3://models/tree/1", lambda: keys)
    assert keymgmt.inspect("s3://models/tree/1", keys=keys).groups
    assert sorted(names(web)) == sorted(f"tree/1/{name}" for name in SMALL)
    web.seen.clear()
    # What was read for that is used once: the next command sees the model as it is by then.
    (bucket / "tree/1/manifest.json").write_bytes(b"{}")
    with pytest.raises(SealedModelError):
        keymgmt.inspect("s3://models/tree/1", keys=keys)
    assert is_tree("s3://models/tree", lambda: keys)
    # The other files of the model that was refused may still be asked for.
    assert [name for name in names(web) if "/1/" not in name] == ["tree/manifest.json"]


def test_the_command_line_requests_each_small_file_once(bucket, serve, site, access):
    web = serve(bucket_of(bucket))
    secret = access(web.url)["s3://models"]["secret"]["file"]
    file = site.root / "keymgmt.toml"
    file.write_text(
        '[providers.local]\nbackend = "file"\npath = "keys"\n'
        '[policy]\npublishers = { "pub.pem" = ["*"] }\n'
        f'[remote.access."s3://models"]\nuser = "{USER}"\nendpoint = "{web.url}"\n'
        f'secret = {{ file = "{secret}" }}\n'
    )
    command = [sys.executable, "-P", "-m", "keymgmt", "-c", str(file), "rewrap", "--dry-run"]
    done = subprocess.run(
        [*command, "s3://models/tree/1", "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == "s3://models/tree/1"
    assert sorted(names(web)) == sorted(f"tree/1/{name}" for name in SMALL)


def test_a_rewrap_makes_five_requests(bucket, serve, config, access):
    web = serve(bucket_of(bucket))
    keys = config(access=access(web.url))
    assert keymgmt.rewrap("s3://models/tree/1", add=["local:b"], keys=keys).changed
    # The last one reads back what was written.
    assert [seen.method for seen in web.seen] == ["GET"] * 3 + ["PUT", "GET"]
    assert len(keymgmt.inspect("s3://models/tree/1", keys=keys).groups) == 2


class Large(Storage):
    """A storage with one file, whose pin is another one after its first part."""

    def __init__(self, content: bytes, *, changes: bool = False) -> None:
        self.content, self.changes, self.asked = content, changes, 0

    def part(self, name: str, start: int, end: int, pin: str = "") -> Part | None:
        self.asked += 1
        now = '"2"' if self.changes and start else '"1"'
        return Part(memoryview(self.content)[start:end], len(self.content), now)


def test_a_small_file_that_is_large_is_read_in_two_requests():
    content = bytes(range(256)) * (10 << 10)
    storage = Large(content)
    assert RemoteFolder("m", storage).read("keys.json", 64 << 20) == content
    assert storage.asked == 2
    with pytest.raises(IntegrityError, match="changed while it was read"):
        RemoteFolder("m", Large(content, changes=True)).read("keys.json", 64 << 20)
    storage.asked = 0
    with pytest.raises(SealedModelError, match="is larger than"):
        RemoteFolder("m", storage).read("keys.json", 1 << 20)
    assert storage.asked == 1


def test_a_server_that_is_slow_with_every_part_is_given_up(site, serve, config):
    """Each part alone comes in time, and all of them together do not."""
    files = 60
    for number in range(files):
        (site.plain / f"{number}.bin").write_bytes(bytes(100))
    site.seal()
    give = files_of(site.root)

    def answer(request: Seen, handler: Any) -> None:
        time.sleep(0.1)
        give(request, handler)

    web = serve(answer)
    late = pytest.raises(StorageUnavailable, match=r"m\.sealed did not give .* within 2 seconds")
    with late, keymgmt.open(f"{web.url}/m.sealed", keys=config(deadline=2)) as model:
        for number in range(files):
            model.read(f"{number}.bin")
    assert len(web.seen) < files


def test_a_server_that_drips_every_part_is_given_up(site, sealed, serve, config, quick):
    def answer(request: Seen, handler: Any) -> None:
        length = str(1 << 16)
        said = {"Content-Length": length, "Content-Range": f"bytes 0-{(1 << 16) - 1}/{1 << 20}"}
        reply(handler, 206, b"", **said)
        for _ in range(400):
            handler.wfile.write(b"x")
            time.sleep(0.05)

    web = serve(answer)
    with pytest.raises(StorageUnavailable, match="within 3 seconds"):
        keymgmt.open(f"{web.url}/m.sealed", keys=config(deadline=3))
    # A try has its share of the time, so that the others have theirs.
    assert len([seen for seen in web.seen if seen.path.endswith("manifest.json")]) > 1


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    fake = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("keymgmt._remote.patience.time", fake)
    monkeypatch.setattr("keymgmt._system.deadline.time", fake)
    return now


def test_time_counts_while_something_is_under_way(clock):
    patience = Patience(60, "m")
    clock[0] += 1000  # nobody asked for anything
    with patience.waiting():
        clock[0] += 50
        with patience.waiting():
            assert patience.remaining == 10
        clock[0] += 5
    clock[0] += 1000
    with patience.waiting():
        assert patience.remaining == 5
        patience.moved(2 * MIB)
        assert patience.remaining == 13
        patience.moved(1000 * MIB)
        assert patience.remaining == 60  # not more than at the start
        assert patience.share(6) == 10
        clock[0] += 61
        with pytest.raises(StorageUnavailable, match="m did not give what was asked for within 60"):
            patience.share(1)


def test_nobody_waits_after_the_end(clock):
    patience = Patience(60, "m")
    patience.moved(10)
    patience.end()
    patience.moved(10)
    with patience.waiting(), pytest.raises(StorageUnavailable):
        patience.check()
