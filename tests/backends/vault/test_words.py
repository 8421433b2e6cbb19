"""What an answer means is read from its words and not from its status; no secret is in an error."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from keymgmt_vault._keys import Described
from vaults import JSON, ONE_TRY, UNWRAP, errors, opens

from keymgmt.backend import (
    AccessDenied,
    Dek,
    KeyInfo,
    KeymgmtError,
    ProviderError,
    ProviderUnavailable,
)

HTML = {"Content-Type": "text/html"}


@pytest.mark.parametrize(
    ("status", "headers", "body", "says", "hint"),
    [
        (
            502,
            HTML,
            b"<html>Bad Gateway</html>",
            "a proxy answered in place of Vault",
            "behind the proxy",
        ),
        (
            503,
            HTML,
            b"<html>no backend</html>",
            "a proxy answered in place of Vault",
            "behind the proxy",
        ),
        (404, HTML, b"<html>default backend - 404</html>", "another service than Vault", "gateway"),
        (404, {}, b"404 page not found\n", "another service than Vault", "address"),
        (
            403,
            HTML,
            b"<html>Forbidden by the firewall</html>",
            "another service than Vault",
            "gateway",
        ),
        (400, {}, b"Client sent an HTTP request to an HTTPS server.\n", "https", "https://"),
        (503, JSON, errors("Vault is sealed"), "sealed", "operator unseal"),
        (503, JSON, errors("something else"), "status 503: something else", "log"),
        (404, JSON, errors("namespace not found"), "no namespace", "namespace"),
        (404, JSON, errors('no handler for route "x".'), "no Transit engine", "mount"),
        (429, {"Retry-After": "77", **JSON}, errors("slow down"), "rate limit", "77 s"),
        (500, JSON, errors("disk full"), "status 500: disk full", "log"),
    ],
)
def test_an_answer_that_is_not_the_models_fault(
    make, wrapped, gateway, status, headers, body, says, hint
):
    before = gateway()
    before.before = lambda method, path, _: (status, headers, body)
    provider = make(address=before.address, token="hvs.token", timeout=ONE_TRY)
    with pytest.raises(ProviderUnavailable) as caught:
        provider.unwrap(wrapped, b"c")
    assert says in str(caught.value)
    assert hint in str(caught.value.hint)


def test_retry_after_is_waited_for(make, bao, wrapped, gateway):
    before = gateway()
    limited = [True]

    def limit(method: str, path: str, body: Any) -> Any:
        return (429, {"Retry-After": "1", **JSON}, errors("slow")) if limited.pop() else None

    before.before = lambda *args: limit(*args) if limited else None
    assert opens(make(address=before.address, token=bao.root), wrapped)
    assert before.count("transit/decrypt/model") == 2


def test_an_address_with_a_path_and_slashes_at_the_end(make, bao, wrapped, gateway):
    before = gateway()
    before.prefix = "/site/vault"
    address = f"{before.address}/site/vault/"
    provider = make(address=address, token=bao.root, mount="transit/")
    assert opens(provider, wrapped)
    assert all(not path.startswith("/") for _, path, _ in before.seen)
    bao.do("POST", "sys/namespaces/team-b", {})
    bao.do("POST", "sys/mounts/transit", {"type": "transit"}, namespace="team-b")
    make(bao, namespace="team-b/").create_key("model", "aes256-gcm96", {})


def test_a_wrong_namespace(make, bao, wrapped):
    with pytest.raises(ProviderUnavailable, match="no namespace nowhere"):
        make(bao, namespace="nowhere").unwrap(wrapped, b"c")


def test_a_policy_with_allowed_parameters(make, bao, wrapped):
    policy = UNWRAP.replace("}", 'allowed_parameters = { "ciphertext" = [] } }')
    with pytest.raises(AccessDenied, match="does not allow") as caught:
        make(bao, token=bao.token(policy)).unwrap(wrapped, b"c")
    assert "allowed_parameters" in str(caught.value.hint)


def test_a_second_factor(make, bao, wrapped, gateway, secret_file):
    before = gateway()
    answer = {"auth": {"client_token": "", "mfa_requirement": {"mfa_request_id": "x"}}}
    before.before = lambda method, path, _: (200, JSON, json.dumps(answer).encode())
    auth = {"method": "approle", "role_id": secret_file("role"), "secret_id": secret_file("id")}
    with pytest.raises(AccessDenied, match="second factor") as caught:
        make(address=before.address, auth=auth).unwrap(wrapped, b"c")
    assert "exempt" in str(caught.value.hint)


def test_a_certificate_that_is_not_yet_valid(make, bao, authority, new_bao, wrapped):
    early = new_bao(init=False, listens=False, since=datetime.timedelta(days=2))
    with pytest.raises(ProviderUnavailable, match="not yet valid") as caught:
        make(early, token="s.x").unwrap(wrapped, b"c")
    assert "clock" in str(caught.value.hint)


# Secret ids that are wrapped, and tokens of pods.


def wrap_secret_id(bao: Any, role: str) -> str:
    """A token that wraps a new secret id, made as the manual says."""
    command = ["write", "-format=json", "-wrap-ttl=1h", "-f", f"auth/approle/role/{role}/secret-id"]
    return str(json.loads(bao.cli(*command))["wrap_info"]["token"])


def test_a_wrapped_secret_id(make, bao, wrapped, secret_file):
    role_id, _ = bao.approle(UNWRAP, "wrapped")
    place = secret_file(wrap_secret_id(bao, "wrapped"))
    auth = {"method": "approle", "role_id": secret_file(role_id), "secret_id": {"wrapped": place}}
    provider = make(bao, auth=auth)
    assert opens(provider, wrapped)
    # The secret id is kept for the next login of this provider.
    bao.do("PUT", "sys/leases/revoke-prefix/auth/approle/login")
    assert opens(provider, wrapped)
    # The token that wrapped it has served.
    with pytest.raises(AccessDenied, match="unwraps no secret id") as caught:
        make(bao, auth=auth).unwrap(wrapped, b"c")
    assert "somebody else" in str(caught.value.hint)
    Path(place["file"]).write_text(wrap_secret_id(bao, "wrapped"))
    assert opens(make(bao, auth=auth), wrapped)


def test_a_wrapping_token_where_a_secret_id_is_meant(make, bao, wrapped, secret_file):
    role_id, _ = bao.approle(UNWRAP, "mistaken")
    place = secret_file(wrap_secret_id(bao, "mistaken"))
    auth = {"method": "approle", "role_id": secret_file(role_id), "secret_id": place}
    with pytest.raises(AccessDenied, match="refused") as caught:
        make(bao, auth=auth).unwrap(wrapped, b"c")
    assert "wrapped = {" in str(caught.value.hint)


@pytest.mark.parametrize("mode", [0o440, 0o644])
def test_a_jwt_as_a_pod_has_it(make, bao, tmp_path, mode):
    """A projected volume: links to a file that others can read, in a folder with the sticky bit."""
    folder = tmp_path / "projected"
    (folder / "..2026").mkdir(parents=True)
    folder.chmod(0o1777)
    (folder / "..data").symlink_to("..2026")
    (folder / "token").symlink_to("..data/token")
    token = folder / "..2026" / "token"
    token.write_text("a.b.c")
    token.chmod(mode)
    auth = {"method": "jwt", "role": "r", "jwt": {"file": str(folder / "token")}}
    with pytest.raises(AccessDenied, match="login by jwt was refused"):
        make(bao, auth=auth).list_keys()
    token.chmod(0o666)
    with pytest.raises(ProviderUnavailable, match="others can write it"):
        make(bao, auth=auth).list_keys()


# An agent that is late.


@pytest.mark.parametrize("way", ["sink", "socket"])
def test_an_agent_that_has_not_logged_in_yet(make, bao, wrapped, agent, way):
    role_id, secret_id = bao.approle(UNWRAP, f"late-{way}")

    def provider(timeout: float) -> Any:
        if way == "sink":
            sink = {"file": str(agent / "sink")}
            return make(bao, auth={"method": "agent", "sink": sink}, timeout=timeout)
        address = f"unix:{agent}/agent.sock"
        return make(address=address, auth={"method": "agent"}, timeout=timeout)

    with pytest.raises(ProviderError) as caught:
        provider(1.5).unwrap(wrapped, b"c")
    assert "agent" in f"{caught.value} {caught.value.hint}"
    assert not provider(1.5).check().ok
    import threading

    def log_in() -> None:
        time.sleep(0.5)
        (agent / "secret").write_text(secret_id)
        (agent / "role").write_text(role_id)

    threading.Thread(target=log_in).start()
    assert opens(provider(30.0), wrapped)


# Secrets.


def everything_of(error: BaseException | None) -> Iterator[str]:
    """The texts of an error and of its causes, and the locals of all frames but this file's."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield f"{error} {error!r} {error.args!r} {getattr(error, 'hint', '')} {vars(error)!r}"
        trace: TracebackType | None = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename != __file__:
                for name, value in trace.tb_frame.f_locals.items():
                    yield f"{trace.tb_frame.f_code.co_name}.{name} = {value!r}"
                    if isinstance(value, (bytes, bytearray)):
                        yield bytes(value).decode("latin1")
            trace = trace.tb_next
        yield from everything_of(error.__context__ if error.__cause__ else None)
        error = error.__cause__ or error.__context__


