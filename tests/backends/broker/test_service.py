"""The whole exchange over HTTP, and each attack on it that is not on the evidence itself."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from waiting import until
from webserver import Seen, reply, serving

pytest.importorskip("keymgmt_broker_service")

from keymgmt_broker.protocol import (
    ANSWER,
    NONCE_PATH,
    UNWRAP_PATH,
    Request,
    answer_info,
    encode_bytes,
    read,
)

from keymgmt.backend import (
    AccessDenied,
    Dek,
    KeyNotFound,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
    dump_json,
    hpke_generate,
    hpke_open,
    hpke_public,
    hpke_seal,
)

pytestmark = [pytest.mark.once, pytest.mark.timeout(300)]
HYBRID = "hpke-mlkem768-x25519"


class Asker:
    """A machine that asks by hand, so that it can do what our client does not."""

    def __init__(self, service: Any, provider: Any, prove: Callable[[bytes], bytes]) -> None:
        self.service, self.prove = service, prove
        with Dek.generate() as dek:
            self.wrapped = provider.wrap("model", dek, b"context")
            self.dek = bytes(dek.view())
        self.private = hpke_generate(HYBRID)
        self.public = hpke_public(HYBRID, self.private)

    def post(self, path: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
        made = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=30)
        with contextlib.closing(made):
            made.request("POST", path, body)
            answer = made.getresponse()
            return answer.status, json.loads(answer.read())

    def nonce(self) -> bytes:
        status, answer = self.post(NONCE_PATH)
        assert status == 200
        return read(dump_json(answer), answer["format"], "", 1000).base64("nonce", limit=56)

    def request(self, **changes: Any) -> Request:
        """A request with good evidence."""
        made = Request(self.nonce(), HYBRID, self.public, self.wrapped, b"context", "sgx")
        made = replace(made, **changes)
        return made.with_evidence(self.prove(made.report_data))

    def ask(self, request: Request) -> tuple[int, dict[str, Any]]:
        return self.post(UNWRAP_PATH, request.to_bytes())

    def opens(self, request: Request, answer: dict[str, Any]) -> bool:
        sealed = read(dump_json(answer), ANSWER, "", 10000).base64("sealed", limit=4096)
        with hpke_open(HYBRID, self.private, sealed, answer_info(request.report_data)) as dek:
            return bytes(dek.view()) == self.dek


@pytest.fixture
def asker(shared_service, client, prove) -> Asker:
    return Asker(shared_service, client(shared_service.address), prove)


def refused(answer: tuple[int, dict[str, Any]]) -> str:
    status, body = answer
    assert status >= 400
    assert set(body) == {"format", "refused"}
    return str(body["refused"])


def test_a_share_comes_back_to_the_machine_that_proves_itself(shared_service, client):
    provider = client(shared_service.address)
    with Dek.generate() as dek, provider.unwrap(provider.wrap("model", dek, b"c"), b"c") as again:
        assert again == dek
    last = shared_service.said().splitlines()[-1]
    assert "event=broker-unwrap key=model" in last
    assert "policy=press" in last
    assert "client=127.0.0.1" in last


def test_evidence_for_anything_else_is_refused(asker, client):
    good = asker.request()
    other = hpke_public(HYBRID, hpke_generate(HYBRID))
    for changed in (
        replace(good, nonce=asker.nonce()),
        replace(good, public_key=other),
        replace(good, context=b"another"),
        replace(good, wrapped=replace(good.wrapped, blob=good.wrapped.blob[::-1])),
        replace(good, evidence=b""),
    ):
        assert refused(asker.ask(changed)) == "evidence"
    assert refused(asker.ask(replace(good, kind="tdx"))) == "policy"
    status, answer = asker.ask(good)
    assert status == 200
    assert asker.opens(good, answer)


def test_a_replay_gives_nothing_new_to_anybody_and_is_logged(asker):
    request = asker.request()
    answers = [asker.ask(request) for _ in range(4)]
    assert all(status == 200 and asker.opens(request, body) for status, body in answers)
    # Two workers answer, and each knows what it saw.
    assert "repeat=yes" in asker.service.said()
    stranger = hpke_generate(HYBRID)
    sealed = read(dump_json(answers[-1][1]), ANSWER, "", 10000).base64("sealed", limit=4096)
    with pytest.raises(UnwrapFailed):
        hpke_open(HYBRID, stranger, sealed, answer_info(request.report_data))


def nonce_of(key: bytes, seconds_ago: float) -> bytes:
    signed = int((time.time() - seconds_ago) * 1000).to_bytes(8, "big") + os.urandom(16)
    return signed + hmac.digest(key, b"keymgmt broker nonce 1" + signed, hashlib.sha256)


def test_a_nonce_counts_for_a_minute_and_only_if_it_is_of_this_broker(asker, module_site):
    key = (module_site / "nonce.key").read_bytes()
    assert asker.ask(asker.request(nonce=nonce_of(key, 50)))[0] == 200
    for bad in (
        nonce_of(key, 61),
        nonce_of(key, 3600),  # the clock of another instance is an hour late,
        nonce_of(key, -3600),  # or early
        nonce_of(bytes(32), 0),
        os.urandom(56),
        b"",
        nonce_of(key, 0)[:55],
    ):
        assert refused(asker.ask(asker.request(nonce=bad))) == "nonce"


def test_nothing_behind_the_broker_is_asked_before_the_evidence_is_verified(asker):
    damaged = asker.request(wrapped=replace(asker.wrapped, blob=b"damaged"))
    assert refused(asker.ask(damaged)) == "unwrap"
    assert refused(asker.ask(replace(damaged, evidence=b"none"))) == "evidence"
    missing = asker.request(wrapped=replace(asker.wrapped, key="nonesuch"))
    assert refused(asker.ask(missing)) == "key"


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"\xff" * 100, b"[" * 1000, b'{"format":"keymgmt-broker-request/2"}']
)
def test_what_is_no_request_is_refused(asker, body):
    assert refused(asker.post(UNWRAP_PATH, body)) == "request"


def test_a_public_key_to_which_nothing_can_be_sealed_is_refused(asker):
    assert refused(asker.ask(asker.request(public_key=b"short"))) == "request"


def test_a_request_that_is_too_large_is_refused_before_it_is_read(asker):
    service = asker.service
    with socket.create_connection(("127.0.0.1", service.port), 30) as raw:
        raw.sendall(b"POST /v1/unwrap HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", service.port), 30) as raw:
        raw.sendall(b"POST /v1/unwrap HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                raw.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert raw.recv(65536).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", service.port), 30) as raw:
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                raw.sendall(b"POST /v1/unwrap HTTP/1.1\r\nX-Long: " + b"x" * 65536)
        with contextlib.suppress(ConnectionError):
            assert raw.recv(65536) == b""
    assert asker.ask(asker.request())[0] == 200


# It raises its own limit of open files, which must not hold for pytest.
MANY = """
import resource, socket, sys, time
port, count = int(sys.argv[1]), int(sys.argv[2])
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
beginnings = [b"", b"POST /v1/unwrap HTTP/1.1\\r\\nX: ", b"POST /v1/unwrap HTTP/1.1\\r\\n"
              b"Host: x\\r\\nContent-Length: 1000\\r\\n\\r\\nslow"]
