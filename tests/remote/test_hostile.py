"""Registries that do what they should not, and processes that are killed: nothing half is left."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from bits import flipped
from loopback import Authority
from waiting import until
from webserver import Seen, Web, reply

import keymgmt
from keymgmt._remote.artifact import MEDIA_TYPE, Artifact, Blob, blob_of
from keymgmt._remote.location import Location
from keymgmt._remote.registry import Registry
from keymgmt._verbs.find_models import find_models
from keymgmt.errors import (
    ConfigError,
    FormatError,
    IntegrityError,
    KeymgmtError,
    SealedModelError,
    StorageDenied,
    StorageUnavailable,
)
from keymgmt.sealed.manifest import Manifest
from keymgmt.testing._process import in_fork

pytest.importorskip("keymgmt_file")
pytestmark = pytest.mark.once


def files_of(sealed: Path) -> dict[str, bytes]:
    found = [Path(parent, name) for parent, _, names in os.walk(sealed) for name in names]
    return {str(file.relative_to(sealed)): file.read_bytes() for file in found}


@dataclass
class Fake:
    """A registry that a test can bend: blobs by digest, one tag, and what is done to a request.

    Attributes:
        bend: is asked before it answers; true where it has answered itself.
    """

    site: Any
    files: dict[str, bytes]
    web: Web = field(init=False)
    manifest: bytes = b""
    blobs: dict[str, bytes] = field(default_factory=dict)
    bend: Callable[[Seen, Any], object] = lambda _, __: False
    ca_file: Path = Path()

    def __post_init__(self) -> None:
        described = {name: blob_of(content) for name, content in self.files.items()}
        self.blobs = {described[name].digest: content for name, content in self.files.items()}
        made = Artifact.make(Manifest.from_bytes(self.files["manifest.json"]), described)
        self.manifest = made.data

    def answer(self, request: Seen, handler: Any) -> None:
        if self.bend(request, handler):
            return
        kind, _, name = request.path.rpartition("/")
        if kind.endswith("/manifests"):
            reply(handler, 200, self.manifest, Content_Type=MEDIA_TYPE)
        elif name in self.blobs:
            send(handler, request, self.blobs[name])
        else:
            reply(handler, 404)

    def describe(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the manifest."""
        described = json.loads(self.manifest)
        change(described)
        self.manifest = json.dumps(described).encode()

    def layer(self, described: dict[str, Any], name: str) -> dict[str, Any]:
        """The layer of a file in a manifest."""
        title = "org.opencontainers.image.title"
        return next(one for one in described["layers"] if one["annotations"][title] == name)

    def digest(self, name: str) -> str:
        return blob_of(self.files[name]).digest

    @property
    def place(self) -> str:
        return f"oci://{urlsplit(self.web.url).netloc}/models/resnet50:1"

    @property
    def target(self) -> Path:
        return Path(self.site.root / "pulled")

    def write_config(self, **remote: Any) -> Path:
        """A config file, for this process and for others."""
        lines = [
            f'[providers.local]\nbackend = "file"\npath = "{self.site.root / "keys"}"',
            '[policy]\npublishers = { "pub.pem" = ["*"] }',
            f'[remote]\nca_file = "{self.ca_file}"',
            *(f"{name} = {value}" for name, value in remote.items()),
        ]
        file = Path(self.site.root / "remote.toml")
        file.write_text("\n".join(lines) + "\n")
        file.chmod(0o600)
        return file

    def pull(self, **options: Any) -> keymgmt.Pulled:
        return keymgmt.pull(self.place, self.target, keys=self.write_config(), **options)

    def refused(self, *kinds: type[KeymgmtError], match: str | None = None) -> KeymgmtError:
        """A pull that fails, and makes nothing."""
        before = files_of(self.target) if self.target.exists() else None
        with pytest.raises(kinds, match=match) as refused:
            self.pull()
        assert (files_of(self.target) if self.target.exists() else None) == before
        return refused.value

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """The command line in a process of its own."""
        command = [sys.executable, "-P", "-m", "keymgmt", "-c", self.write_config(), *arguments]
        return subprocess.Popen(
            list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )


