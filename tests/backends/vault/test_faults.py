"""Bad input and bad days, each with its typed error and its way out."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bits import flipped
from vaults import ONE_TRY

from keymgmt import Config
from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    Dek,
    KeyNotFound,
    KeyRetired,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)

DECRYPT_ONLY = 'path "transit/decrypt/model" { capabilities = ["update"] }'


class Rogue:
    """A plain HTTP server on loopback whose answers are what a test says, byte by byte."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.answer: Callable[[socket.socket], None] = lambda connection: None
        self.seen: list[bytes] = []
        self.closed = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection:
            self.seen.append(connection.recv(65536))
            with contextlib.suppress(OSError):
                self.answer(connection)

    def says(self, status: str, body: bytes = b"", *headers: str) -> None:
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
        data = "\r\n".join(head).encode() + b"\r\n\r\n" + body
        self.answer = lambda connection: connection.sendall(data)


@pytest.fixture
def rogue() -> Iterator[Callable[[], Rogue]]:
    made: list[Rogue] = []

    def make() -> Rogue:
        made.append(Rogue())
        return made[-1]

    yield make
    for one in made:
        one.closed.set()
        one.listener.close()


# Where it is.


def test_wrong_address(make, bao, wrapped, free_port):
    address = f"https://127.0.0.1:{free_port}"
    with pytest.raises(ProviderUnavailable, match="no connection") as caught:
        make(bao, address=address, timeout=ONE_TRY).unwrap(wrapped, b"c")
    assert address in str(caught.value)
    assert "runs" in str(caught.value.hint)


def test_unknown_name_is_not_tried_for_long(make, bao, wrapped):
    provider = make(bao, address="https://no-such-host.invalid:8200", timeout=60.0)
    with pytest.raises(ProviderUnavailable, match="name cannot be resolved"):
        provider.unwrap(wrapped, b"c")


def test_wrong_authority(make, bao, other_authority, wrapped):
    provider = make(bao, ca_file=str(other_authority.ca_file), timeout=60.0)
    with pytest.raises(ProviderUnavailable, match="its certificate is refused") as caught:
        provider.unwrap(wrapped, b"c")
    assert "ca_file" in str(caught.value.hint)


def test_the_public_authorities_do_not_vouch(make, bao, wrapped):
    with pytest.raises(ProviderUnavailable, match="its certificate is refused"):
        make(bao, ca_file=None).unwrap(wrapped, b"c")


def test_expired_certificate(make, new_bao, wrapped, bao):
    expired = new_bao(init=False, days=-1, listens=False)
    provider = make(expired, token=bao.root)
    with pytest.raises(ProviderUnavailable, match="certificate has expired"):
        provider.unwrap(wrapped, b"c")
    assert "renew" in str(provider.check().findings[0].hint)


def test_certificate_of_another_host(make, bao, wrapped):
    with pytest.raises(ProviderUnavailable, match="refused"):
        make(bao, server_name="other.example").unwrap(wrapped, b"c")
    with make(bao, server_name="vault.example").unwrap(wrapped, b"c") as dek:
        assert bytes(dek.view()) == bytes(32)


def test_no_tls_where_it_should_be(make, bao, rogue, wrapped):
    plain = rogue()
    plain.says("200 OK", b"{}")
    address = plain.address.replace("http:", "https:")
    with pytest.raises(ProviderUnavailable, match="no TLS"):
        make(bao, address=address).unwrap(wrapped, b"c")
    assert not any(bao.root.encode() in data for data in plain.seen)