def echo(method: str, path: str, body: Any) -> Any:
    return 400, JSON, errors(f"cannot {method} {path}: {json.dumps(body)}")


@pytest.mark.parametrize("operation", ["unwrap", "wrap", "sign", "create", "list"])
@pytest.mark.parametrize(
    "answer",
    [
        lambda *_: (403, JSON, errors("1 error occurred:\n\t* permission denied\n\n")),
        lambda *_: (403, JSON, errors("permission denied")),
        lambda *_: (500, JSON, errors("broken")),
        lambda *_: (200, JSON, b'{"data": {"plaintext": "U0VDUkVULVBMQUlO"}}'),
        lambda *_: (200, JSON, b'{"auth": {"client_token": "SECRET-TOKEN"}, "x": SECRET-PLAIN'),
        lambda *_: False,
        echo,
    ],
)
def test_no_secret_is_in_an_error_or_its_frames(
    make, wrapped, gateway, secret_file, answer, operation
):
    before = gateway()
    before.before = answer
    approle = {
        "method": "approle",
        "role_id": secret_file("SECRET-ROLE"),
        "secret_id": secret_file("SECRET-ID"),
    }
    token = {"method": "token", "token": secret_file("SECRET-TOKEN")}
    for auth in (token, approle):
        provider = make(address=before.address, auth=auth, timeout=0.3)
        if auth is token and operation == "wrap":
            provider._wrapping._keys.usable = described
        with Dek(b"SECRET-DATA-KEY-SECRET-DATA-KEY!") as dek:
            calls: dict[str, Callable[[], Any]] = {
                "unwrap": lambda p=provider: p.unwrap(wrapped, b"c"),
                "wrap": lambda p=provider, d=dek: p.wrap("model", d, b"c"),
                "sign": lambda p=provider: p.sign("model", b"message"),
                "create": lambda p=provider: p.create_key("model", "ed25519", {}),
                "list": lambda p=provider: p.list_keys(),
            }
            try:
                calls[operation]()
            except KeymgmtError as error:
                texts = list(everything_of(error))
            else:
                # An answer without keys is an empty list.
                assert (operation, auth) == ("list", token)
                continue
        for text in texts:
            for secret in ("SECRET-", "U0VDUkVULU", "U0VDUkVUL"):
                assert secret not in text, text


def described(key: str, purpose: str) -> Described:
    """A key as the server would have described it."""
    assert purpose == "wrap"
    return Described(KeyInfo(key, "wrap", "aes256-gcm96", ()), key, 1, {})