def send(handler: Any, request: Seen, content: bytes) -> None:
    """A blob, or the rest of it."""
    ranged = re.fullmatch(r"bytes=(\d+)-\d*", request.headers.get("range", ""))
    if not ranged:
        reply(handler, 200, content)
        return
    start = int(ranged[1])
    said = f"bytes {start}-{len(content) - 1}/{len(content)}"
    reply(handler, 206, content[start:], Content_Range=said)


@pytest.fixture
def fake(site, serve, authority) -> Fake:
    made = Fake(site, files_of(site.seal()))
    made.ca_file = authority.ca_file
    made.web = serve(made.answer, tls=True)
    return made


def test_it_is_a_registry_if_nothing_is_bent(fake):
    assert fake.pull().state == "new"
    assert {k: v for k, v in files_of(fake.target).items() if k[0] != "."} == fake.files


@pytest.mark.parametrize("name", ["manifest.json", "keys.json", "payload/model.bin.floe"])
def test_another_blob_is_refused(fake, name):
    content = fake.files[name]
    fake.blobs[fake.digest(name)] = content[:-1] + bytes([content[-1] ^ 1])
    fake.refused(IntegrityError, match="than its digest says")
    # What was wrong is not taken up again.
    fake.blobs[fake.digest(name)] = content
    assert fake.pull().state == "new"


@pytest.mark.parametrize("name", ["keys.json", "payload/model.bin.floe"])
def test_a_blob_that_is_missing_is_said(fake, name):
    del fake.blobs[fake.digest(name)]
    assert "push the model again" in str(fake.refused(IntegrityError, match="is not whole").hint)


def test_another_manifest_than_the_digest_is_refused(fake):
    place = fake.place.rpartition(":")[0] + "@sha256:" + "a" * 64
    with pytest.raises(IntegrityError, match="another manifest"):
        keymgmt.pull(place, fake.target, keys=fake.write_config())


def test_a_digest_that_is_not_that_of_the_answer_is_refused(fake):
    def lie(request: Seen, handler: Any) -> bool:
        if "/manifests/" not in request.path:
            return False
        reply(handler, 200, fake.manifest, Docker_Content_Digest="sha256:" + "a" * 64)
        return True

    fake.bend = lie
    fake.refused(IntegrityError, match="another manifest")


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"not json",
        b"[]",
        b'{"schemaVersion": 2}',
        b'{"layers": 3}',
        b'{"layers": [3]}',
        b'{"layers": [{}]}',
        b'{"layers": [{"digest": "sha256:abc", "size": 1}]}',
        b'{"layers": [{"digest": "../../../etc/passwd", "size": 1}]}',
        b'{"mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}',
        b'{"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "layers": []}',
        b'{"layers": ' + b"[" * 100_000,
        b"{" + b" " * (5 << 20) + b"}",
    ],
)
def test_what_is_no_sealed_model_is_refused(fake, manifest):
    fake.manifest = manifest
    fake.refused(FormatError, StorageUnavailable)


def test_an_image_of_a_container_is_refused(fake):
    fake.describe(lambda said: [layer.pop("annotations") for layer in said["layers"]])
    fake.refused(FormatError, match="no title")


@pytest.mark.parametrize("change", ["twice", "shorter", "missing", "huge"])
def test_layers_that_are_not_those_of_the_model_are_refused(fake, change):
    name = "payload/model.bin.floe"

    def bend(said: dict[str, Any]) -> None:
        layer = fake.layer(said, name)
        if change == "twice":
            said["layers"].append(dict(layer))
        elif change == "missing":
            said["layers"].remove(layer)
        else:
            layer["size"] = 7 if change == "shorter" else 1 << 52

    fake.describe(bend)
    fake.refused(FormatError)
    assert not [one for one in fake.web.seen if fake.digest(name) in one.path]


