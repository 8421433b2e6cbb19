"""Every way to log in, renewal in time, and one new login when a token is gone."""

from __future__ import annotations

import base64
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from vaults import UNWRAP, approle, opens
from waiting import until
from webserver import Seen, reply, serving

from keymgmt.backend import AccessDenied, Dek, ProviderUnavailable, UnwrapFailed, WrappedKey


@pytest.fixture(scope="module", autouse=True)
def policy(bao) -> None:
    bao.do("PUT", "sys/policies/acl/unwrap", {"policy": UNWRAP})


def keep_opening(provider: Any, wrapped: WrappedKey, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert opens(provider, wrapped)
        time.sleep(0.02)


@pytest.mark.once
def test_a_login_is_renewed_in_time(make, bao, wrapped, secret_file):
    """The secret id serves one login, and the token lives four seconds."""
    auth = approle(bao, secret_file, "renewed", token_ttl="4s", secret_id_num_uses=1)
    keep_opening(make(bao, auth=auth), wrapped, 9)


@pytest.mark.once
def test_a_login_is_replaced_before_its_greatest_age(make, bao, wrapped, secret_file):
    auth = approle(bao, secret_file, "aged", token_ttl="2s", token_max_ttl="3s")
    keep_opening(make(bao, auth=auth), wrapped, 7)


@pytest.mark.once
def test_a_renewable_token_is_renewed(make, bao, wrapped):
    token = bao.token(UNWRAP, ttl="4s", renewable=True)
    keep_opening(make(bao, token=token), wrapped, 9)


def test_threads_replace_a_revoked_token_once(make, bao, wrapped, secret_file):
    auth = approle(bao, secret_file, "revoked", secret_id_num_uses=2)
    provider = make(bao, auth=auth)
    assert opens(provider, wrapped)
    bao.do("PUT", "sys/leases/revoke-prefix/auth/approle/login")
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: opens(provider, wrapped), range(40)))
    bao.do("PUT", "sys/leases/revoke-prefix/auth/approle/login")
    with pytest.raises(AccessDenied, match="login by approle was refused"):
        provider.unwrap(wrapped, b"c")


def test_from_the_environment(make, bao, wrapped, monkeypatch):
    provider = make(bao, auth={"method": "token", "token": {"env": "SITE_TOKEN"}})
    with pytest.raises(ProviderUnavailable, match="SITE_TOKEN is not set"):
        provider.unwrap(wrapped, b"c")
    monkeypatch.setenv("SITE_TOKEN", bao.root)
    assert opens(provider, wrapped)
    monkeypatch.setenv("SITE_TOKEN", "s.bad\r\nX-Injected: 1")
    with pytest.raises(ProviderUnavailable, match="not printable ASCII") as caught:
        make(bao, auth={"method": "token", "token": {"env": "SITE_TOKEN"}}).unwrap(wrapped, b"c")
    assert "Injected" not in str(caught.value)


@pytest.fixture(scope="module")
def cert_role(bao) -> None:
    bao.do("POST", "sys/auth/cert", {"type": "cert"})
    bao.do(
        "POST",
        "auth/cert/certs/device",
        {
            "certificate": bao.authority.ca_file.read_text(),
            "allowed_common_names": "device",
            "token_policies": ["unwrap"],
        },
    )


@pytest.mark.usefixtures("cert_role")
class TestCertificate:
    @pytest.mark.parametrize("password", [None, b"a password"])
    @pytest.mark.parametrize("role", [None, "device"])
    def test_logs_in(self, make, bao, wrapped, secret_file, role, password):
        cert, key = bao.authority.issue("device", client=True, password=password)
        source = {"client_key_password": secret_file(password.decode())} if password else {}
        auth = {"method": "cert"} | ({"role": role} if role else {})
        files = {"client_cert": str(cert), "client_key": str(key)}
        assert opens(make(bao, auth=auth, **files, **source), wrapped)
        if password:
            with pytest.raises(ProviderUnavailable, match="private key") as caught:
                make(bao, auth=auth, **files).unwrap(wrapped, b"c")
            assert "client_key_password" in str(caught.value.hint)

    def test_another_certificate_is_denied(self, make, bao, wrapped, other_authority):
        for authority, name in ((bao.authority, "stranger"), (other_authority, "device")):
            cert, key = authority.issue(name, client=True)
            provider = make(
                bao, auth={"method": "cert"}, client_cert=str(cert), client_key=str(key)
            )
            with pytest.raises(AccessDenied, match="login by cert was refused"):
                provider.unwrap(wrapped, b"c")

    def test_files_that_are_not_right(self, make, bao, wrapped, tmp_path):
        cert, key = bao.authority.issue("device", client=True)
        for files, says in (
            ({"client_cert": str(tmp_path / "no"), "client_key": str(key)}, "cannot read"),
            ({"client_cert": str(cert), "client_key": str(tmp_path / "no")}, "cannot read"),
            ({"client_cert": str(cert), "client_key": str(cert)}, "others can use it"),
        ):
            with pytest.raises(ProviderUnavailable, match=says):
                make(bao, auth={"method": "cert"}, **files).unwrap(wrapped, b"c")


