"""The HTTP client: what is tried again, what is refused, and to whom a login is told."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from typing import Any

import pytest
from loopback import Authority
from webserver import Seen, reply

from keymgmt._config.remote import Access
from keymgmt._remote.http import Http
from keymgmt._remote.patience import Patience
from keymgmt.errors import ConfigError, StorageDenied, StorageUnavailable

Settings = Callable[..., Any]
CONTENT = bytes(range(256)) * 4000


class Memory:
    """A sink that counts how often it began anew."""

    def __init__(self, size: int = len(CONTENT)) -> None:
        self.size, self.done, self.content, self.begun = size, 0, b"", 1

    def write(self, part: bytes) -> None:
        self.content += part
        self.done += len(part)

    def restart(self) -> None:
        self.content, self.done, self.begun = b"", 0, self.begun + 1


def client(settings: Settings, url: str, login: Any = None, **table: Any) -> Http:
    remote = settings(**table)
    patience = Patience(remote.deadline, url)
    return Http(url, remote, remote.access_to(""), patience, login)


def cut(handler: Any, status: int, part: bytes, length: int, **headers: str) -> None:
    """Say a length, send less, and end the connection."""
    reply(handler, status, b"", **{"Content-Length": str(length), **headers})
    handler.wfile.write(part)
    handler.close_connection = True


def test_an_answer_comes_over_tls(serve, settings):
    web = serve(lambda _, handler: reply(handler, 200, b"hello"), tls=True)
    got = client(settings, web.url).request("GET", f"{web.url}/a", limit=10)
    assert (bytes(got.body), got.whole) == (b"hello", True)
    got = client(settings, web.url).request("GET", f"{web.url}/a", limit=3)
    assert (bytes(got.body), got.whole) == (b"hel", False)


def test_a_certificate_of_another_authority_is_refused_at_once(serve, settings, tmp_path, quick):
    web = serve(lambda _, handler: reply(handler, 200), tls=True, by=Authority(tmp_path / "other"))
    with pytest.raises(StorageUnavailable, match="certificate") as refused:
        client(settings, web.url).request("GET", web.url, limit=1)
    assert "ca_file" in str(refused.value.hint)
    assert not quick


def test_certificates_that_are_not_there_are_named(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        client(settings, "https://127.0.0.1", ca_file=tmp_path / "missing.pem")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_who_is_busy_is_asked_again(serve, settings, quick, status):
    def answer(request: Seen, handler: Any) -> None:
        if len(web.seen) < 3:
            reply(handler, status, b"later", Retry_After="7")
        else:
            reply(handler, 200, b"now")

    web = serve(answer)
    assert bytes(client(settings, web.url).request("GET", web.url, limit=9).body) == b"now"
    assert quick == [7.0, 7.0]


def test_who_stays_busy_is_given_up(serve, settings, quick):
    web = serve(lambda _, handler: reply(handler, 500))
    with pytest.raises(StorageUnavailable, match="says 500"):
        client(settings, web.url).request("GET", web.url, limit=9)
    assert len(web.seen) == 6


@pytest.mark.parametrize(("status", "kind"), [(401, StorageDenied), (403, StorageDenied)])
def test_a_no_is_not_asked_again(serve, settings, quick, status, kind):
    web = serve(lambda _, handler: reply(handler, status))
    with pytest.raises(kind):
        client(settings, web.url).request("GET", web.url, limit=9)
    assert len(web.seen) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"errors": [{"code": "DENIED", "message": "27182818"}]}', r"403 \(DENIED\)$"),
        (b"<Error><Code>AccessDenied</Code><Message>27182818</Message>", r"403 \(AccessDenied\)$"),
        (b"<html>27182818", "403$"),
    ],
)
def test_of_what_a_server_says_a_code_is_told(serve, settings, body, said):
    web = serve(lambda _, handler: reply(handler, 403, body))
    with pytest.raises(StorageDenied, match=said):
        client(settings, web.url).request("GET", web.url, limit=9)


def test_nobody_there_is_said(settings, quick):
    with pytest.raises(StorageUnavailable, match="not reached"):
        client(settings, "http://127.0.0.1:1").request("GET", "http://127.0.0.1:1/a", limit=9)
    assert len(quick) == 5


def test_plain_http_behind_https_is_said(serve, settings, quick):
    web = serve(lambda _, handler: reply(handler, 200))
    url = web.url.replace("http:", "https:")
    with pytest.raises(StorageUnavailable, match="does not speak TLS"):
        client(settings, url).request("GET", url, limit=9)


def test_a_login_goes_to_its_host_alone(serve, settings):
    other = serve(lambda _, handler: reply(handler, 200, b"there"), tls=True)
    web = serve(
        lambda _, handler: reply(handler, 307, Location=f"{other.url}/x?signed=1"), tls=True
    )
    http = client(settings, web.url)
    http.authorization = "Bearer 27182818"
    assert bytes(http.request("GET", web.url, limit=9).body) == b"there"
    assert web.seen[0].headers["authorization"] == "Bearer 27182818"
    assert "authorization" not in other.seen[0].headers


def test_an_address_that_two_parsers_read_as_two_hosts_gets_no_login(serve, settings):
    other = serve(lambda _, handler: reply(handler, 200, b"there"), tls=True)
    host = other.url.partition("://")[2]

    def answer(request: Seen, handler: Any) -> None:
        home = web.url.partition("://")[2]
        reply(handler, 307, Location=f"https://{host}\\@{home}/x")

    web = serve(answer, tls=True)
    http = client(settings, web.url)
    http.authorization = "Bearer 27182818"
    with pytest.raises(StorageUnavailable, match="no address"):
        http.request("GET", web.url, limit=9)
    assert not other.seen


def test_a_login_is_made_as_the_host_asks(serve, settings):
    def answer(request: Seen, handler: Any) -> None:
        if request.headers.get("authorization") == "Basic abc":
            reply(handler, 200, b"in")
        else:
            reply(handler, 401, WWW_Authenticate='Basic realm="x"')

    web = serve(answer)
    asked: list[str] = []

    def login(challenge: str) -> str:
        asked.append(challenge)
        return "Basic abc"

    http = client(settings, web.url, login)
    assert bytes(http.request("GET", web.url, limit=9).body) == b"in"
    assert bytes(http.request("GET", web.url, limit=9).body) == b"in"
    assert asked == ['Basic realm="x"']
    refused = client(settings, web.url, lambda _: "Basic other")
    with pytest.raises(StorageDenied, match="says 401"):
        refused.request("GET", web.url, limit=9)


@pytest.mark.parametrize("target", ["http://models.example/a", "file:///etc/passwd", "ftp://h/a"])
def test_only_https_is_followed(serve, settings, target):
    web = serve(lambda _, handler: reply(handler, 302, Location=target))
    with pytest.raises(StorageDenied, match="redirects to"):
        client(settings, web.url).request("GET", web.url, limit=9)


def test_redirects_end(serve, settings):
    web = serve(lambda _, handler: reply(handler, 302, Location="/again"))
    with pytest.raises(StorageUnavailable, match="again and again") as refused:
        client(settings, web.url).request("GET", web.url, limit=9)
    assert refused.value.hint


def test_what_a_redirect_was_signed_with_is_not_told(serve, settings, quick):
    target = "http://127.0.0.1:1/a?X-Amz-Signature=27182818"
    web = serve(lambda _, handler: reply(handler, 302, Location=target))
    with pytest.raises(StorageUnavailable) as told:
        client(settings, web.url).request("GET", web.url, limit=9)
    assert "27182818" not in str(told.value)


def test_a_download_goes_on_where_it_was_cut(serve, settings, quick):
    def answer(request: Seen, handler: Any) -> None:
        start = int(request.headers.get("range", "bytes=0-").split("=")[1].split("-")[0])
        part = CONTENT[start : start + 100_000]
        ranged = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
        cut(handler, 206 if start else 200, part, len(CONTENT) - start, **(ranged if start else {}))

    web = serve(answer)
    sink = Memory()
    client(settings, web.url).fetch(web.url, sink)
    assert sink.content == CONTENT
    assert sink.begun == 1
    # More often than anything is tried without getting further.
    assert len(web.seen) == 11


def test_a_server_that_ignores_ranges_gives_all_of_it_again(serve, settings, quick):
    def answer(request: Seen, handler: Any) -> None:
        if len(web.seen) == 1:
            cut(handler, 200, CONTENT[:5000], len(CONTENT))
        else:
            reply(handler, 200, CONTENT)

    web = serve(answer)
    sink = Memory()
    client(settings, web.url).fetch(web.url, sink)
    assert sink.content == CONTENT
    assert sink.begun == 2


def test_what_an_address_is_signed_with_is_in_no_log(serve, settings, caplog):
    def answer(request: Seen, handler: Any) -> None:
        if "Signature" in request.path:
            reply(handler, 200, b"there")
        else:
            reply(handler, 307, Location="/b?X-Amz-Signature=27182818")

    web = serve(answer, tls=True)
    caplog.set_level("DEBUG")
    got = client(settings, web.url).request("GET", f"{web.url}/a?X-Amz-Signature=31415926", limit=9)
    assert bytes(got.body) == b"there"
    got = client(settings, web.url).request("GET", f"{web.url}/a", limit=9)
    assert bytes(got.body) == b"there"
    assert '"GET /b HTTP/1.1" 200' in caplog.text
    assert "27182818" not in caplog.text
    assert "31415926" not in caplog.text


@pytest.mark.parametrize(
    ("status", "ranged", "body", "said"),
    [
        (206, "bytes 0-9/10", b"x" * 10, "another range"),
        (200, "", CONTENT + b"more", "longer than"),
    ],
)
def test_another_answer_than_asked_for_is_refused(serve, settings, status, ranged, body, said):
    web = serve(lambda _, handler: reply(handler, status, body, Content_Range=ranged))
    sink = Memory()
    if status == 206:
        sink.write(b"x" * 100)
    with pytest.raises(StorageUnavailable, match=said) as refused:
        client(settings, web.url).fetch(web.url, sink)
    assert refused.value.hint


def test_a_server_that_gives_a_byte_now_and_then_is_given_up(serve, settings):
    def answer(request: Seen, handler: Any) -> None:
        reply(handler, 200, b"", Content_Length=str(len(CONTENT)))
        for _ in range(400):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)

    web = serve(answer)
    with pytest.raises(StorageUnavailable, match="within 3 seconds"):
        client(settings, web.url, timeout=3.0, deadline=3.0).fetch(web.url, Memory())


@pytest.mark.parametrize(
    "begun", ["X-A: ", "Transfer-Encoding: chunked\r\n\r\n5;"], ids=["header", "chunk"]
)
def test_a_server_that_never_ends_a_line_is_given_up(serve, settings, begun):
    def answer(_: Seen, handler: Any) -> None:
        handler.wfile.write(f"HTTP/1.1 200 OK\r\n{begun}".encode())
        for _ in range(400):
            handler.wfile.write(b"x")
            time.sleep(0.05)
        handler.close_connection = True

    web = serve(answer, tls=True)
    with pytest.raises(StorageUnavailable, match="within 2 seconds"):
        client(settings, web.url, timeout=2.0, deadline=2.0).request("GET", web.url, limit=9)


def test_a_server_that_says_nothing_is_given_up(serve, settings, quick):
    web = serve(lambda _, handler: time.sleep(2))
    with pytest.raises(StorageUnavailable, match="did not answer in time"):
        client(settings, web.url, timeout=0.2, deadline=60).request("GET", web.url, limit=1)
    with pytest.raises(StorageUnavailable, match=r"within 0\.5 seconds"):
        client(settings, web.url, timeout=9, deadline=0.5).request("GET", web.url, limit=1)


def test_proxies_of_the_environment_are_for_who_asks_for_them(serve, settings, monkeypatch, quick):
    proxy = serve(lambda _, handler: reply(handler, 200))  # gives no tunnel
    web = serve(lambda _, handler: reply(handler, 200, b"itself"), tls=True)
    monkeypatch.setenv("https_proxy", proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    patience = Patience(20, web.url)
    http = Http(web.url, settings(), Access(ca_file=settings().ca_file), patience)
    assert bytes(http.request("GET", f"{web.url}/a", limit=9).body) == b"itself"
    environment = Access(auth="environment", ca_file=settings().ca_file)
    http = Http(web.url, settings(), environment, patience)
    with pytest.raises(StorageUnavailable, match="ProxyError"):
        http.request("GET", f"{web.url}/a", limit=9)


@pytest.mark.parametrize("target", ["https://[/a", "https://h:99999999/a", r"http://h\@localhost/"])
def test_an_address_that_is_none_is_refused(serve, settings, target):
    web = serve(lambda _, handler: reply(handler, 302, Location=target))
    with pytest.raises(StorageUnavailable, match="no address"):
        client(settings, web.url).request("GET", web.url, limit=1)


def test_what_is_for_this_machine_alone_goes_to_no_proxy(serve, settings):
    proxy = serve(lambda _, handler: reply(handler, 200, b"proxy"))
    web = serve(lambda _, handler: reply(handler, 200, b"itself"))
    http = client(settings, web.url, proxy=proxy.url)
    http.authorization = "Bearer 27182818"
    assert bytes(http.request("GET", f"{web.url}/a", limit=9).body) == b"itself"
    assert not proxy.seen


def test_an_answer_is_taken_as_it_is_and_not_unpacked(serve, settings):
    packed = gzip.compress(bytes(1 << 20))
    web = serve(lambda _, handler: reply(handler, 200, packed, Content_Encoding="gzip"))
    got = client(settings, web.url).request("GET", web.url, limit=1 << 21)
    assert bytes(got.body) == packed


def test_a_server_that_gives_a_byte_with_each_connection_is_given_up(serve, settings, quick):
    def answer(request: Seen, handler: Any) -> None:
        start = int(request.headers.get("range", "bytes=0-").partition("=")[2].partition("-")[0])
        if start > 2000:  # what it was before: for ever
            handler.close_connection = True
            return
        ranged = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        cut(handler, 206, b"x", len(CONTENT) - start, Content_Range=ranged)

    web = serve(answer)
    sink = Memory()
    with pytest.raises(StorageUnavailable, match=r"cut its answer short|within 0\.5 seconds"):
        client(settings, web.url, deadline=0.5).fetch(web.url, sink)
    assert sink.done < 2000