def test_names_lead_nowhere(fake, tmp_path):
    """Titles that leave the folder, or lie beside the model's own, are not written anywhere."""
    evil = b"evil"
    fake.blobs[blob_of(evil).digest] = evil

    def bend(said: dict[str, Any]) -> None:
        for name in ("../../evil", "/etc/evil", "payload/../../evil", "payload/evil", "evil"):
            layer = {"digest": blob_of(evil).digest, "size": len(evil)}
            said["layers"].append(layer | {"annotations": {"org.opencontainers.image.title": name}})

    fake.describe(bend)
    fake.pull()
    assert {k for k in files_of(fake.target) if k[0] != "."} == fake.files.keys()
    assert not list(tmp_path.rglob("*evil*"))


def test_files_of_two_models_are_refused(fake):
    other = files_of(fake.site.seal(target="n.sealed"))
    fake.blobs[blob_of(other["keys.json"]).digest] = other["keys.json"]

    def mix(said: dict[str, Any]) -> None:
        blob = blob_of(other["keys.json"])
        fake.layer(said, "keys.json").update(digest=blob.digest, size=blob.size)

    fake.describe(mix)
    fake.refused(IntegrityError, match="another manifest")


def test_a_manifest_of_other_files_is_refused(fake):
    """A payload with the right length and the registry's digest, and not the model's."""
    name = "payload/model.bin.floe"
    other = bytes(len(fake.files[name]))
    fake.blobs[blob_of(other).digest] = other
    fake.describe(lambda said: fake.layer(said, name).update(digest=blob_of(other).digest))
    fake.pull()
    # Which the registry may do; whoever opens it notices.
    with pytest.raises(SealedModelError):
        keymgmt.verify(fake.target, keys=fake.write_config())


@pytest.mark.parametrize(
    ("status", "kind"), [(401, StorageDenied), (403, StorageDenied), (404, IntegrityError)]
)
def test_a_no_in_the_middle_leaves_nothing(fake, status, kind):
    digest = fake.digest("payload/model.xml.floe")

    def refuse(request: Seen, handler: Any) -> bool:
        if digest not in request.path:
            return False
        reply(handler, status)
        return True

    fake.bend = refuse
    fake.refused(kind)


def test_who_is_busy_is_asked_again(fake, quick):
    def busy(request: Seen, handler: Any) -> bool:
        count[0] += 1
        if count[0] % 2:
            reply(handler, 429 if count[0] % 4 == 1 else 503, Retry_After="3")
        return bool(count[0] % 2)

    count = [0]
    fake.bend = busy
    assert fake.pull().state == "new"
    assert quick
    assert set(quick) == {3.0}


def test_blobs_may_come_from_elsewhere_without_a_login(fake, serve, site):
    def elsewhere(request: Seen, handler: Any) -> bool:
        if "/blobs/" not in request.path:
            return False
        reply(handler, 307, Location=f"{store.url}{request.path}?signed=27182818")
        return True

    def give(request: Seen, handler: Any) -> None:
        send(handler, request, fake.blobs[urlsplit(request.path).path.rpartition("/")[2]])

    store = serve(give, tls=True)
    fake.bend = elsewhere
    assert fake.pull().state == "new"
    assert store.seen
    fake.bend = lambda request, handler: (
        "/blobs/" in request.path and not reply(handler, 307, Location="http://models.example/blob")
    )
    fake.site.root.joinpath("pulled").rename(fake.site.root / "away")
    fake.refused(StorageDenied, match="redirects to")


@pytest.mark.parametrize("ranges", [True, False])
def test_answers_that_are_cut_are_put_together(fake, quick, ranges):
    """Where ranges are ignored, a server that gives all of it at last is enough."""
    seen: dict[str, int] = {}

    def cut(request: Seen, handler: Any) -> bool:
        content = fake.blobs.get(request.path.rpartition("/")[2])
        if content is None or len(content) < 100_000:
            return False
        seen[request.path] = seen.get(request.path, 0) + 1
        if not ranges:
            request.headers.pop("range", None)
            if seen[request.path] == 3:
                return False
        ranged = re.match(r"bytes=(\d+)", request.headers.get("range", ""))
        start = int(ranged[1]) if ranged else 0
        said = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        handler.send_response(206 if ranged else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        if ranged:
            handler.send_header("Content-Range", said["Content_Range"])
        handler.end_headers()
        handler.wfile.write(content[start : start + 400_000])
        handler.close_connection = len(content) - start > 400_000
        return True

    fake.bend = cut
    assert fake.pull().state == "new"
    assert {k: v for k, v in files_of(fake.target).items() if k[0] != "."} == fake.files
    assert max(seen.values()) > 2


def throttled(fake: Fake, name: str, part: int = 300_000) -> list[Seen]:
    """The first to ask for a blob gets a part of it and then nothing; the requests for it."""
    asked: list[Seen] = []

    def slow(request: Seen, handler: Any) -> bool:
        if fake.digest(name) not in request.path or request.method != "GET":
            return False
        asked.append(request)
        if len(asked) > 1:
            return False
        content = fake.files[name]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:part])
        handler.wfile.flush()
        time.sleep(20)
        return True

    fake.bend = slow
    return asked