def jwt(key: ec.EllipticCurvePrivateKey, **claims: Any) -> str:
    """An ES256 token (RFC 7519)."""

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    now = int(time.time())
    claims = {"iat": now, "nbf": now - 5, "exp": now + 3600} | claims
    header = {"alg": "ES256", "typ": "JWT"}
    text = f"{part(json.dumps(header).encode())}.{part(json.dumps(claims).encode())}"
    r, s = decode_dss_signature(key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{text}.{part(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


@pytest.mark.parametrize("mount", ["jwt", "oidc"])
def test_jwt(make, bao, wrapped, secret_file, mount):
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    bao.do("POST", f"sys/auth/{mount}", {"type": mount})
    bao.do("POST", f"auth/{mount}/config", {"jwt_validation_pubkeys": [public.decode()]})
    bao.do(
        "POST",
        f"auth/{mount}/role/build",
        {
            "role_type": "jwt",
            "user_claim": "sub",
            "bound_audiences": ["keymgmt"],
            "token_policies": ["unwrap"],
        },
    )
    auth = {"method": "jwt", "role": "build", "mount": mount}
    good = secret_file(jwt(key, sub="build-7", aud="keymgmt"))
    assert opens(make(bao, auth=auth | {"jwt": good}), wrapped)
    for claims in ({"aud": "other"}, {"aud": "keymgmt", "exp": int(time.time()) - 3600}):
        token = jwt(key, sub="build-7", **claims)
        with pytest.raises(AccessDenied, match="login by jwt was refused") as caught:
            make(bao, auth=auth | {"jwt": secret_file(token)}).unwrap(wrapped, b"c")
        assert "audience" in str(caught.value.hint)
        assert token not in f"{caught.value!r} {caught.value.__cause__!r}"


def review(request: Seen, handler: Any) -> None:
    """The one call of the Kubernetes API that the server makes; OpenBao's side is real."""
    body = json.loads(request.body)
    known = body["spec"]["token"] == jwt_of_pod
    user = {
        "username": "system:serviceaccount:models:runner",
        "uid": "1",
        "groups": ["system:serviceaccounts"],
    }
    status = {"authenticated": known} | ({"user": user} if known else {"error": "unknown"})
    answer = json.dumps(body | {"status": status}).encode()
    reply(handler, 201, answer, Content_Type="application/json")


_pod_key = ec.generate_private_key(ec.SECP256R1())
jwt_of_pod = jwt(
    _pod_key,
    sub="system:serviceaccount:models:runner",
    iss="kubernetes/serviceaccount",
    **{
        "kubernetes.io/serviceaccount/namespace": "models",
        "kubernetes.io/serviceaccount/service-account.name": "runner",
        "kubernetes.io/serviceaccount/service-account.uid": "1",
    },
)


def test_kubernetes(make, bao, wrapped, tmp_path):
    with serving(review) as api:
        bao.do("POST", "sys/auth/kubernetes", {"type": "kubernetes"})
        config = {
            "kubernetes_host": api.url,
            "kubernetes_ca_cert": bao.authority.ca_file.read_text(),
            "token_reviewer_jwt": jwt_of_pod,
            "disable_iss_validation": True,
            "disable_local_ca_jwt": True,
        }
        bao.do("POST", "auth/kubernetes/config", config)
        bao.do(
            "POST",
            "auth/kubernetes/role/runner",
            {
                "bound_service_account_names": "runner",
                "bound_service_account_namespaces": "models",
                "token_policies": ["unwrap"],
            },
        )
        token = tmp_path / "token"
        auth = {"method": "kubernetes", "role": "runner", "token_file": str(token)}
        provider = make(bao, auth=auth)
        with pytest.raises(ProviderUnavailable, match="service account") as caught:
            provider.unwrap(wrapped, b"c")
        assert "pod" in str(caught.value.hint)
        token.write_text(jwt_of_pod + "\n")
        token.chmod(0o644)  # as the kubelet makes it
        assert opens(provider, wrapped)
        token.write_text(jwt(_pod_key, sub="system:serviceaccount:other:runner"))
        with pytest.raises(AccessDenied, match="login by kubernetes was refused"):
            make(bao, auth=auth).unwrap(wrapped, b"c")
        token.chmod(0o666)
        with pytest.raises(ProviderUnavailable, match="others can write it"):
            make(bao, auth=auth).unwrap(wrapped, b"c")


class TestAgent:
    """A real agent, logged in by AppRole: its sink file, and its socket."""

    @pytest.fixture
    def logged_in(self, bao, agent) -> Path:
        role_id, secret_id = bao.approle(UNWRAP, "agent")
        (agent / "secret").write_text(secret_id)
        (agent / "role").write_text(role_id)
        until((agent / "sink").exists, said=(agent / "agent.log").read_text)
        return agent

    def test_sink(self, make, bao, wrapped, logged_in):
        auth = {"method": "agent", "sink": {"file": str(logged_in / "sink")}}
        provider = make(bao, auth=auth)
        assert opens(provider, wrapped)
        # The agent logs in again and writes a new token; the old one is dead.
        old = (logged_in / "sink").read_text()
        bao.do("POST", "auth/token/revoke", {"token": old})
        (logged_in / "sink").write_text(bao.token(UNWRAP))
        assert opens(provider, wrapped)

    def test_socket(self, make, bao, wrapped, logged_in):
        provider = make(address=f"unix:{logged_in}/agent.sock", auth={"method": "agent"})
        assert opens(provider, wrapped)
        with Dek.generate() as dek, pytest.raises(AccessDenied, match="does not allow"):
            provider.wrap("model", dek, b"c")
        health = provider.check("model")
        assert health.ok, health


def test_namespaces(make, bao, wrapped):
    bao.do("POST", "sys/namespaces/team-a", {})
    bao.do("POST", "sys/mounts/keys/transit", {"type": "transit"}, namespace="team-a")
    provider = make(bao, namespace="team-a", mount="keys/transit")
    provider.create_key("model", "aes256-gcm96", {})
    with Dek.generate() as dek:
        inside = provider.wrap("model", dek, b"c")
        assert provider.unwrap(inside, b"c") == dek
        # A key of the same name elsewhere is another key.
        with pytest.raises(UnwrapFailed):
            make(bao).unwrap(inside, b"c")
    assert provider.check("model").ok
    assert b"team-a" not in inside.blob