def test_missing_authority_file(make, bao, tmp_path, wrapped):
    with pytest.raises(ProviderUnavailable, match="cannot read the ca_file"):
        make(bao, ca_file=str(tmp_path / "absent.pem")).unwrap(wrapped, b"c")
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(ProviderUnavailable, match="no certificate in PEM"):
        make(bao, ca_file=str(tmp_path / "junk.pem")).unwrap(wrapped, b"c")
    assert not make(bao, ca_file=str(tmp_path / "junk.pem")).check().ok


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"address": "http://vault.example:8200"}, "not protected"),
        ({"address": "http://127.0.0.1.example:8200"}, "not protected"),
        ({"address": "https://user:secret-word@vault.example"}, "no user name"),
        ({"address": "https://vault.example/v1/"}, "leave it out"),
        ({"address": "https://vault.example/a/../b"}, "has a path with other than"),
        ({"keys_prefix": "../x"}, "no key name can begin"),
        ({"address": "https://vault.example?x=1"}, "more than scheme"),
        ({"address": "ftp://vault.example"}, "not an address"),
        ({"address": "https://vault.example:99999"}, "not an address"),
        ({"address": "unix:relative.sock"}, "not a socket"),
        ({"address": []}, "1 to 16"),
        ({"address": ["https://a.example", "https://a.example:443"]}, "twice"),
        ({"mount": "../auth/token"}, "not a path"),
        ({"mount": "transit/../sys"}, "not a path"),
        ({"mount": "a?b"}, "not a path"),
        ({"namespace": "a/../b"}, "not a path"),
        ({"auth": {"method": "approle", "role_id": {"env": "X"}, "mount": "../x"}}, "not a path"),
        ({"auth": {"method": "cert"}}, "client_cert"),
        ({"auth": {"method": "agent"}}, "not an agent of this machine"),
        ({"auth": {"method": "token", "token": "s.secret-word"}}, "not written here"),
        ({"client_cert": "x.pem"}, "go together"),
        ({"keys": {"model": {"name": "../../sys/seal"}}}, "not a possible name in Transit"),
        ({"keys": {"model": {"mechanisms": ["rot13"]}}}, "no mechanism"),
        ({"keys": {"../x": {}}}, "not a key name"),
        ({"timeout": 0}, "timeout: not above 0"),
        ({"address": ["https://a.example", 3]}, "[providers.site] address: not a text"),
        (
            {"auth": {"method": "token", "tokn": {"env": "X"}}},
            "[providers.site.auth] tokn: unknown",
        ),
        ({"auth": {"method": "approl"}}, "unknown 'method' 'approl'"),
        ({"auth": {"token": {"env": "X"}}}, "[providers.site] auth: 'method' is missing"),
        ({"auth": {"method": "token", "token": {"envy": "X"}}}, "[providers.site.auth.token] envy"),
        ({"keys": {"model": {"nmae": "x"}}}, "[providers.site.keys.model] nmae: unknown key"),
    ],
)
def test_settings_that_are_refused(settings, says, tmp_path):
    table = {
        "backend": "vault",
        "address": "https://vault.example:8200",
        "auth": {"method": "token", "token": {"env": "TOKEN"}},
    }
    config = Config({"providers": {"site": table | settings}})
    with pytest.raises(ConfigError) as caught:
        config.provider("site")
    assert says in str(caught.value)
    assert "providers.site" in str(caught.value)
    assert "secret-word" not in f"{caught.value} {caught.value.hint}"


def test_loopback_by_name_and_by_socket(make, bao, wrapped):
    for address in (f"https://localhost:{bao.port}", f"unix:{bao.socket}"):
        with make(bao, address=address).unwrap(wrapped, b"c") as dek:
            assert bytes(dek.view()) == bytes(32)
    with pytest.raises(ProviderUnavailable, match="No such file"):
        make(bao, address=f"unix:{bao.socket}.absent", timeout=ONE_TRY).unwrap(wrapped, b"c")


def test_the_environment_changes_nothing(
    make, bao, rogue, other_authority, wrapped, monkeypatch, tmp_path
):
    trap = rogue()
    for name in ("VAULT_ADDR", "BAO_ADDR", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, trap.address)
    for name in ("VAULT_CACERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, str(other_authority.ca_file))
    monkeypatch.setenv("VAULT_TOKEN", "s.wrong")
    monkeypatch.setenv("VAULT_NAMESPACE", "wrong")
    monkeypatch.setenv("VAULT_SKIP_VERIFY", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keylog"))
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login x password y\n")
    with make(bao).unwrap(wrapped, b"c") as dek:
        assert bytes(dek.view()) == bytes(32)
    assert trap.seen == []
    assert not (tmp_path / "keylog").exists()
    monkeypatch.setenv("SSL_CERT_FILE", str(bao.authority.ca_file))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bao.authority.ca_file))
    with pytest.raises(ProviderUnavailable, match="certificate is refused"):
        make(bao, ca_file=str(other_authority.ca_file)).unwrap(wrapped, b"c")