made = []
for number in range(count):
    made.append(socket.create_connection(("127.0.0.1", port), 60, ("127.0.0.2", 0)))
    made[-1].sendall(beginnings[number % 3])
print("open", flush=True)
for each in made:
    each.settimeout(60)
    try:
        while each.recv(65536):
            pass
    except ConnectionError:
        pass
print("closed", flush=True)
"""


def test_slow_clients_and_ten_thousand_connections_keep_nobody_out(make_service, client, prove):
    asker = Asker(make_service(workers=2, rate=20), client(), prove)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 10_000 if files == resource.RLIM_INFINITY else min(10_000, files - 500)
    with subprocess.Popen(
        [sys.executable, "-c", MANY, str(asker.service.port), str(count)],
        stdout=subprocess.PIPE,
        text=True,
    ) as many:
        assert many.stdout is not None
        assert many.stdout.readline() == "open\n"
        assert many.poll() is None
        assert asker.ask(asker.request())[0] == 200
        assert many.stdout.readline() == "closed\n"
    assert asker.ask(asker.request())[0] == 200


@pytest.mark.parametrize(
    "beginning",
    [
        b"POST /v1/nonce HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"GET /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n",
    ],
)
def test_what_follows_a_request_that_was_answered_has_a_bound(asker, beginning):
    """Headers after a chunked body were kept in memory, as many as came; nobody reads the body."""
    with socket.create_connection(("127.0.0.1", asker.service.port), 30) as raw:
        raw.sendall(beginning)
        assert raw.recv(65536)
        many = b"a: b\r\n" * 10_000_000
        with pytest.raises(ConnectionError):
            raw.sendall(many)
    assert asker.ask(asker.request())[0] == 200


def test_slow_bodies_of_many_keep_nobody_out(make_service, client, prove):
    """They hold what came of them, and not what might come."""
    asker = Asker(make_service(), client(), prove)
    request = asker.request()
    with subprocess.Popen(
        [sys.executable, "-c", MANY, str(asker.service.port), "3600"],
        stdout=subprocess.PIPE,
        text=True,
    ) as many:
        assert many.stdout is not None
        assert many.stdout.readline() == "open\n"
        status, answer = asker.ask(request)
        many.kill()
    assert status == 200, answer


def test_what_one_address_may_ask_at_once_is_not_divided_by_the_workers():
    """Its connections reach workers by chance; one of 64 would refuse the third request."""
    from keymgmt_broker_service._app import _Rates
    from keymgmt_broker_service._decide import Refusal

    rates = _Rates(20.0, 64)
    for _ in range(40):
        rates.count("192.0.2.1")
    with pytest.raises(Refusal):
        rates.count("192.0.2.1")


def test_what_is_no_http_leaves_nothing_in_the_log(asker):
    """Each would be a line, without an address, as often as somebody likes."""
    upgrade = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    before = asker.service.said()
    for sent in (b"nonsense\r\n\r\n", upgrade):
        with socket.create_connection(("127.0.0.1", asker.service.port), 30) as raw:
            raw.sendall(sent)
            assert raw.recv(65536).startswith(b"HTTP/1.1 4")
    assert asker.service.said() == before


def test_an_address_counts_however_a_balancer_spells_it():
    """All IPv4 addresses that are written as IPv6 would be one network, with one rate."""
    from keymgmt_broker_service._app import _client
    from starlette.requests import Request as HttpRequest

    said = {
        host: _client(HttpRequest({"type": "http", "client": (host, 1)}))
        for host in ("192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "nonsense")
    }
    assert list(said.values()) == ["192.0.2.1", "192.0.2.1", "2001:db8::/64", "unknown"]


def test_workers_end_with_the_process_that_watches_them(make_service):
    """They would keep the address, and never read a new config."""
    service = make_service()
    made = workers(service)
    os.kill(service.process.pid, signal.SIGKILL)
    service.process.wait()
    try:
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in made))
    finally:
        for pid in made:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    service.start()


def test_a_connection_on_which_no_request_ends_is_closed(asker):
    """A body that nobody reads, and line ends that begin no request, come in time or not at all."""
    beginnings = (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    )
    with contextlib.ExitStack() as stack:
        made = []
        for beginning in beginnings:
            raw = socket.create_connection(("127.0.0.1", asker.service.port), 30)
            stack.enter_context(raw).sendall(beginning)
            assert raw.recv(65536)
            made.append(raw)

        def trickle(raw: socket.socket) -> bool:
            try:
                raw.sendall(b"\r\n")
            except ConnectionError:
                return True
            time.sleep(0.5)
            return False

        for each in made:
            until(lambda each=each: trickle(each))


def test_a_client_that_asks_too_often_is_told_so(make_service, client, prove):
    service = make_service(rate=2)
    asker = Asker(service, client(service.address), prove)
    words = [refused(answer) for _ in range(20) if (answer := asker.post(NONCE_PATH))[0] != 200]
    assert words
    assert set(words) == {"rate"}
    # Whoever asks on and on does not fill the log.
    assert service.said().count("asks more often than rate allows") < len(words) / 2
    # Who goes on asking is answered at the rate, and not shut out.
    until(lambda: asker.post(NONCE_PATH)[0] == 200, 20)


SLOW = """
import time
from keymgmt.backend import Health, KeyProvider, ProviderUnavailable, Settings

