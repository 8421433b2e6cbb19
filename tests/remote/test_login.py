"""Logins: a registry that wants one, a server of real tokens, and docker's ways to keep them."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from loopback import Authority
from registry import RegistryServer
from webserver import Seen, Serve, Web, reply

from keymgmt._config.config import Config
from keymgmt._remote.artifact import blob_of
from keymgmt._remote.location import Location
from keymgmt._remote.registry import Registry
from keymgmt.errors import ConfigError, KeymgmtError, ProviderUnavailable, StorageDenied

pytestmark = pytest.mark.once
PASSWORD = "27182818"
# htpasswd -nbB me 27182818
USERS = "me:$2b$05$abcdefghijklmnopqrstuu0GDhat5MLhQKpV4OowbtCI5jUAuoKNG\n"
BASIC = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
CONTENT = b"what is kept there"


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".docker").mkdir(parents=True)


@pytest.fixture(scope="session")
def guarded(start_registry, tmp_path_factory) -> RegistryServer:
    """A registry that asks for a password."""
    users = tmp_path_factory.mktemp("users") / "htpasswd"
    users.write_text(USERS)
    return start_registry(f"auth:\n  htpasswd:\n    realm: test\n    path: {users}\n")


@pytest.fixture
def password(tmp_path) -> dict[str, str]:
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text(PASSWORD)
    return {"file": str(file)}


def reach(server: Any, *, push: bool = True, **access: Any) -> Registry:
    host = server.host if isinstance(server, RegistryServer) else urlsplit(server.url).netloc
    table = {"ca_file": getattr(server, "ca_file", None), **access}
    remote = {"deadline": 60, "access": {f"oci://{host}": {k: v for k, v in table.items() if v}}}
    data = {"remote": json.loads(json.dumps(remote, default=str))}
    place = Location.parse(f"oci://{host}/models/{secrets.token_hex(4)}:1")
    return Registry(place, Config(data).remote, push=push)


def works(registry: Registry) -> None:
    """Something is put there, and read back."""
    blob = blob_of(CONTENT)
    registry.put(blob, lambda: io.BytesIO(CONTENT))
    assert registry.read(blob, 100, "it") == CONTENT


def write_docker(tmp_path: Path, **config: Any) -> Path:
    file = tmp_path / "home" / ".docker" / "config.json"
    file.touch(mode=0o600)
    file.write_text(json.dumps(config))
    return file


def test_a_password_opens_it(guarded, password):
    works(reach(guarded, user="me", secret=password))


def test_without_one_it_says_who_asks(guarded):
    with pytest.raises(StorageDenied, match="asks for a login") as refused:
        reach(guarded).digest()
    assert guarded.host in str(refused.value.hint)


def test_a_wrong_one_is_refused_and_not_told(guarded, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "wrong"
    file.touch(mode=0o600)
    file.write_text("31415926")
    with pytest.raises(StorageDenied, match="says 401") as refused:
        reach(guarded, user="me", secret={"file": str(file)}).digest()
    told: BaseException | None = refused.value
    while told is not None:
        assert "31415926" not in f"{told!r}{getattr(told, 'hint', '')}"
        told = told.__cause__ or told.__context__
    basic = base64.b64encode(b"me:31415926").decode()
    assert not [text for text in caplog.messages if "31415926" in text or basic in text]


def test_a_secret_that_is_missing_is_said(guarded):
    with pytest.raises(ProviderUnavailable, match="NOT_SET"):
        reach(guarded, user="me", secret={"env": "NOT_SET"}).digest()


def test_half_a_login_is_refused():
    with pytest.raises(ConfigError, match="both user and secret"):
        Config({"remote": {"access": {"oci://a.example": {"user": "me"}}}})


def test_dockers_login_is_for_who_allows_it(guarded, tmp_path):
    kept = {guarded.host: {"auth": base64.b64encode(f"me:{PASSWORD}".encode()).decode()}}
    write_docker(tmp_path, auths=kept)
    with pytest.raises(StorageDenied, match="asks for a login"):
        reach(guarded).digest()
    works(reach(guarded, auth="docker"))
    # As old versions of docker wrote it, and elsewhere.
    other = tmp_path / "auth.json"
    other.touch(mode=0o600)
    other.write_text(json.dumps({"auths": {f"https://{guarded.host}/v1/": kept[guarded.host]}}))
    works(reach(guarded, auth="docker", docker_config=other))


@pytest.mark.parametrize("key", ["credHelpers", "credsStore"])
def test_dockers_helper_is_asked(guarded, tmp_path, monkeypatch, key):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    helper = tmp_path / "docker-credential-vault"
    answer = json.dumps({"ServerURL": "", "Username": "me", "Secret": PASSWORD})
    helper.write_text(f"#!/bin/sh\nread host\n[ $1 = get ] && echo $host > {tmp_path}/asked\n")
    with helper.open("a") as script:
        script.write(f"echo '{answer}'\n")
    helper.chmod(0o755)
    write_docker(tmp_path, **{key: {guarded.host: "vault"} if key == "credHelpers" else "vault"})
    works(reach(guarded, auth="docker"))
    assert (tmp_path / "asked").read_text() == f"{guarded.host}\n"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo credentials not found in native keychain; exit 1", "asks for a login"),
        (f"echo {PASSWORD}; exit 3", "exit code 3"),
        (f"echo {PASSWORD}", "that can be read"),
        (None, "not installed"),
    ],
)
def test_a_helper_that_fails_is_named_and_what_it_said_is_not(
    guarded, tmp_path, monkeypatch, script, said
):
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if script is not None:
        helper = tmp_path / "docker-credential-vault"
        helper.write_text(f"#!/bin/sh\n{script}\n")
        helper.chmod(0o755)
    write_docker(tmp_path, credsStore="vault")
    with pytest.raises(StorageDenied, match=said) as refused:
        reach(guarded, auth="docker").digest()
    assert refused.value.hint
    assert PASSWORD not in f"{refused.value!r}"


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        '{"auths": 3}',
        '{"auths": {"HOST": 3}}',
        '{"auths": {"HOST": {"auth": "%%%"}}}',
        '{"auths": {"HOST": {"auth": "MjcxODI4MTg="}}}',
        '{"credsStore": "../../evil"}',
    ],
)
def test_a_docker_config_that_cannot_be_read_is_named(guarded, tmp_path, content):
    write_docker(tmp_path).write_text(content.replace("HOST", guarded.host))
    with pytest.raises(StorageDenied) as refused:
        reach(guarded, auth="docker").digest()
    assert refused.value.hint
    assert PASSWORD not in f"{refused.value!r}"


def test_a_docker_config_that_others_read_is_refused(guarded, tmp_path):
    with pytest.raises(StorageDenied, match="docker config"):
        reach(guarded, auth="docker").digest()
    write_docker(tmp_path).chmod(0o644)
    with pytest.raises(StorageDenied, match="others"):
        reach(guarded, auth="docker").digest()


def test_a_relative_home_has_no_docker_config(guarded, tmp_path, monkeypatch):
    write_docker(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", ".")
    with pytest.raises(StorageDenied, match="no home directory"):
        reach(guarded, auth="docker").digest()


class Tokens:
    """A server of tokens that a real registry accepts: JWT, ES256, with its certificate."""

    def __init__(self, authority: Authority, serve: Serve, *, tls: bool = True) -> None:
        certificate, key = authority.issue("tokens")
        loaded: Any = serialization.load_pem_private_key(key.read_bytes(), None)
        self._key: ec.EllipticCurvePrivateKey = loaded
        lines = certificate.read_text().strip().splitlines()[1:-1]
        self._chain = ["".join(lines)]
        self.refresh = ""
        self.web: Web = serve(self.answer, tls=tls)

    def answer(self, request: Seen, handler: Any) -> None:
        asked = parse_qs(urlsplit(request.path).query or request.body.decode())
        if request.method == "POST":
            allowed = asked.get("refresh_token") == [self.refresh]
        else:
            allowed = request.headers.get("authorization") == BASIC
        if not allowed:
            reply(handler, 401)
            return
        token = self._token(asked["service"][0], asked["scope"][0])
        name = "access_token" if request.method == "POST" else "token"
        reply(handler, 200, json.dumps({name: token, "expires_in": 60}).encode())

    def _token(self, service: str, scope: str) -> str:
        kind, name, actions = scope.split(":")
        now = int(time.time())
        claims = {"iss": "tokens", "sub": "me", "aud": service, "jti": secrets.token_hex(8)}
        claims |= {"exp": now + 60, "nbf": now - 5, "iat": now}
        claims["access"] = [{"type": kind, "name": name, "actions": actions.split(",")}]
        head = {"typ": "JWT", "alg": "ES256", "x5c": self._chain}
        text = b".".join(_base64(json.dumps(part).encode()) for part in (head, claims))
        r, s = utils.decode_dss_signature(self._key.sign(text, ec.ECDSA(hashes.SHA256())))
        return (text + b"." + _base64(r.to_bytes(32) + s.to_bytes(32))).decode()


def _base64(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")


@pytest.fixture
def tokens(authority, serve) -> Tokens:
    return Tokens(authority, serve)


@pytest.fixture
def with_tokens(tokens, authority, start_registry) -> RegistryServer:
    """A registry that believes these tokens."""
    return start_registry(
        f"auth:\n  token:\n    realm: {tokens.web.url}/token\n    service: registry\n"
        f"    issuer: tokens\n    rootcertbundle: {authority.ca_file}\n"
    )


def test_a_token_opens_it(with_tokens, tokens, password, tmp_path):
    realm = urlsplit(tokens.web.url).netloc
    works(reach(with_tokens, user="me", secret=password, token_server=realm))
    asked = parse_qs(urlsplit(tokens.web.seen[0].path).query)
    assert asked["scope"][0].endswith(":pull,push")
    # To read, no more than that is asked for.
    assert reach(with_tokens, push=False, user="me", secret=password, token_server=realm)
    tokens.refresh = "31415926"
    kept = {"identitytoken": tokens.refresh, "auth": ""}
    write_docker(tmp_path, auths={with_tokens.host: kept})
    works(reach(with_tokens, auth="docker", token_server=realm))


def test_who_may_only_read_asks_for_no_more(with_tokens, tokens, password):
    realm = urlsplit(tokens.web.url).netloc
    registry = reach(with_tokens, push=False, user="me", secret=password, token_server=realm)
    assert registry.digest() is None
    assert parse_qs(urlsplit(tokens.web.seen[0].path).query)["scope"][0].endswith(":pull")
    with pytest.raises(StorageDenied):
        registry.put(blob_of(CONTENT), lambda: io.BytesIO(CONTENT))


def test_a_server_of_tokens_that_nobody_named_gets_no_login(with_tokens, tokens, password):
    with pytest.raises(StorageDenied, match="whom the config does not name") as refused:
        reach(with_tokens, user="me", secret=password).digest()
    assert "token_server" in str(refused.value.hint)
    assert not tokens.web.seen


@pytest.mark.parametrize(
    "challenge",
    [
        'Bearer realm="http://127.0.0.1:1/token"',
        'Bearer realm="https://registry.example@evil.example/token"',
        r'Bearer realm="https://evil.example\@registry.example/token"',
        'Bearer realm="https://[/"',
        'Bearer realm="file:///etc/passwd"',
        "Bearer",
        'Negotiate realm="x"',
        "",
    ],
)
def test_another_challenge_is_refused(serve, authority, password, challenge):
    web = serve(lambda _, handler: reply(handler, 401, WWW_Authenticate=challenge), tls=True)
    with pytest.raises(StorageDenied) as refused:
        reach(web, ca_file=authority.ca_file, user="me", secret=password).digest()
    assert refused.value.hint


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"token": 3}', b'{"token": "a\\r\\nX: y"}', b'{"token": ""}']
)
def test_what_is_no_token_is_refused(serve, authority, password, body):
    def answer(request: Seen, handler: Any) -> None:
        if request.path.startswith("/token"):
            reply(handler, 200, body)
        else:
            reply(handler, 401, WWW_Authenticate=f'Bearer realm="{web.url}/token",service="a"')

    web = serve(answer, tls=True)
    with pytest.raises(KeymgmtError, match="gave no token"):
        reach(web, ca_file=authority.ca_file, user="me", secret=password).digest()


@pytest.mark.parametrize("realm", ["http://tokens.example/", r"http://tokens.example\@{}/"])
def test_a_token_over_plain_http_is_for_this_machine(serve, password, realm):
    def answer(_: Seen, handler: Any) -> None:
        challenge = f'Bearer realm="{realm.format(urlsplit(web.url).netloc)}"'
        reply(handler, 401, WWW_Authenticate=challenge)

    web = serve(answer)
    access = {"plain_http": True, "user": "me", "secret": password}
    with pytest.raises(StorageDenied, match="for a token"):
        reach(web, token_server="tokens.example:80", **access).digest()


def test_plain_http_is_for_this_machine(serve, password):
    def answer(request: Seen, handler: Any) -> None:
        if request.headers.get("authorization") == BASIC:
            reply(handler, 404)
        else:
            reply(handler, 401, WWW_Authenticate='Basic realm="x"')

    web = serve(answer)
    assert reach(web, plain_http=True, user="me", secret=password).digest() is None