# What answers.


@pytest.mark.once
def test_redirects_are_not_followed(make, bao, rogue, wrapped):
    elsewhere, first = rogue(), rogue()
    elsewhere.says("200 OK", b'{"data": {"plaintext": "x"}}')
    for status in ("301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"):
        first.says(status, b"", f"Location: {elsewhere.address}/v1/transit/decrypt/model")
        with pytest.raises(ProviderUnavailable, match="redirects") as caught:
            make(address=first.address, token=bao.root, timeout=ONE_TRY).unwrap(wrapped, b"c")
        assert "never followed" in str(caught.value.hint)
    assert elsewhere.seen == []
    assert any(bao.root.encode() in data for data in first.seen)


@pytest.mark.parametrize("sized", [True, False])
def test_oversized_answer(make, rogue, wrapped, sized):
    server = rogue()
    length = b"Content-Length: 99999999999\r\n" if sized else b""
    sent = 0

    def flood(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n")
        while True:
            sent += connection.send(b" " * 65536)

    server.answer = flood
    with pytest.raises(ProviderUnavailable, match="more than 4194304 bytes"):
        make(address=server.address, token="s.token", timeout=ONE_TRY).unwrap(wrapped, b"c")
    assert sent < 200 << 20


def test_oversized_header(make, rogue, wrapped):
    server = rogue()

    def flood(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            connection.send(b"x" * 65536)

    server.answer = flood
    with pytest.raises(ProviderUnavailable, match="broke"):
        make(address=server.address, token="s.token", timeout=ONE_TRY).unwrap(wrapped, b"c")


@pytest.mark.parametrize("where", ["nothing", "head", "body"])
def test_a_server_that_never_ends_its_answer(make, rogue, wrapped, where):
    """Not even one that sends a byte now and then holds a call beyond its limit."""
    server = rogue()

    def drip(connection: socket.socket) -> None:
        if where == "head":
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        if where == "body":
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        while not server.closed.wait(0.1):
            if where != "nothing":
                connection.sendall(b"x")

    server.answer = drip
    begun = time.monotonic()
    with pytest.raises(ProviderUnavailable, match="no answer in"):
        make(address=server.address, token="s.token", timeout=1.5, call_timeout=0.7).unwrap(
            wrapped, b"c"
        )
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n{",
        b"junk\r\n\r\n",
        b"\x15\x03\x03\x00\x02\x02\x46",
    ],
)
def test_a_server_that_dies_in_its_answer(make, bao, rogue, wrapped, data):
    server = rogue()
    server.answer = lambda connection: connection.sendall(data)
    with pytest.raises(ProviderUnavailable, match="broke"):
        make(address=server.address, token="s.token", timeout=ONE_TRY).unwrap(wrapped, b"c")
    # Beside a node that is well it is passed over.
    with make(bao, address=[server.address, bao.address]).unwrap(wrapped, b"c") as dek:
        assert bytes(dek.view()) == bytes(32)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", ProviderUnavailable),
        (b"<html>", ProviderUnavailable),
        (b"[" * 100_000, ProviderUnavailable),
        (b"\xff\xfe\x00", ProviderUnavailable),
        (b"[]", ProviderUnavailable),
        (b"{}", ProviderUnavailable),
        (b'{"data": []}', ProviderUnavailable),
        (b'{"data": {"plaintext": 5}}', ProviderUnavailable),
        (b'{"data": {"type": ["x"], "keys": {}}, "warnings": 5}', ProviderUnavailable),
        (b'{"data": {"type": "ed25519", "keys": {}, "latest_version": "1"}}', ProviderUnavailable),
        (b'{"data": {"plaintext": "!!"}}', ProviderUnavailable),
        (b'{"data": {"plaintext": "AAAA"}}', UnwrapFailed),
    ],
)
def test_an_answer_that_is_none(make, rogue, wrapped, body, error):
    server = rogue()
    server.says("200 OK", body)
    provider = make(address=server.address, token="s.token", timeout=0.5)
    with pytest.raises(error):
        provider.unwrap(wrapped, b"c")
    with Dek.generate() as dek, pytest.raises((ProviderUnavailable, UnsupportedOperation)):
        provider.wrap("model", dek, b"c")
    assert not provider.check("model").ok