class Nothing(Settings):
    pass

class Slow(KeyProvider[Nothing]):
    backend = "slow"
    Settings = Nothing
    def wrap(self, key, dek, context): raise NotImplementedError
    def check(self, key=None): return Health(())
    def unwrap(self, wrapped, context):
        time.sleep(3)
        raise ProviderUnavailable("it is slow, and then it is down")
"""


def test_a_slow_key_service_behind_the_broker_holds_up_nobody_for_long(
    make_service, client, prove, install, module_site
):
    install("acme-slow", "keymgmt.backends", {"slow": "acme_slow:Slow"}, acme_slow=SLOW)
    (module_site / "slow.toml").write_text('[providers.site]\nbackend = "slow"\n')
    service = make_service(config="slow.toml", more="concurrent = 1")
    asker = Asker(service, client(), prove)
    requests = [asker.request() for _ in range(4)]
    words: list[str] = []
    threads = [
        threading.Thread(target=lambda each=each: words.append(refused(asker.ask(each))))
        for each in requests
    ]
    for each in threads:
        each.start()
    until(lambda: len(words) == 3)
    # While one waits for the key service, the others have been told, and all else goes on.
    assert service.status() == 200
    assert words == ["busy"] * 3
    for each in threads:
        each.join()
    assert words[3:] == ["unavailable"]


@contextlib.contextmanager
def relaying(service: Any, change: Callable[[str, bytes, bytes], bytes]) -> Iterator[str]:
    """Something between client and service, which changes answers."""

    def relay(request: Seen, handler: Any) -> None:
        made = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
        with contextlib.closing(made):
            made.request("POST", request.path, request.body)
            answer = made.getresponse()
            data = change(request.path, request.body, answer.read())
        reply(handler, answer.status, data)

    with serving(relay) as web:
        yield web.url


def test_an_answer_to_somebody_else_opens_for_nobody(shared_service, client):
    answers: list[bytes] = []

    def swap(path: str, _body: bytes, answer: bytes) -> bytes:
        if path == UNWRAP_PATH:
            answers.append(answer)
            return answers[0]
        return answer

    with relaying(shared_service, swap) as address:
        provider = client(address)
        with Dek.generate() as dek:
            wrapped = provider.wrap("model", dek, b"c")
        provider.unwrap(wrapped, b"c").wipe()
        with pytest.raises(ProviderUnavailable, match="is not for this request"):
            provider.unwrap(wrapped, b"c")


def test_the_wire_shows_no_share_and_the_evidence_goes_with_one_key(shared_service, client):
    seen: list[bytes] = []

    def look(_path: str, body: bytes, answer: bytes) -> bytes:
        seen.extend((body, answer))
        return answer

    with relaying(shared_service, look) as address:
        provider = client(address)
        with Dek.generate() as dek:
            wrapped = provider.wrap("model", dek, b"c")
            provider.unwrap(wrapped, b"c").wipe()
            provider.unwrap(wrapped, b"c").wipe()
            spelled = encode_bytes(bytes(dek.view())).encode()
            assert not any(spelled in each or bytes(dek.view()) in each for each in seen)
    keys = {Request.from_bytes(body).public_key for body in seen if body[:9] == b'{"blob":"'}
    assert len(keys) == 2


def test_a_service_that_is_not_the_one_gives_no_model(
    shared_service, client, tmp_path, monkeypatch
):
    """Whoever answers instead can seal a share of its own choice, and no model opens with it."""
    import keymgmt
    from keymgmt.errors import CannotUnlock

    def lie(path: str, body: bytes, answer: bytes) -> bytes:
        if path != UNWRAP_PATH:
            return answer
        request = Request.from_bytes(body)
        with Dek.generate() as dek:
            info = answer_info(request.report_data)
            sealed = hpke_seal(request.hpke, request.public_key, dek, info)
        return dump_json({"format": ANSWER, "sealed": encode_bytes(sealed)})

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.xml").write_bytes(b"<net/>")
    settings = client(shared_service.address).settings
    recipients = {key: str(path) for key, path in settings.recipients.items()}

    def config(address: str) -> keymgmt.Config:
        table = {"backend": "broker", "service": address, "evidence": "sgx"}
        return keymgmt.Config(
            {
                "providers": {"proven": table | {"recipients": recipients}},
                "policy": {"require_signature": False},
            }
        )

    with config(shared_service.address) as keys:
        keymgmt.seal(tmp_path / "model", tmp_path / "m.sealed", to=["proven:model"], keys=keys)
        with keymgmt.open(tmp_path / "m.sealed", keys=keys) as model:
            assert model.read("model.xml") == b"<net/>"
    with (
        relaying(shared_service, lie) as address,
        config(address) as keys,
        pytest.raises(CannotUnlock),
        keymgmt.open(tmp_path / "m.sealed", keys=keys),
    ):
        pass


def test_no_request_fails_while_one_of_two_instances_is_killed(make_service, client):
    first, second = make_service(), make_service()
    provider = client(first.address, second.address)
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
    for number in range(40):
        if number == 10:
            first.kill()
        if number == 25:
            first.heal()
            second.kill()
        provider.unwrap(wrapped, b"c").wipe()


def test_a_nonce_of_one_instance_counts_at_the_other(make_service, client, prove):
    first, second = make_service(), make_service()
    asker = Asker(first, client(), prove)
    request = asker.request()
    asker.service = second
    assert asker.ask(request)[0] == 200


def test_a_changed_config_is_read_without_a_failed_request(make_service, client):
    service = make_service(workers=2)
    provider = client(service.address)
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
    ended = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        while not ended.is_set():
            try:
                provider.unwrap(wrapped, b"c").wipe()
            except WrongKey:
                pass
            except BaseException as error:  # noqa: BLE001 - reported
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()

    def gone() -> bool:
        try:
            provider.unwrap(wrapped, b"c").wipe()
        except WrongKey:
            return True
        return False

    until(lambda: workers(service))
    before = workers(service)
    service.process.send_signal(signal.SIGHUP)
    until(lambda: len(workers(service)) == 2 and not set(workers(service)) & set(before))
    assert not gone()
    # The file alone, without a signal.
    service.write(workers=2, keys='[keys.other]\nkey = "site:other"\nallow = ["press"]\n')
    until(lambda: all(gone() for _ in range(6)))
    ended.set()
    for each in threads:
        each.join()
    assert not failures, failures[:3]


def workers(service: Any) -> list[int]:
    """The workers, without multiprocessing's resource tracker."""
    return [
        pid
        for pid in service.family()[1:]
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_a_config_that_became_wrong_leaves_the_old_one_running(make_service, client, prove):
    service = make_service()
    asker = Asker(service, client(), prove)
    service.write(keys='[keys.model]\nkey = "site:model"\nallow = ["nonesuch"]\n')
    service.process.send_signal(signal.SIGHUP)
    until(lambda: "which is none of the policies" in service.said())
    assert asker.ask(asker.request())[0] == 200
    service.write()
    assert service.stop() == 0


def test_a_worker_that_dies_is_replaced(make_service, client, prove):
    service = make_service()
    asker = Asker(service, client(), prove)
    (worker,) = workers(service)
    # Data keys pass through it.
    limits = Path(f"/proc/{worker}/limits").read_text()
    assert re.search(r"Max core file size +0 ", limits)
    os.kill(worker, signal.SIGKILL)
    until(lambda: worker not in workers(service) and service.status() == 200)
    assert asker.ask(asker.request())[0] == 200


def test_logs_are_json_where_they_are_to_be(make_service, client, prove):
    service = make_service(start=False)
    service.options = ("--log-json",)
    service.start()
    asker = Asker(service, client(), prove)
    assert asker.ask(asker.request())[0] == 200
    lines = [json.loads(line) for line in service.said().splitlines()]
    assert "listening on" in lines[0]["message"]
    assert (lines[-1]["event"], lines[-1]["outcome"]) == ("broker-unwrap", "ok")


def test_wrap_needs_the_recipient_file_that_the_settings_name(shared_service, client, recipients):
    with Dek.generate() as dek:
        with pytest.raises(KeyNotFound, match="names no recipient file for the key 'third'"):
            client(shared_service.address).wrap("third", dek, b"")
        swapped = client(shared_service.address, recipients={"model": recipients["other"]})
        with pytest.raises(ProviderUnavailable, match="is of broker:other@1, not of broker:model"):
            swapped.wrap("model", dek, b"")


def test_what_the_client_is_told_of_a_refusal(shared_service, client, monkeypatch):
    provider = client(shared_service.address)
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
    with pytest.raises(AccessDenied, match="does not accept the evidence") as raised:
        client(shared_service.address, evidence={"kind": "sgx", "proves": "nothing"}).unwrap(
            wrapped, b"c"
        )
    assert raised.value.hint == "the reason is in the broker's log"
    with pytest.raises(UnwrapFailed):
        provider.unwrap(wrapped, b"another")
    with pytest.raises(WrongKey):
        provider.unwrap(replace(wrapped, key="nonesuch"), b"c")
    with pytest.raises(UnsupportedOperation, match="bytes, and a broker takes"):
        client(shared_service.address, evidence={"kind": "sgx", "proves": "too much"}).unwrap(
            wrapped, b"c"
        )


@pytest.mark.parametrize("status", [200, 301, 404, 503])
def test_a_page_of_something_else_is_no_answer(client, status):
    def page(_: Seen, handler: Any) -> None:
        reply(handler, status, b"<html>", Location="http://127.0.0.1:1/")

    with serving(page) as web, Dek.generate() as dek:
        provider = client(web.url)
        wrapped = provider.wrap("model", dek, b"c")
        with pytest.raises(ProviderUnavailable, match="this is no answer of a key broker"):
            provider.unwrap(wrapped, b"c")