def staged(fake: Fake) -> list[Path]:
    return [path for path in fake.site.root.iterdir() if path.name.startswith(".pulled.")]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_pull_that_is_stopped_goes_on_where_it_was(fake, stop):
    name = "payload/model.bin.floe"
    asked = throttled(fake, name)
    process = fake.start("pull", fake.place, fake.target)

    def came() -> bool:
        files = [file for path in staged(fake) for file in path.rglob("model.bin.floe")]
        return bool(files) and files[0].stat().st_size == 300_000

    until(came)
    process.send_signal(stop)
    process.communicate(timeout=60)
    assert process.returncode
    assert not fake.target.exists()
    # What is half there is no model for anybody who looks below.
    assert [str(path) for path in find_models(fake.site.root)] == [str(fake.site.root / "m.sealed")]
    assert fake.pull().state == "new"
    assert asked[-1].headers["range"].startswith("bytes=300000-")
    assert {k: v for k, v in files_of(fake.target).items() if k[0] != "."} == fake.files
    assert not staged(fake)


def test_two_pulls_to_one_folder_do_not_mix(fake):
    throttled(fake, "payload/model.bin.floe")
    process = fake.start("pull", fake.place, fake.target)
    until(lambda: bool(staged(fake)) and bool(list(staged(fake)[0].rglob("model.bin.floe"))))
    fake.refused(ConfigError, match="another process is making")
    process.kill()
    process.communicate(timeout=60)
    assert fake.pull().state == "new"


def test_a_folder_that_another_user_prepared_is_refused(fake, monkeypatch):
    asked = throttled(fake, "payload/model.bin.floe")
    process = fake.start("pull", fake.place, fake.target)
    until(lambda: bool(asked))
    process.kill()
    process.communicate(timeout=60)
    (prepared,) = staged(fake)
    prepared.chmod(0o755)
    fake.refused(ConfigError, match="not private to this user")
    prepared.chmod(0o700)
    elsewhere = fake.site.root / "elsewhere"
    prepared.rename(elsewhere)
    prepared.symlink_to(elsewhere)
    fake.refused(ConfigError)


def test_a_tag_that_moves_meanwhile_changes_nothing(fake):
    first = dict(fake.files)
    other = Fake(fake.site, files_of(fake.site.seal(target="n.sealed")))
    fake.blobs |= other.blobs

    def move(done: int, total: int) -> None:
        fake.manifest = other.manifest

    pulled = fake.pull(progress=move)
    assert pulled.manifest == Manifest.from_bytes(first["manifest.json"])
    assert {k: v for k, v in files_of(fake.target).items() if k[0] != "."} == first


def test_a_certificate_of_another_is_refused(fake, serve, tmp_path):
    fake.web = serve(fake.answer, tls=True, by=Authority(tmp_path / "other"))
    fake.refused(StorageUnavailable, match="certificate")