@pytest.mark.once
@pytest.mark.parametrize("text", ["vault:v1:" + "A" * 70_000, "\ud800", "vault:v1:\u00e9AAA", "x"])
def test_a_ciphertext_that_is_none(make, bao, gateway, text):
    """A blob has room for 8192 bytes of it."""
    before = gateway()
    # The second item is the proof that the server binds contexts, which it must refuse.
    results = [{"ciphertext": text}, {"error": "no base64"}]
    answer = json.dumps({"data": {"batch_results": results}}).encode()
    before.before = lambda method, path, _: (200, {}, answer) if "/encrypt/" in path else None
    with Dek.generate() as dek, pytest.raises(ProviderUnavailable, match="the server's answer"):
        make(address=before.address, token=bao.root).wrap("model", dek, b"c")


def test_words_of_the_server_are_shown_short_and_plain(make, rogue, wrapped):
    server = rogue()
    server.says("400 Bad", json.dumps({"errors": ["\x1b[31mred\n" + "x" * 5000]}).encode())
    with pytest.raises(Exception, match="red") as caught:
        make(address=server.address, token="s.token", timeout=ONE_TRY).unwrap(wrapped, b"c")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 600


# What is asked.


def test_missing_mount(make, bao, wrapped):
    provider = make(bao, mount="absent")
    with pytest.raises(ProviderUnavailable, match="no Transit engine") as caught:
        provider.unwrap(wrapped, b"c")
    assert "bao secrets enable -path=absent transit" in str(caught.value.hint)
    with Dek.generate() as dek, pytest.raises(ProviderUnavailable, match="no Transit engine"):
        provider.wrap("model", dek, b"c")
    with pytest.raises(ProviderUnavailable, match="no Transit engine"):
        provider.list_keys()


def test_missing_key_is_not_made(make, bao, wrapped):
    provider = make(bao)
    with Dek.generate() as dek, pytest.raises(KeyNotFound, match="no Transit key transit/modle"):
        provider.wrap("modle", dek, b"c")
    assert bao.api("GET", "transit/keys/modle")[0] == 404
    with pytest.raises(WrongKey):
        provider.unwrap(replace(wrapped, key="modle"), b"c")


def test_the_server_would_make_a_missing_key(bao):
    """The trap that the test above is about is there."""
    bao.do("POST", "transit/encrypt/made-by-mistake", {"plaintext": "AAAA"})
    assert bao.api("GET", "transit/keys/made-by-mistake")[0] == 200


def test_denied_policy_names_the_path(make, bao, wrapped):
    provider = make(bao, token=bao.token(DECRYPT_ONLY))
    with provider.unwrap(wrapped, b"c") as dek:
        with pytest.raises(AccessDenied, match="read on transit/keys/model"):
            provider.wrap("model", dek, b"c")
        with pytest.raises(AccessDenied, match="update on transit/decrypt/other") as caught:
            provider.unwrap(replace(wrapped, key="other"), b"c")
    assert 'path "transit/decrypt/other" { capabilities = ["update"] }' in str(caught.value.hint)


def test_an_expired_token_is_no_policy(make, bao, wrapped, secret_file):
    token = bao.token(DECRYPT_ONLY)
    place = secret_file(token)
    provider = make(bao, auth={"method": "token", "token": place})
    provider.unwrap(wrapped, b"c").wipe()
    bao.do("POST", "auth/token/revoke", {"token": token})
    with pytest.raises(AccessDenied, match="expired") as caught:
        provider.unwrap(wrapped, b"c")
    assert "replace it" in str(caught.value.hint)
    Path(place["file"]).write_text("s.another-that-is-not-good")
    with pytest.raises(AccessDenied, match="expired"):
        provider.unwrap(wrapped, b"c")
    Path(place["file"]).write_text(bao.token(DECRYPT_ONLY))
    provider.unwrap(wrapped, b"c").wipe()


