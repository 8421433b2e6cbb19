"""Sealed models on a web server: they open as from a folder, and a server that lies is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import programs
import pytest
from forks import in_child
from loopback import Authority
from webserver import Quirk, Seen, Web, files_of, reply, serve_range

import keymgmt
from keymgmt.errors import (
    ConfigError,
    FormatError,
    IntegrityError,
    StorageDenied,
    StorageUnavailable,
    UntrustedPublisher,
)
from keymgmt.loading import file_memory

FILES = ("model.xml", "model.bin")


def is_payload(request: Seen) -> bool:
    return request.path.endswith(".floe")


def bytes_of(web: Web) -> int:
    """Bytes of payload that were asked for."""
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", s.headers["range"]) for s in map_payload(web)]
    return sum(int(r[2]) - int(r[1]) + 1 for r in ranges if r)


def map_payload(web: Web) -> list[Seen]:
    return [seen for seen in web.seen if is_payload(seen)]


def test_it_opens_as_from_a_folder(site, sealed, serve, config):
    web = serve(files_of(site.root), tls=True)
    with keymgmt.open(f"{web.url}/m.sealed", name="model", keys=config()) as model:
        for file in ("model.xml", "model.bin", "sub/empty"):
            assert model.read(file) == (site.plain / file).read_bytes()
        plain = (site.plain / "model.bin").read_bytes()
        assert bytes(memoryview(file_memory(model, "model.bin"))) == plain
        with model.open("model.bin") as opened:
            opened.seek(1_500_000)
            assert opened.read(100) == plain[1_500_000:1_500_100]
    assert keymgmt.verify(f"{web.url}/m.sealed/", keys=config()).manifest.name == "model"
    proved = keymgmt.verify(f"{web.url}/m.sealed", keys=config(), signature_only=True)
    assert proved.manifest.file("model.bin").size == len(plain)
    assert keymgmt.inspect(f"{web.url}/m.sealed", keys=config()).groups == (("file:a@1",),)
    assert not any("authorization" in seen.headers for seen in web.seen)


def test_the_signature_comes_before_any_payload(site, serve, config):
    site.seal(sign="local:stranger")
    web = serve(files_of(site.root), tls=True)
    with pytest.raises(UntrustedPublisher):
        keymgmt.open(f"{web.url}/m.sealed", keys=config())
    small = ("manifest.json", "signatures.json", "keys.json")
    assert {seen.path for seen in web.seen} <= {f"/m.sealed/{name}" for name in small}


def test_each_byte_is_fetched_once(site, sealed, serve, config):
    web = serve(files_of(site.root))
    size = (sealed / "payload/model.bin.floe").stat().st_size
    head = 1 << 16
    with keymgmt.open(f"{web.url}/m.sealed", keys=config()) as model:
        model.read("model.bin")
        assert bytes_of(web) <= size + head
        web.seen.clear()
        with model.open("model.bin") as file:
            file.read()
        assert bytes_of(web) <= size + head
        web.seen.clear()
        model.read("model.xml")
        assert len(map_payload(web)) == 1  # all of a small one comes with the first request


def test_files_are_begun_in_parallel(site, sealed, serve, config):
    begun: set[str] = set()
    both = threading.Event()

    def waits(request: Seen, handler: Any, content: bytes) -> bool:
        if is_payload(request):
            begun.add(request.path)
            if len(begun) == len(FILES):
                both.set()
            both.wait(30)
        return False

    web = serve(files_of(site.root, waits))
    with (
        keymgmt.open(f"{web.url}/m.sealed", keys=config()) as model,
        ThreadPoolExecutor(2) as pool,
    ):
        for file, content in zip(FILES, pool.map(model.read, FILES), strict=True):
            assert content == (site.plain / file).read_bytes()
    assert len([seen for seen in map_payload(web) if "=0-" in seen.headers["range"]]) == len(FILES)


def test_names_are_quoted(site, serve, config):
    (site.plain / "a file #1 %41é.bin").write_bytes(b"content")
    site.seal(target="my model.sealed")
    web = serve(files_of(site.root))
    for path in ("my model.sealed", "my%20model.sealed"):
        with keymgmt.open(f"{web.url}/{path}", keys=config()) as model:
            assert model.read("a file #1 %41é.bin") == b"content"


def test_the_command_line(site, sealed, serve, authority):
    web = serve(files_of(site.root), tls=True)
    file = site.root / "keymgmt.toml"
    file.write_text(
        f'[providers.local]\nbackend = "file"\npath = "keys"\n'
        f'[policy]\npublishers = {{ "pub.pem" = ["*"] }}\n[remote]\nca_file = "{authority.ca_file}"'
    )
    authority.ca_file.chmod(0o600)

    def run(*arguments: str) -> Any:
        command = [sys.executable, "-P", "-m", "keymgmt", "-c", str(file), *arguments, "--json"]
        done = programs.run(*command)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert run("inspect", f"{web.url}/m.sealed")["path"] == f"{web.url}/m.sealed"
    assert run("verify", f"{web.url}/m.sealed")["opened_by"] == ["local"]
    command = [sys.executable, "-P", "-m", "keymgmt", "-c", str(file)]
    for verb in (["reseal"], ["sign"], ["keys", "usage"]):
        done = programs.run(*command, *verb, f"{web.url}/m.sealed")
        assert done.returncode == 3, verb
        assert "not a folder of this machine" in done.stdout + done.stderr, verb
    assert run("doctor", "--open", f"{web.url}/m.sealed")["findings"]
    cat = ["exec", "--via", "memfd", f"{web.url}/m.sealed", "--", "cat", "{sealed}/model.xml"]
    done = subprocess.run([*command, *cat], capture_output=True, timeout=60)
    assert done.stdout == (site.plain / "model.xml").read_bytes(), done.stderr
    assert run("unseal", f"{web.url}/m.sealed", str(site.root / "unsealed"))
    assert (site.root / "unsealed/model.bin").read_bytes() == (
        site.plain / "model.bin"
    ).read_bytes()


def test_a_login_is_told_to_its_host_alone(site, sealed, serve, config, tmp_path):
    elsewhere = serve(files_of(site.root))

    def moved(request: Seen, handler: Any, content: bytes) -> bool:
        if is_payload(request):
            reply(handler, 302, Location=f"{elsewhere.url}{request.path}?signature=SECRET")
            return True
        return False

    web = serve(files_of(site.root, moved))
    (tmp_path / "token").write_text("T0KEN\n")
    (tmp_path / "token").chmod(0o600)
    keys = config(access={web.url: {"token": {"file": str(tmp_path / "token")}}})
    with keymgmt.open(f"{web.url}/m.sealed", keys=keys) as model:
        assert model.read("model.bin") == (site.plain / "model.bin").read_bytes()
    assert {seen.headers.get("authorization") for seen in web.seen} == {"Bearer T0KEN"}
    assert elsewhere.seen
    assert not any("authorization" in seen.headers for seen in elsewhere.seen)


def test_user_and_secret_are_one_login(site, sealed, serve, config, tmp_path):
    def asks(request: Seen, handler: Any, content: bytes) -> bool:
        if request.headers.get("authorization") == "Basic bWU6cGFzcw==":
            return False
        reply(handler, 401, WWW_Authenticate='Basic realm="models"')
        return True

    web = serve(files_of(site.root, asks))
    (tmp_path / "secret").write_text("pass")
    (tmp_path / "secret").chmod(0o600)
    secret = {"file": str(tmp_path / "secret")}
    keymgmt.inspect(
        f"{web.url}/m.sealed", keys=config(access={web.url: {"user": "me", "secret": secret}})
    )
    with pytest.raises(StorageDenied, match="says 401"):
        keymgmt.inspect(f"{web.url}/m.sealed", keys=config())
    with pytest.raises(ConfigError, match="user and secret together"):
        keymgmt.inspect(f"{web.url}/m.sealed", keys=config(access={web.url: {"user": "me"}}))


def says(status: int) -> Quirk:
    def quirk(request: Seen, handler: Any, content: bytes) -> bool:
        if is_payload(request):
            reply(handler, status)
        return is_payload(request)

    return quirk


def ignores_ranges(request: Seen, handler: Any, content: bytes) -> bool:
    reply(handler, 200, content)
    return True


def cuts_ranges_short(request: Seen, handler: Any, content: bytes) -> bool:
    if is_payload(request):
        short = content[:100]
        reply(handler, 206, short, Content_Range=f"bytes 0-99/{len(content)}")
    return is_payload(request)


def ends_early(request: Seen, handler: Any, content: bytes) -> bool:
    if is_payload(request):
        reply(handler, 206, content[:100], Content_Length=str(1 << 16))
        handler.close_connection = True
    return is_payload(request)


def gives_another_range(request: Seen, handler: Any, content: bytes) -> bool:
    if is_payload(request):
        body = content[10 : 10 + (1 << 16)]
        end = 9 + len(body)
        reply(handler, 206, body, Content_Range=f"bytes 10-{end}/{len(content)}")
    return is_payload(request)


def gives_no_range(request: Seen, handler: Any, content: bytes) -> bool:
    reply(handler, 206, content[:100])
    return True


def gives_another_object(request: Seen, handler: Any, content: bytes) -> bool:
    if is_payload(request):
        serve_range(request, handler, bytes(len(content)))
    return is_payload(request)


def becomes_another_object(request: Seen, handler: Any, content: bytes) -> bool:
    if is_payload(request) and not request.headers["range"].startswith("bytes=0-"):
        serve_range(request, handler, content + b"x")
        return True
    return False


def drops_the_etag(request: Seen, handler: Any, content: bytes) -> bool:
    if is_payload(request) and not request.headers["range"].startswith("bytes=0-"):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["range"])
        assert asked
        part = content[int(asked[1]) : int(asked[2]) + 1]
        said = f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}"
        reply(handler, 206, part, Content_Range=said)
        return True
    return False


def is_too_large(request: Seen, handler: Any, content: bytes) -> bool:
    reply(handler, 200, b"{", Content_Length=str(1 << 40))
    handler.close_connection = True
    return True


def redirects_to_plain_http(request: Seen, handler: Any, content: bytes) -> bool:
    reply(handler, 301, Location="http://models.example/m?signature=SECRET")
    return True


def redirects_for_ever(request: Seen, handler: Any, content: bytes) -> bool:
    reply(handler, 301, Location=request.path)
    return True


def is_slow(request: Seen, handler: Any, content: bytes) -> bool:
    if is_payload(request):
        reply(handler, 206, b"", Content_Length="65536", Content_Range=f"bytes 0-65535/{1 << 20}")
        try:
            for _ in range(100):
                handler.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            pass
    return is_payload(request)


@pytest.mark.parametrize(
    ("quirk", "kind", "said"),
    [
        (says(403), StorageDenied, "says 403"),
        (says(404), IntegrityError, "payload/model.bin.floe is missing"),
        (says(429), StorageUnavailable, "says 429"),
        (says(500), StorageUnavailable, "says 500"),
        (says(418), StorageUnavailable, "says 418"),
        (says(416), IntegrityError, "the payload file has 0 bytes"),
        (ignores_ranges, StorageUnavailable, "is given whole"),
        (cuts_ranges_short, StorageUnavailable, "another range"),
        (ends_early, StorageUnavailable, "cut its answer short"),
        (gives_another_range, StorageUnavailable, "another range"),
        (gives_no_range, StorageUnavailable, "another range"),
        (gives_another_object, FormatError, "FLOE"),
        (becomes_another_object, IntegrityError, "changed while it was read"),
        (drops_the_etag, IntegrityError, "changed while it was read"),
        (is_too_large, StorageUnavailable, "cut its answer short|is given whole"),
        (redirects_to_plain_http, StorageDenied, "redirects to http://models.example/m,"),
        (redirects_for_ever, StorageUnavailable, "again and again"),
    ],
)
def test_a_server_that_does_not_as_it_should(site, sealed, serve, config, quick, quirk, kind, said):
    web = serve(files_of(site.root, quirk), tls=True)
    buffer = bytearray(len((site.plain / "model.bin").read_bytes()))
    with (
        pytest.raises(kind, match=said) as caught,
        keymgmt.open(f"{web.url}/m.sealed", keys=config()) as model,
    ):
        model.read_into("model.bin", buffer)
    assert not any(buffer)
    assert "SECRET" not in str(caught.value) + str(caught.value.hint)


def test_a_server_that_is_too_slow(site, sealed, serve, config, quick):
    web = serve(files_of(site.root, is_slow))
    with (
        keymgmt.open(f"{web.url}/m.sealed", keys=config(deadline=3)) as model,
        pytest.raises(StorageUnavailable, match="within 3 seconds"),
    ):
        model.read("model.bin")


def test_what_passes_is_tried_again(site, sealed, serve, config, quick):
    troubles: list[Quirk] = [says(503), ends_early, says(429)]

    def troubled(request: Seen, handler: Any, content: bytes) -> bool:
        return bool(troubles) and is_payload(request) and troubles.pop()(request, handler, content)

    web = serve(files_of(site.root, troubled))
    with keymgmt.open(f"{web.url}/m.sealed", keys=config()) as model:
        assert model.read("model.bin") == (site.plain / "model.bin").read_bytes()
    assert not troubles
    assert len(quick) == 3


def test_a_wrong_certificate_is_refused(site, sealed, serve, config, tmp_path):
    web = serve(files_of(site.root), tls=True, by=Authority(tmp_path / "other"))
    with pytest.raises(StorageUnavailable, match="certificate"):
        keymgmt.open(f"{web.url}/m.sealed", keys=config())


def test_where_a_location_is_not_read(site, sealed, config):
    with pytest.raises(ConfigError, match="plain HTTP"):
        keymgmt.open("http://models.example/m.sealed", keys=config())
    with pytest.raises(ConfigError, match="a slash is lost"):
        keymgmt.open(Path("https://models.example/m.sealed"), keys=config())
    with pytest.raises(ConfigError, match="holds no login"):
        keymgmt.open("https://me:pass@models.example/m.sealed", keys=config())
    with pytest.raises(ConfigError, match="not a folder of this machine"):
        keymgmt.sign("https://models.example/m.sealed", key="local:publisher", keys=config())


def test_a_web_server_takes_no_new_keys(site, sealed, serve, config):
    web = serve(files_of(site.root))
    with pytest.raises(ConfigError, match="nothing is replaced at"):
        keymgmt.rewrap(f"{web.url}/m.sealed", add=["local:b"], keys=config())


def test_a_forked_child_reads_on(site, sealed, serve, config):
    web = serve(files_of(site.root))
    with keymgmt.open(f"{web.url}/m.sealed", keys=config()) as model:
        model.read("model.xml")

        def read() -> None:
            assert model.read("model.xml") == (site.plain / "model.xml").read_bytes()

        in_child(read)


@pytest.mark.parametrize("name", ["manifest.json", "keys.json", "signatures.json"])
def test_a_file_that_is_empty_there_is_not_said_to_have_changed(sealed, serve, config, name):
    """Nothing of an empty file is in any range, so servers answer 416."""
    (sealed / name).write_bytes(b"")

    def quirk(_: Seen, handler: Any, content: bytes) -> bool:
        if not content:
            reply(handler, 416, Content_Range="bytes */0")
        return not content

    web = serve(files_of(sealed, quirk), tls=True)
    with pytest.raises((FormatError, UntrustedPublisher)):
        keymgmt.open(web.url, keys=config())
