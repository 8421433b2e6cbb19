"""Sealed models in a bucket, on a real server that speaks S3; and what a bucket must never do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import programs
import pytest
from bits import flipped
from s3 import SECRET, USER
from webserver import Seen, etag_of, reply, serve_range

import keymgmt
from keymgmt.errors import (
    ConfigError,
    FormatError,
    IntegrityError,
    StorageDenied,
    StorageUnavailable,
)

pytest.importorskip("obstore")

Access = Callable[..., dict[str, Any]]


@pytest.fixture
def place(site, sealed, s3) -> str:
    """The path of a sealed model in the bucket."""
    path = f"sites/{site.root.name}/m.sealed"
    s3.put(sealed, path)
    return path


def test_it_opens_as_from_a_folder(site, place, s3, config, access):
    keys = config(access=access(s3.address))
    where = f"s3://models/{place}"
    with keymgmt.open(where, name="model", keys=keys) as model:
        for file in ("model.xml", "model.bin", "sub/empty"):
            assert model.read(file) == (site.plain / file).read_bytes()
    assert keymgmt.verify(where, keys=keys).manifest.name == "model"
    assert keymgmt.inspect(where, keys=keys).path == where


def test_names_are_quoted(site, s3, config, access):
    (site.plain / "a file #1 %41é+=.bin").write_bytes(b"content")
    s3.put(site.seal(target="odd.sealed"), "a place +/odd.sealed")
    with keymgmt.open(
        "s3://models/a place +/odd.sealed", keys=config(access=access(s3.address))
    ) as model:
        assert model.read("a file #1 %41é+=.bin") == b"content"


def test_what_is_not_there(s3, config, access):
    with pytest.raises(FormatError, match=r"has no manifest.json"):
        keymgmt.open("s3://models/nowhere", keys=config(access=access(s3.address)))


def test_a_wrong_login(place, s3, config, access):
    keys = config(access=access(s3.address, secret="another-s3cr3t"))
    with pytest.raises(StorageDenied, match="says 403") as refused:
        keymgmt.open(f"s3://models/{place}", keys=keys)
    assert "Signature=" not in str(refused.value)
    assert "s3cr3t" not in str(refused.value)


def test_without_a_login_nothing_is_asked(config):
    with pytest.raises(ConfigError, match="says no login for it"):
        keymgmt.open("s3://models/m.sealed", keys=config())


def test_the_environment_decides_nothing(site, place, s3, config, access, monkeypatch):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "OTHER",
        "AWS_SECRET_ACCESS_KEY": "other",
        "AWS_SESSION_TOKEN": "other",
        "AWS_REGION": "elsewhere-1",
        "AWS_ENDPOINT_URL": "https://elsewhere.example",
        "AWS_ENDPOINT_URL_S3": "https://elsewhere.example",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
        "AWS_S3_EXPRESS": "true",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "ALL_PROXY": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(name, value)
    with keymgmt.open(f"s3://models/{place}", keys=config(access=access(s3.address))) as model:
        assert model.read("model.xml") == (site.plain / "model.xml").read_bytes()


def test_the_environment_is_asked_where_the_config_says_so(site, place, s3, config, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    keys = config(access={"s3://models": {"auth": "environment", "endpoint": s3.address}})
    with keymgmt.open(f"s3://models/{place}", keys=keys) as model:
        assert model.read("model.xml") == (site.plain / "model.xml").read_bytes()


def test_a_redirect_learns_no_login(serve, config, access):
    elsewhere = serve(lambda _, handler: reply(handler, 404))

    def moved(request: Seen, handler: Any) -> None:
        reply(handler, 307, Location=f"{elsewhere.url}/taken")

    web = serve(moved)
    token = access("", secret="the-t0ken")["s3://models"]["secret"]
    keys = config(access=access(web.url, token=token))
    with pytest.raises(FormatError, match=r"has no manifest\.json"):
        keymgmt.open("s3://models/m.sealed", keys=keys)
    assert web.seen
    said = str([(seen.path, seen.headers) for seen in elsewhere.seen])
    assert "/taken" in said
    for secret in ("the-t0ken", SECRET, USER, "Signature", "amz", "authorization"):
        assert secret not in said


def test_plain_http_is_for_this_machine(config, access):
    with pytest.raises(ConfigError, match="plain HTTP"):
        keymgmt.open("s3://models/m", keys=config(access=access("http://s3.example:9000")))


def test_an_object_that_changes_is_refused(site, sealed, place, s3, config, access):
    with keymgmt.open(f"s3://models/{place}", keys=config(access=access(s3.address))) as model:
        model.read("model.bin")
        file = sealed / "payload/model.bin.floe"
        file.write_bytes(flipped(file.read_bytes()))
        s3.put(sealed, place)
        with pytest.raises(IntegrityError, match="changed while it was read"):
            model.read("model.bin")


def test_it_is_rewrapped_where_it_is(site, sealed, place, s3, config, access, tree_of):
    keys = config(access=access(s3.address))
    where = f"s3://models/{place}"
    before = tree_of(sealed)
    assert keymgmt.rewrap(where, add=["local:b"], dry_run=True, keys=keys).changed
    assert s3.read(f"{place}/keys.json") == before["keys.json"]
    keymgmt.rewrap(where, add=["local:b"], keys=keys)
    assert [len(g) for g in keymgmt.inspect(where, keys=keys).groups] == [1, 1]
    assert keymgmt.verify(where, keys=keys).opened_by == ("local",)
    for name, content in before.items():
        assert (s3.read(f"{place}/{name}") == content) == (name != "keys.json")


def test_of_two_rewraps_the_second_is_refused(site, place, s3, config, access, monkeypatch):
    from keymgmt._remote.folder import RemoteFolder

    keys, where = config(access=access(s3.address)), f"s3://models/{place}"
    both = threading.Barrier(2, timeout=30)
    replace = RemoteFolder._replace

    def together(folder: Any, name: str, content: bytes) -> None:
        both.wait()
        replace(folder, name, content)

    monkeypatch.setattr(RemoteFolder, "_replace", together)
    ends: dict[str, object] = {}

    def rewrap(group: str) -> None:
        try:
            keymgmt.rewrap(where, add=[group], keys=keys)
            ends[group] = "done"
        except IntegrityError as error:
            ends[group] = str(error)

    threads = [threading.Thread(target=rewrap, args=[group]) for group in ("local:b", "local:c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted("done" if end == "done" else "refused" for end in ends.values()) == [
        "done",
        "refused",
    ]
    won = next(group for group, end in ends.items() if end == "done")
    groups = keymgmt.inspect(where, keys=keys).groups
    assert [name for group in groups for name in group] == ["file:a@1", f"file:{won[-1]}@1"]


def test_an_answer_that_was_lost_is_no_refusal(sealed, serve, config, access, quick):
    """The server took it, and the connection broke before it said so."""
    store = {"keys.json": b"old"}
    lost: list[bool] = []

    def answer(request: Seen, handler: Any) -> None:
        name = urlsplit(request.path).path.rpartition("/")[2]
        if name not in store:
            reply(handler, 404)
            return
        if request.method == "GET":
            serve_range(request, handler, store[name])
        elif request.headers["if-match"] != etag_of(store[name]):
            reply(handler, 412)
        else:
            store[name] = request.body
            lost.append(True)
            handler.close_connection = True

    from keymgmt._remote.folder import open_folder

    web = serve(answer)
    folder = open_folder("s3://models/m", config(access=access(web.url)).remote)
    assert folder.read("keys.json", 100) == b"old"
    folder.replace("keys.json", b"new")
    assert (store["keys.json"], lost) == (b"new", [True])
    store["keys.json"] = b"another"
    with pytest.raises(IntegrityError, match="replaced by somebody else"):
        folder.replace("keys.json", b"newer")
    assert store["keys.json"] == b"another"


def test_a_server_that_is_gone(config, access, quick):
    keys = config(access=access("http://127.0.0.1:9"))
    with pytest.raises(StorageUnavailable, match="is not reached"):
        keymgmt.open("s3://models/m.sealed", keys=keys)


def test_the_command_line(place, s3_config):
    def run(*arguments: str) -> Any:
        done = programs.run_keymgmt("-c", s3_config, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    where = f"s3://models/{place}"
    assert run("rewrap", where, "--add", "local:b")["format"]
    assert len(run("inspect", where)["groups"]) == 2
    assert run("verify", where)["opened_by"] == ["local"]


def test_a_person_is_asked_for_the_secret_once(site, place, s3, config, access, monkeypatch):
    """Each command asks anew; all requests of one are signed with what was typed."""
    typed: list[str] = []
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("getpass.getpass", lambda prompt: typed.append(prompt) or SECRET)
    login = access(s3.address)["s3://models"] | {"secret": {"prompt": "secret of models"}}
    for commands in (1, 2):
        with config(access={"s3://models": login}) as keys:
            for _ in range(2):
                assert keymgmt.inspect(f"s3://models/{place}", keys=keys).groups
            assert keymgmt.usage(f"s3://models/{place}", keys=keys).models == 1
        assert typed == ["secret of models: "] * commands


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_other_buckets_are_signed_for(scheme, config, tmp_path, monkeypatch):
    """Not run against their services; what is asked for and where is looked at."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    from keymgmt._remote.bucket import bucket_storage
    from keymgmt._remote.location import Location
    from keymgmt._remote.patience import Patience

    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {
        "type": "service_account",
        "private_key": key.decode(),
        "private_key_id": "1",
        "client_email": "device7@models.example",
        "gcs_base_url": "https://storage.googleapis.com",
        "disable_oauth": False,
    }
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text(json.dumps(account) if scheme == "gs" else "c2VjcmV0")
    origin = f"{scheme}://models"
    said = {"user": "acct", "secret": {"file": str(secret)}}
    settings, patience = config(access={origin: said}).remote, Patience(20, origin)
    for name in ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR"):
        monkeypatch.setenv(name, "true" if name.endswith("EMULATOR") else "https://other.example")
    for name in ("AZURE_SKIP_SIGNATURE", "GOOGLE_SKIP_SIGNATURE"):
        monkeypatch.setenv(name, "true")
    storage = bucket_storage(Location.parse(f"{origin}/a/m.sealed"), settings, patience)
    where = storage._address("GET", "keys.json").partition("?")[0]
    assert (
        where
        == {
            "gs": "https://storage.googleapis.com/models/a/m.sealed/keys.json",
            "az": "https://acct.blob.core.windows.net/models/a/m.sealed/keys.json",
        }[scheme]
    )
    with pytest.raises(ConfigError, match="nothing is replaced"):
        storage.replace("keys.json", b"", '"1"')
    monkeypatch.setenv("GOOGLE_BASE_URL", "https://other.example")
    if scheme == "gs":
        again = config(access={origin: said}).remote
        with pytest.raises(ConfigError, match="leads elsewhere"):
            bucket_storage(Location.parse(f"{origin}/a/m.sealed"), again, patience)
    secret.write_text("neither JSON nor base64!")
    with pytest.raises(ConfigError, match=r"is none of"):
        bucket_storage(Location.parse(f"{origin}/a/m.sealed"), settings, patience)