def test_a_token_without_the_default_policy(make, bao, wrapped):
    """It may not look itself up, and is still not taken for an expired one."""
    provider = make(bao, token=bao.token(DECRYPT_ONLY, no_default_policy=True))
    provider.unwrap(wrapped, b"c").wipe()
    with pytest.raises(AccessDenied, match="does not allow update"):
        provider.unwrap(replace(wrapped, key="other"), b"c")
    assert provider.check("model").ok


def test_bad_token_and_bad_secret_id(make, bao, wrapped, secret_file):
    with pytest.raises(AccessDenied, match="expired"):
        make(bao, token="s.wrong-and-secret").unwrap(wrapped, b"c")
    role_id, _ = bao.approle(DECRYPT_ONLY, "bad-secret")
    auth = {
        "method": "approle",
        "role_id": secret_file(role_id),
        "secret_id": secret_file("wrong-and-secret"),
    }
    with pytest.raises(AccessDenied, match="login by approle was refused") as caught:
        make(bao, auth=auth).unwrap(wrapped, b"c")
    assert "secret_id" in str(caught.value.hint)
    assert "wrong-and-secret" not in f"{caught.value} {caught.value.__cause__}"
    with pytest.raises(AccessDenied):
        make(bao, auth=auth | {"mount": "absent"}).unwrap(wrapped, b"c")


def test_secrets_that_others_can_read(make, bao, tmp_path):
    (tmp_path / "token").write_text(bao.root)
    (tmp_path / "token").chmod(0o644)
    provider = make(bao, auth={"method": "token", "token": {"file": str(tmp_path / "token")}})
    with pytest.raises(ProviderUnavailable, match="refused"):
        provider.list_keys()
    assert not provider.check().ok


def test_wrong_context_and_every_flipped_byte(make, bao, wrapped):
    provider = make(bao)
    with pytest.raises(UnwrapFailed, match="another context"):
        provider.unwrap(wrapped, b"d")
    with pytest.raises(UnwrapFailed):
        provider.unwrap(wrapped, b"")
    for index in range(len(wrapped.blob)):
        for mask in (1, 0x80):
            with pytest.raises((UnwrapFailed, WrongKey)):
                provider.unwrap(replace(wrapped, blob=flipped(wrapped.blob, index, mask)), b"c")
    provider.unwrap(wrapped, b"c").wipe()


def test_mechanisms_are_allow_listed(make, bao, wrapped):
    provider = make(bao, keys={"model": {"mechanisms": ["chacha20-poly1305"]}})
    with pytest.raises(UnsupportedOperation, match="does not allow") as caught:
        provider.unwrap(wrapped, b"c")
    assert "providers.site.keys.model" in str(caught.value.hint)
    with pytest.raises(UnsupportedOperation, match="unknown mechanism"):
        make(bao).unwrap(replace(wrapped, mechanism="none"), b"c")
    # A blob that claims to be of another mechanism than it is fails like a damaged one.
    with pytest.raises(UnwrapFailed):
        make(bao).unwrap(replace(wrapped, mechanism="RSA-OAEP-256"), b"c")


def test_hostile_names_reach_no_url(make, bao, wrapped):
    token = bao.token('path "*" { capabilities = ["create", "read", "update", "delete", "list"] }')
    provider = make(bao, token=token)
    for name in ("../../auth/token/revoke-self", "../../sys/tools/random", "a/../../sys/seal"):
        object.__setattr__(wrapped, "key", name)
        try:
            with pytest.raises(WrongKey):
                provider.unwrap(wrapped, b"c")
            assert isinstance(provider.unwrap_batch([(wrapped, b"c")])[0], WrongKey)
            for call in (provider.describe_key, provider.rotate_key, provider.public_key):
                with pytest.raises(ConfigError):
                    call(name)
        finally:
            object.__setattr__(wrapped, "key", "model")
    provider.unwrap(wrapped, b"c").wipe()
    assert bao.api("GET", "auth/token/lookup-self", token=token)[0] == 200


# What happens to it.