def test_a_disk_that_is_full_is_said_before(fake, monkeypatch):
    from keymgmt._verbs import pull

    class Full:
        free = 10

    monkeypatch.setattr(pull.shutil, "disk_usage", lambda _: Full)
    assert "make room" in str(fake.refused(KeymgmtError, match="the disk has 10").hint)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_push_that_is_stopped_moves_no_tag(fake, stop, tmp_path):
    """Uploads are answered slowly: the process is killed in the middle of them."""
    stored: dict[str, bytes] = {}
    tags: list[bytes] = []
    slow, first_one = [True], threading.Lock()

    def keep(request: Seen, handler: Any) -> bool:
        path = urlsplit(request.path)
        if "/manifests/" in path.path and request.method == "PUT":
            tags.append(request.body)
            reply(handler, 201)
        elif "/manifests/" in path.path:
            reply(handler, 200, tags[-1]) if tags else reply(handler, 404)
        elif request.method == "POST":
            reply(handler, 202, Location=f"/v2/upload/{len(fake.web.seen)}?state=x")
        elif request.method == "PUT":
            if slow[0] and not first_one.acquire(blocking=False):
                time.sleep(20)
                return True
            stored[path.query.split("digest=")[1].replace("%3A", ":")] = request.body
            reply(handler, 201)
        else:
            reply(handler, 200 if path.path.rpartition("/")[2] in stored else 404)
        return True

    fake.bend = keep
    sealed = fake.site.root / "m.sealed"
    process = fake.start("push", sealed, fake.place)
    until(lambda: bool(stored))
    process.send_signal(stop)
    process.communicate(timeout=60)
    assert process.returncode
    assert not tags
    slow[0] = False
    first = dict(stored)
    pushed = keymgmt.push(sealed, fake.place, keys=fake.write_config())
    assert pushed.moved
    assert pushed.sent == sum(map(len, fake.files.values())) - sum(map(len, first.values()))
    assert {fake.digest(name) for name in fake.files} < stored.keys()
    assert blob_of(tags[-1]) == Blob(pushed.digest, len(tags[-1]))


def test_an_upload_that_breaks_is_made_again(fake, quick):
    """A registry that ends connections in the middle, and one that takes no login elsewhere."""
    stored: dict[str, bytes] = {}
    broken: list[str] = []

    def keep(request: Seen, handler: Any) -> bool:
        path = urlsplit(request.path)
        digest = path.query.partition("digest=")[2].replace("%3A", ":")
        if "/manifests/" in path.path:
            reply(handler, 201 if request.method == "PUT" else 404)
        elif request.method == "POST":
            reply(handler, 202, Location=f"{fake.web.url}/v2/upload")
        elif request.method == "PUT" and digest not in broken:
            broken.append(digest)
            handler.close_connection = True
        elif request.method == "PUT":
            stored[digest] = request.body
            reply(handler, 201)
        else:
            reply(handler, 404)
        return True

    fake.bend = keep
    told: list[tuple[int, int]] = []
    keymgmt.push(
        fake.site.root / "m.sealed",
        fake.place,
        keys=fake.write_config(),
        progress=lambda done, total: told.append((done, total)),
    )
    assert {blob_of(content).digest for content in stored.values()} == stored.keys()
    assert {fake.digest(name) for name in fake.files} < stored.keys()
    assert told[-1][0] == told[-1][1]
    assert all(done <= total for done, total in told)


def test_a_payload_that_is_damaged_is_not_pushed(fake):
    """Its length is right, and a registry would take any bytes that have the digest of the blob."""
    file = fake.site.root / "m.sealed/payload/model.bin.floe"
    file.write_bytes(flipped(file.read_bytes()))
    fake.bend = lambda _, handler: reply(handler, 404) or True
    with pytest.raises(IntegrityError, match=r"model\.bin\.floe does not have the digest"):
        keymgmt.push(fake.site.root / "m.sealed", fake.place, keys=fake.write_config())
    assert {seen.method for seen in fake.web.seen} <= {"GET"}


def test_a_payload_that_changes_during_a_push_is_not_stored(fake):
    """A registry that takes every body that is whole, whatever its digest is."""
    file = fake.site.root / "m.sealed/payload/model.bin.floe"
    whole = file.read_bytes()
    stored: list[bytes] = []

    def keep(request: Seen, handler: Any) -> bool:
        if request.method == "HEAD" and fake.digest("payload/model.bin.floe") in request.path:
            file.write_bytes(flipped(whole))
        if request.method == "POST":
            reply(handler, 202, Location="/v2/upload")
        elif request.method == "PUT":
            assert "/manifests/" not in request.path
            if len(request.body) == int(request.headers["content-length"]):
                stored.append(request.body)
            reply(handler, 201)
        else:
            reply(handler, 404)
        return True

    fake.bend = keep
    with pytest.raises(IntegrityError, match="changed while it was sent"):
        keymgmt.push(fake.site.root / "m.sealed", fake.place, keys=fake.write_config())
    assert {len(content) for content in stored}.isdisjoint({len(whole)})