def test_sealed_server(make, new_bao):
    bao = new_bao()
    bao.transit("transit", "model")
    provider = make(bao, timeout=ONE_TRY)
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
        bao.do("PUT", "sys/seal")
        with pytest.raises(ProviderUnavailable, match="sealed") as caught:
            provider.unwrap(wrapped, b"c")
        assert "operator unseal" in str(caught.value.hint)
        finding = provider.check("model").findings[0]
        assert (finding.status, finding.detail) == ("failed", "it is sealed")
        bao.unseal()
        bao.wait_active()
        assert provider.unwrap(wrapped, b"c") == dek


def test_restart_between_wrap_and_unwrap(make, new_bao):
    bao = new_bao(storage="raft")
    bao.transit("transit", "model")
    provider = make(bao, timeout=20.0)
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
        bao.kill()
        bao.start()
        bao.unseal()
        # Not waited for: the provider does that itself.
        assert provider.unwrap(wrapped, b"c") == dek
        assert make(bao).unwrap(wrapped, b"c") == dek


def test_a_key_that_may_not_be_deleted_stays_protected(make, bao):
    policy = """
    path "transit/keys/kept" { capabilities = ["create", "read", "update"] }
    path "transit/keys/kept/config" { capabilities = ["update"] }
    """
    with make(bao, token=bao.token(policy)) as provider:
        provider.create_key("kept", "aes256-gcm96", {})
        with pytest.raises(AccessDenied, match="delete on transit/keys/kept"):
            provider.delete_key("kept")
        assert "deletion" not in provider.describe_key("kept").detail


def test_a_retired_version(make, bao):
    provider = make(bao)
    provider.create_key("retiring", "aes256-gcm96", {})
    with Dek.generate() as dek:
        wrapped = provider.wrap("retiring", dek, b"c")
        provider.rotate_key("retiring")
        provider.rotate_key("retiring")
        with pytest.raises(ConfigError, match="before it too") as caught:
            provider.retire_version("retiring", "2")
        assert "retire 1 first" in str(caught.value.hint)
        info = provider.retire_version("retiring", "1")
        assert [version.state for version in info.versions] == ["retired", "old", "active"]
        with pytest.raises(KeyRetired):
            provider.unwrap(wrapped, b"c")


def test_a_soft_deleted_key(make, bao):
    provider = make(bao)
    provider.create_key("dropped", "aes256-gcm96", {})
    with Dek.generate() as dek:
        wrapped = provider.wrap("dropped", dek, b"c")
        bao.do("DELETE", "transit/keys/dropped/soft-delete")
        for call in (
            lambda: provider.wrap("dropped", dek, b"c"),
            lambda: provider.unwrap(wrapped, b"c"),
            lambda: provider.rotate_key("dropped"),
        ):
            with pytest.raises(KeyRetired, match="soft-deleted") as caught:
                call()
            hint = str(caught.value.hint)
            assert hint == "bao write -f transit/keys/dropped/soft-delete-restore"
        assert provider.describe_key("dropped").versions[0].state == "retired"
        bao.do("POST", "transit/keys/dropped/soft-delete-restore", {})
        assert provider.unwrap(wrapped, b"c") == dek


def test_a_rate_limit_is_waited_for(make, bao):
    bao.transit("limited", "model")
    provider = make(bao, mount="limited", timeout=20.0)
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
        bao.do("POST", "sys/quotas/rate-limit/t", {"path": "limited/", "rate": 2, "interval": "1s"})
        for _ in range(6):
            assert provider.unwrap(wrapped, b"c") == dek
        hasty = make(bao, mount="limited", timeout=0.2)

        def hurry() -> None:
            for _ in range(20):
                hasty.unwrap(wrapped, b"c").wipe()

        with pytest.raises(ProviderUnavailable, match="rate limit"):
            hurry()


@pytest.mark.filterwarnings("ignore:This process")
def test_a_fork_and_its_parent_do_not_share_a_connection(make, bao, wrapped):
    provider = make(bao)
    provider.unwrap(wrapped, b"c").wipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for _ in range(50):
                provider.unwrap(wrapped, b"c").wipe()
            code = 0
        finally:
            os._exit(code)
    for _ in range(50):
        provider.unwrap(wrapped, b"c").wipe()
    assert os.waitpid(child, 0)[1] == 0