def test_a_registry_that_makes_no_repository_is_named(fake):
    fake.bend = lambda request, handler: reply(handler, 404) or True
    with pytest.raises(StorageUnavailable, match="no repository models/resnet50"):
        keymgmt.push(fake.site.root / "m.sealed", fake.place, keys=fake.write_config())


def test_a_file_of_the_old_model_is_not_written(fake):
    """An interrupted repair left a second name of a file; a program may have it open."""
    fake.pull()
    file = fake.target / "payload" / "model.bin.floe"
    whole = file.read_bytes()
    (fake.target / "payload" / "model.xml.floe").unlink()
    digest = fake.digest("payload/model.xml.floe")
    kept = fake.blobs.pop(digest)
    fake.refused(IntegrityError)
    (staged_folder,) = staged(fake)
    assert (staged_folder / "payload" / "model.bin.floe").samefile(file)
    file.write_bytes(b"damaged" + whole[7:])
    inode = file.stat().st_ino
    held = file.open("rb")
    fake.blobs[digest] = kept
    assert fake.pull().state == "updated"
    assert held.read() == b"damaged" + whole[7:]
    assert file.read_bytes() == whole
    assert file.stat().st_ino != inode


@pytest.mark.parametrize("place", ["http://models.example/upload", "", "https://[/"])
def test_an_upload_is_sent_nowhere_else(fake, place):
    def keep(request: Seen, handler: Any) -> bool:
        if request.method == "POST":
            reply(handler, 202, Location=place)
        else:
            reply(handler, 404 if request.method != "PUT" else 400)
        return True

    fake.bend = keep
    with pytest.raises((StorageDenied, StorageUnavailable)):
        keymgmt.push(fake.site.root / "m.sealed", fake.place, keys=fake.write_config())


def test_a_tag_that_moves_during_a_push_is_not_moved_back(fake):
    stored: set[str] = set()

    def keep(request: Seen, handler: Any) -> bool:
        if "/manifests/" in request.path and request.method == "GET":
            # Somebody was faster.
            reply(handler, 200, fake.manifest) if stored else reply(handler, 404)
        elif request.method == "POST":
            reply(handler, 202, Location="/v2/upload")
        elif request.method == "PUT":
            assert "/manifests/" not in request.path
            stored.add(request.path)
            reply(handler, 201)
        else:
            reply(handler, 404)
        return True

    fake.describe(lambda said: said.update(annotations={}))
    fake.bend = keep
    with pytest.raises(ConfigError, match="by now"):
        keymgmt.push(fake.site.root / "m.sealed", fake.place, keys=fake.write_config())
    assert stored


def test_a_child_is_not_held_up_by_a_look_up_of_its_parent(fake):
    """The tag is looked up once, under a lock that a thread of the parent holds at the fork."""
    looking, go = threading.Event(), threading.Event()

    def slow(request: Seen, _: Any) -> bool:
        if "/manifests/" in request.path and not looking.is_set():
            looking.set()
            go.wait(60)
        return False

    fake.bend = slow
    remote = keymgmt.Config({"remote": {"ca_file": str(fake.ca_file)}}).remote
    storage = Registry(Location.parse(fake.place), remote)
    keys = fake.files["keys.json"]
    thread = threading.Thread(target=storage.part, args=("keys.json", 0, len(keys)))
    thread.start()

    def read() -> str:
        part = storage.part("keys.json", 0, len(keys))
        return hashlib.sha256(part.content if part else b"").hexdigest()

    try:
        assert looking.wait(30)
        said = in_fork(read, 20)
    finally:
        go.set()
        thread.join()
    assert said == hashlib.sha256(keys).hexdigest()
