"""Each way to log in, by itself: and nothing of the environment or ~/.aws that it does not name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import ssl
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from programs import run_python
from webserver import Seen, reply, serving

from keymgmt import Config
from keymgmt.backend import AccessDenied, ConfigError, Dek, ProviderError, ProviderUnavailable

ROLE = "arn:aws:iam::111122223333:role/opener"


def works(provider: Any) -> str:
    """Wrap and unwrap; who did it, as AWS STS says."""
    with Dek.generate() as dek:
        wrapped = provider.wrap("model", dek, b"c")
        assert provider.unwrap(wrapped, b"c") == dek
    login = next(f for f in provider.check().findings if f.name == "login")
    assert login.status == "ok", login
    return login.detail


@pytest.fixture
def static(kms, secret_file) -> dict[str, Any]:
    name, secret = kms.user
    return {
        "method": "static",
        "access_key_id": secret_file(name),
        "secret_access_key": secret_file(secret),
    }


@pytest.fixture
def metadata() -> Iterator[Any]:
    """A metadata service: ``answers`` are path -> text; ``seen`` are path and headers."""

    class Service:
        answers: dict[str, str]
        redirect = ""
        seen: list[tuple[str, str, dict[str, str]]]

    service = Service()
    service.answers, service.seen = {}, []

    def answer(request: Seen, handler: Any) -> None:
        service.seen.append((request.method, request.path, dict(handler.headers.items())))
        body = service.answers.get(f"{request.method} {request.path}")
        status = 307 if service.redirect else 404 if body is None else 200
        reply(handler, status, (body or "").encode(), Location=service.redirect)

    with serving(answer) as web:
        service.address = web.url  # type: ignore[attr-defined]
        yield service


def container_words(session: dict[str, Any]) -> str:
    return json.dumps(
        {("Token" if name == "SessionToken" else name): value for name, value in session.items()}
    )


def instance_answers(session: str) -> dict[str, str]:
    path = "/latest/meta-data/iam/security-credentials/"
    return {
        "PUT /latest/api/token": "imds-token",
        f"GET {path}": "the-role",
        f"GET {path}the-role": session,
    }


def test_static_keys(kms, make, static):
    kms.make("model")
    assert works(make(auth=static)) == "by static: arn:aws:iam::111122223333:user/tests"


def test_a_role_with_an_external_id(kms, make, static):
    kms.make("model")
    kms.trust = lambda request: request.get("ExternalId") == "the-owner-told-us"
    auth = {"method": "role", "role_arn": ROLE, "source": static, "session_name": "press-17"}
    with pytest.raises(AccessDenied, match="may not be assumed") as caught:
        works(make(auth=auth))
    assert "external_id" in str(caught.value.hint)
    who = works(make(auth=auth | {"external_id": "the-owner-told-us"}))
    assert who.endswith("assumed-role/opener/press-17")


def test_a_role_is_assumed_again_before_its_session_ends(kms, make, static):
    kms.make("model")
    auth = {"method": "role", "role_arn": ROLE, "source": static}
    provider = make(auth=auth)
    works(provider)
    assert kms.called("AssumeRole") == 1
    provider.close()
    kms.session_seconds = 60.0  # nearer to its end than botocore waits for
    works(provider)
    assert kms.called("AssumeRole") > 2


def test_a_web_identity_that_is_replaced_on_disk(kms, make, tmp_path):
    kms.make("model")
    token = tmp_path / "token"
    token.write_text("first\n")
    token.chmod(0o644)  # as the kubelet writes it
    kms.trust = lambda request: request["WebIdentityToken"] == token.read_text().strip()
    auth = {"method": "web-identity", "role_arn": ROLE, "token_file": str(token)}
    provider = make(auth=auth)
    works(provider)
    kms.expire()
    token.write_text("second\n")
    assert works(provider).endswith("assumed-role/opener/keymgmt")
    sent = [r["WebIdentityToken"] for name, r, _ in kms.seen if name.startswith("AssumeRoleWith")]
    assert sent == ["first", "second"]
    kms.expire()
    kms.trust = lambda request: False
    with pytest.raises(AccessDenied, match="credentials are refused"):
        works(provider)
    token.chmod(0o666)
    with pytest.raises(ProviderUnavailable, match="token"):
        works(make(auth=auth))
    token.unlink()
    with pytest.raises(ProviderUnavailable, match="cannot read the token"):
        works(make(auth=auth))


def test_the_role_of_an_instance(kms, make, metadata):
    kms.make("model")
    metadata.answers = instance_answers(container_words(kms.session("instance/i-1")))
    auth = {"method": "instance", "endpoint": metadata.address}
    assert works(make(auth=auth)).endswith("assumed-role/instance/i-1")
    asked = [headers for method, _, headers in metadata.seen if method == "GET"]
    assert {one["x-aws-ec2-metadata-token"] for one in asked} == {"imds-token"}
    # In an outage EC2 gives credentials whose end is past, and AWS takes them.
    old = container_words(kms.session("instance/i-1") | {"Expiration": "2026-01-01T00:00:00Z"})
    metadata.answers = instance_answers(old)
    works(make(auth=auth))
    # IMDSv1, which answers without a token, is not used.
    del metadata.answers["PUT /latest/api/token"]
    with pytest.raises(ProviderUnavailable, match="IMDSv2"):
        works(make(auth=auth))


def test_the_role_of_a_container(kms, make, metadata, secret_file, tmp_path, caplog):
    kms.make("model")
    caplog.set_level("DEBUG")
    metadata.answers = {"GET /creds": container_words(kms.session("task/t-1"))}
    token = tmp_path / "pod-token"
    token.write_text("pod-token-1")
    auth = {"method": "container", "uri": secret_file(f"{metadata.address}/creds")}
    assert works(make(auth=auth | {"token_file": str(token)})).endswith("assumed-role/task/t-1")
    assert metadata.seen[0][2]["Authorization"] == "pod-token-1"
    evil = make(auth=auth | {"uri": secret_file("http://evil.example/creds")})
    with pytest.raises(ProviderUnavailable, match="ValueError"):
        works(evil)
    # Where nobody listens, and where the answer is no: the address stands in no error.
    for place in (
        "http://127.0.0.1:9/secret-of-the-task",
        f"{metadata.address}/secret-of-the-task",
    ):
        closed = make(auth=auth | {"uri": secret_file(place)}, timeout=8.0)
        with pytest.raises(ProviderUnavailable, match="container's service") as caught:
            works(closed)
        said = "".join(traceback.format_exception(caught.value))
        assert "secret-of-the-task" not in said + caplog.text
    ecs = make(auth=auth | {"uri": {"env": "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"}})
    with pytest.raises(ProviderUnavailable, match="AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        works(ecs)


@pytest.mark.once
@pytest.mark.parametrize("method", ["instance", "role", "web-identity"])
def test_a_login_at_moto(moto, make, instance, secret_file, method):
    """With the answers of another's AWS STS and metadata service; nothing is refused there."""
    # Its keys are of this account.
    role = {"method": method, "role_arn": ROLE.replace("111122223333", "123456789012")}
    auth: dict[str, Any] = {
        "instance": instance,
        "role": role | {"source": instance, "external_id": "the-owner-told-us"},
        "web-identity": role | {"token_file": secret_file("a-jwt")["file"]},
    }[method]
    at_moto = {"endpoint": moto.address, "sts_endpoint": moto.address, "auth": auth}
    provider = make(keys={"model": {"arn": f"alias/{method}"}}, **at_moto)
    client = moto.client()
    made = client.create_key(KeyUsage="ENCRYPT_DECRYPT", KeySpec="SYMMETRIC_DEFAULT")
    client.create_alias(AliasName=f"alias/{method}", TargetKeyId=made["KeyMetadata"]["KeyId"])
    who = works(provider)
    assert who.startswith(f"by {method}: arn:aws:sts::")
    assert method == "instance" or "assumed-role/opener/keymgmt" in who


def profile(tmp_path: Path, config: str, credentials: str) -> dict[str, str]:
    files = {"config_file": config, "credentials_file": credentials}
    for name, text in files.items():
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_text(text)
    return {"method": "profile", "profile": "press"} | {
        name: str(tmp_path / name) for name in files
    }


def test_a_profile(kms, make, tmp_path):
    kms.make("model")
    name, secret = kms.user
    keys = f"aws_access_key_id = {name}\naws_secret_access_key = {secret}\n"
    # What the profile says of endpoints and regions is not taken: the config says where.
    surprise = "region = us-east-1\nendpoint_url = http://127.0.0.1:1\n"
    auth = profile(tmp_path, f"[profile press]\n{surprise}", f"[press]\n{keys}")
    assert works(make(auth=auth)).endswith("user/tests")
    (tmp_path / "credentials_file").chmod(0o644)
    with pytest.raises(ProviderUnavailable, match="credentials_file"):
        works(make(auth=auth))


def test_a_profile_that_is_not_there_is_not_completed_from_elsewhere(
    kms, make, tmp_path, monkeypatch
):
    name, secret = kms.user
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", name)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(ProviderUnavailable, match="credentials"):
        works(make(auth=profile(tmp_path, "", "")))
    with pytest.raises(ProviderUnavailable, match="no AWS credentials"):
        works(make(auth=profile(tmp_path, "[profile press]\nregion = us-east-1\n", "")))
    assert not kms.seen


@pytest.mark.parametrize("ends", ["", "; false"])
def test_what_a_program_of_a_profile_says_stands_in_no_error(make, tmp_path, caplog, ends):
    caplog.set_level("DEBUG")
    program = f"sh -c 'echo secret-of-the-program; echo secret-of-the-program >&2{ends}'"
    auth = profile(tmp_path, f"[profile press]\ncredential_process = {program}\n", "")
    with pytest.raises(ProviderError) as caught:
        works(make(auth=auth))
    cause = caught.value.__cause__
    said = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "secret-of-the-program" not in said.replace(program, "") + str(
        vars(cause) if cause else ""
    )


@pytest.mark.once
@pytest.mark.parametrize("by", ["itself", "a role"])
def test_a_program_of_a_profile_that_hangs_is_ended(make, tmp_path, by):
    left = tmp_path / "pid"
    program = f"credential_process = sh -c 'echo $$ > {left}; exec sleep 600'\n"
    config = f"[profile press]\n{program}"
    if by == "a role":
        config = f"[profile press]\nrole_arn = {ROLE}\nsource_profile = base\n"
        config += f"[profile base]\n{program}"
    with pytest.raises(ProviderUnavailable):
        works(make(auth=profile(tmp_path, config, ""), timeout=1.0))
    # That of an operation which was given up is ended by the thread that it left behind.
    process, end = Path("/proc") / left.read_text().strip() / "exe", time.monotonic() + 30
    while process.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not process.exists()


@pytest.mark.parametrize("session", ["", "sso_session = press\n"])
def test_a_session_of_sso(kms, make, metadata, tmp_path, monkeypatch, session):
    """Its portal is at AWS alone, and what is sent there comes to a service of this test."""
    from keymgmt_aws import _login

    kms.make("model")
    portal, make_http = "https://portal.sso.eu-central-1.amazonaws.com", _login.http_session

    def http_session(settings: Any) -> Any:
        http = make_http(settings)
        send = http.send

        def send_there(request: Any) -> Any:
            assert request.url.startswith(portal)
            request.url = request.url.replace(portal, metadata.address)
            return send(request)

        http.send = send_there
        return http

    monkeypatch.setattr(_login, "http_session", http_session)
    monkeypatch.setenv("HOME", str(tmp_path))
    # Read from HOME when botocore is imported.
    cache = tmp_path / ".aws" / "sso" / "cache"
    for place in ("tokens.SSOTokenProvider", "credentials.SSOProvider"):
        monkeypatch.setattr(f"botocore.{place}._SSO_TOKEN_CACHE_DIR", str(cache))
    about = "sso_start_url = https://press.example/start\nsso_region = eu-central-1\n"
    role = "sso_account_id = 111122223333\nsso_role_name = opener\n"
    config = f"[profile press]\n{session or about}{role}"
    config += f"[sso-session press]\n{about}" if session else ""
    auth = profile(tmp_path, config, "")
    with pytest.raises(AccessDenied, match="session of SSO") as caught:
        works(make(auth=auth))
    assert "log in to the profile again" in str(caught.value.hint)

    # What the AWS command line leaves behind.
    name = hashlib.sha1(("press" if session else "https://press.example/start").encode())
    cached = cache / f"{name.hexdigest()}.json"
    cached.parent.mkdir(parents=True)
    cached.write_text('{"accessToken": "sso-token", "expiresAt": "2099-01-01T00:00:00Z"}')
    made = kms.session("opener/press")
    names = ("AccessKeyId", "SecretAccessKey", "SessionToken")
    told = {one[0].lower() + one[1:]: made[one] for one in names} | {"expiration": 4e12}
    asked = "/federation/credentials?role_name=opener&account_id=111122223333"
    metadata.answers = {f"GET {asked}": json.dumps({"roleCredentials": told})}
    assert works(make(auth=auth)).endswith("assumed-role/opener/press")
    (_, _, headers) = metadata.seen[-1]
    assert headers["x-amz-sso_bearer_token"] == "sso-token"


@pytest.mark.once
@pytest.mark.parametrize("method", ["role", "web-identity", "instance", "container"])
def test_a_login_follows_no_redirect(kms, make, simulate, static, metadata, secret_file, method):
    elsewhere = simulate("eu-central-1")
    place = f"{elsewhere.address}/"
    kms.before = lambda operation, *_: (
        (307, {"Location": place}, b"") if operation.startswith("AssumeRole") else None
    )
    metadata.redirect = place
    auth = {
        "role": {"method": "role", "role_arn": ROLE, "source": static},
        "web-identity": {"method": "web-identity", "role_arn": ROLE}
        | {"token_file": secret_file("a-jwt")["file"]},
        "instance": {"method": "instance", "endpoint": metadata.address},
        "container": {"method": "container", "uri": secret_file(f"{metadata.address}/creds")},
    }[method]
    with pytest.raises(ProviderUnavailable):
        works(make(auth=auth, timeout=8.0))
    assert metadata.seen or kms.called("AssumeRole") + kms.called("AssumeRoleWithWebIdentity")
    assert elsewhere.connections == 0


def test_a_secret_that_is_not_there(make, static, tmp_path):
    auth = static | {"secret_access_key": {"file": str(tmp_path / "nowhere")}}
    with pytest.raises(ProviderUnavailable, match="nowhere"):
        works(make(auth=auth))
    with pytest.raises(ConfigError):
        make().wrap("../x", Dek.generate(), b"c")


# Nothing of the environment.

PROGRAM = """
import json, os, sys

read, opened = set(), set()
class Recording(type(os.environ)):
    def __getitem__(self, name):
        read.add(name)
        return super().__getitem__(name)
    def __contains__(self, name):
        read.add(name)
        return super().__contains__(name)
os.environ.__class__ = Recording
sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)

from keymgmt.backend import Dek, KeymgmtError
from keymgmt_aws import AwsProvider, AwsSettings

said = ""
provider = AwsProvider("cloud", AwsSettings.model_validate(json.loads(sys.argv[1])))
try:
    wrapped = provider.wrap("model", Dek.generate(), b"c")
    provider.unwrap(wrapped, b"c")
    said = provider.check().findings[0].detail
except KeymgmtError as error:
    said = f"{type(error).__name__}: {error}"
print(json.dumps({"said": said, "read": sorted(read), "opened": sorted(opened)}))
"""


@pytest.fixture
def authority(tmp_path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for loopback, which vouches for itself, and a server's context of it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    import ipaddress

    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate, private = tmp_path / "ca.pem", tmp_path / "server.key"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    return certificate, context


@pytest.fixture
def planted(tmp_path) -> dict[str, str]:
    """An environment and a home that would lead everything astray, and where to."""
    home, away = tmp_path / "home", "http://127.0.0.1:9"
    models = home / ".aws" / "models" / "kms" / "2014-11-01"
    models.mkdir(parents=True)
    (models / "service-2.json").write_text("{}")
    keys = "aws_access_key_id = AKIAPLANTED\naws_secret_access_key = planted-secret\n"
    settings = f"region = us-east-1\nendpoint_url = {away}\nca_bundle = /planted.pem\n"
    (home / ".aws" / "config").write_text(f"[default]\n{keys}{settings}[profile planted]\n{keys}")
    (home / ".aws" / "credentials").write_text(f"[default]\n{keys}[planted]\n{keys}")
    (home / ".boto").write_text(f"[Credentials]\n{keys}")
    (tmp_path / "planted_plugin.py").write_text("raise SystemExit('the plugin was imported')\n")
    return {
        "AWS_ACCESS_KEY_ID": "AKIAPLANTED",
        "AWS_SECRET_ACCESS_KEY": "planted-secret",
        "AWS_SESSION_TOKEN": "planted-token",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": away,
        "AWS_ENDPOINT_URL_KMS": away,
        "AWS_ENDPOINT_URL_STS": away,
        "AWS_CA_BUNDLE": "/planted.pem",
        "REQUESTS_CA_BUNDLE": "/planted.pem",
        "SSLKEYLOGFILE": str(tmp_path / "session-keys"),
        "AWS_DATA_PATH": str(home / ".aws" / "models"),
        "AWS_MAX_ATTEMPTS": "99",
        "AWS_USE_FIPS_ENDPOINT": "true",
        "AWS_CSM_ENABLED": "true",
        "AWS_SDK_UA_APP_ID": "planted-app",
        "AWS_EXECUTION_ENV": "planted-env",
        "AWS_LAMBDA_FUNCTION_NAME": "planted",
        "_X_AMZN_TRACE_ID": "Root=planted",
        "BOTOCORE_EXPERIMENTAL__PLUGINS": "planted=planted_plugin",
        "HTTP_PROXY": away,
        "HTTPS_PROXY": away,
        "http_proxy": away,
        "https_proxy": away,
        "HOME": str(home),
        "PYTHONPATH": str(tmp_path),
        "PATH": os.environ["PATH"],
    }


def run_there(settings: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    done = run_python(PROGRAM, json.dumps(settings), env=environment)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture
def where(simulate, authority) -> tuple[Any, dict[str, Any]]:
    """A service with TLS, and the settings to reach it."""
    certificate, context = authority
    kms = simulate("eu-central-1", context)
    kms.make("model")
    return kms, {
        "region": "eu-central-1",
        "endpoint": kms.address,
        "sts_endpoint": kms.address,
        "ca_file": str(certificate),
        "timeout": 30.0,
        "call_timeout": 10.0,
    }


@pytest.mark.parametrize(
    "method",
    [
        "static",
        "role",
        "web-identity",
        "instance",
        "container",
        "profile",
        "profile with a role",
        "profile with a token",
    ],
)
def test_nothing_of_the_environment_is_read(
    where, planted, secret_file, metadata, tmp_path, method
):
    kms, settings = where
    name, secret = kms.user
    token = secret_file("a-jwt")["file"]
    static = {"method": "static", "access_key_id": secret_file(name)}
    static["secret_access_key"] = secret_file(secret)
    session = container_words(kms.session("task/t-1"))
    metadata.answers = instance_answers(session) | {"GET /creds": session}
    keys = f"[press]\naws_access_key_id = {name}\naws_secret_access_key = {secret}\n"
    base = keys.replace("press", "base")
    about = f"role_arn = {ROLE}\n"
    if method == "profile with a role":
        auth = profile(tmp_path, f"[profile press]\n{about}source_profile = base\n", base)
    elif method == "profile with a token":
        about += f"web_identity_token_file = {token}\n"
        auth = profile(tmp_path, f"[profile press]\n{about}", "")
    elif method == "profile":
        auth = profile(tmp_path, "[profile press]\n", keys)
    else:
        auth = {
            "static": static,
            "role": {"method": "role", "role_arn": ROLE, "source": static},
            "web-identity": {"method": "web-identity", "role_arn": ROLE, "token_file": token},
            "instance": {"method": "instance", "endpoint": metadata.address},
            "container": {"method": "container", "uri": secret_file(f"{metadata.address}/creds")},
        }[method]
    answer = run_there(settings | {"auth": auth}, planted)
    assert answer["said"].startswith(f"by {auth['method']}: arn:aws:"), answer["said"]
    assert not [each for each in answer["opened"] if each.startswith(planted["HOME"])]
    # Nothing of it reaches the wire either.
    sent = json.dumps([headers for *_, headers in kms.seen])
    assert "planted" not in sent.lower()
    assert b"CLIENT" not in (tmp_path / "session-keys").read_bytes()
    if auth["method"] == "profile":
        return  # a profile may name the environment as its source, so botocore has it at hand
    read = {name for name in answer["read"] if name in planted}
    # botocore looks these two up for a header and for connections that are not used here.
    assert read <= {"AWS_EXECUTION_ENV", "SSLKEYLOGFILE", "HOME", "PATH", "PYTHONPATH"}


def test_only_the_method_environment_takes_what_is_around(where, planted):
    kms, settings = where
    settings["auth"] = {"method": "environment"}
    answer = run_there(settings, planted)
    assert answer["said"].startswith("AccessDenied: "), answer["said"]
    assert "AKIAPLANTED" in json.dumps([headers for *_, headers in kms.seen])
    name, secret = kms.user
    mine = {"AWS_ACCESS_KEY_ID": name, "AWS_SECRET_ACCESS_KEY": secret}
    environment = {key: value for key, value in planted.items() if key != "AWS_SESSION_TOKEN"}
    answer = run_there(settings, environment | mine)
    assert answer["said"] == "by environment: arn:aws:iam::111122223333:user/tests"


LOGGING = """
import logging, sys
logging.basicConfig(level="DEBUG", stream=sys.stderr)
"""


def test_the_first_login_is_not_logged(kms, metadata, tmp_path):
    """In ECS whoever knows the address of the credentials has them."""
    kms.make("model")
    metadata.answers = {"GET /secret-of-the-task": container_words(kms.session("task/t-1"))}
    environment = {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{metadata.address}/secret-of-the-task",
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
    }
    settings = {"region": "eu-central-1", "endpoint": kms.address, "sts_endpoint": kms.address}
    settings["auth"] = {"method": "environment"}
    done = run_python(LOGGING + PROGRAM, json.dumps(settings), env=environment)
    assert "assumed-role/task/t-1" in done.stdout, done.stderr
    assert "secret-of-the-task" not in done.stderr


def test_a_renewal_that_failed_is_logged_without_the_answer(kms, make, static, caplog):
    kms.make("model")
    kms.session_seconds = 700.0  # botocore renews it by now, and does without until 600
    provider = make(auth={"method": "role", "role_arn": ROLE, "source": static})
    works(provider)
    body = b"<AssumeRoleResponse><SecretAccessKey>the-new-secret</SecretAccessKey>"
    kms.before = lambda operation, *_: (200, {}, body) if operation == "AssumeRole" else None
    with Dek.generate() as dek:
        provider.wrap("model", dek, b"c")
    assert "Refreshing temporary credentials failed" in caplog.text
    assert "the-new-secret" not in caplog.text


def test_a_server_that_nobody_vouches_for(where, make, static):
    kms, settings = where
    ca_file = settings.pop("ca_file")
    with pytest.raises(ProviderUnavailable, match="certificate") as caught:
        make(**settings, auth=static).wrap("model", Dek.generate(), b"c")
    assert "ca_file" in str(caught.value.hint)
    # It is vouched for, and for 127.0.0.1 alone.
    settings |= {"ca_file": ca_file, "endpoint": kms.address.replace("127.0.0.1", "localhost")}
    with pytest.raises(ProviderUnavailable, match="certificate"):
        make(**settings, auth=static).wrap("model", Dek.generate(), b"c")
    assert not kms.seen


@pytest.mark.once
@pytest.mark.parametrize(
    ("region", "domain"),
    [
        ("eu-central-1", "amazonaws.com"),
        ("us-east-1", "amazonaws.com"),
        ("us-gov-west-1", "amazonaws.com"),
        ("cn-north-1", "amazonaws.com.cn"),
        ("eusc-de-east-1", "amazonaws.eu"),
    ],
)
def test_where_it_goes_without_an_endpoint(make, monkeypatch, region, domain):
    """Nothing is sent: it is the region's own AWS KMS and AWS STS, and none of another region."""
    from keymgmt_aws._transport import Client

    sent = []

    def send(_: Any, request: Any, **__: Any) -> Any:
        sent.append(request.url)
        raise PermissionError

    monkeypatch.setattr(Client, "_send", send)
    assert [f.name for f in make(region=region, endpoint=None, sts_endpoint=None).check().findings]
    assert sent == [f"https://{one}.{region}.{domain}/" for one in ("sts", "kms")]


def test_botocore_is_imported_by_the_first_call():
    program = (
        "import sys, keymgmt_aws\n"
        "settings = {'region': 'eu-central-1', 'auth': {'method': 'instance'}}\n"
        "settings = keymgmt_aws.AwsSettings.model_validate(settings)\n"
        "keymgmt_aws.AwsProvider('cloud', settings).close()\n"
        "import keymgmt_aws._commands\n"
        "print([name for name in sys.modules if name.startswith(('botocore', 'urllib3'))])"
    )
    done = run_python(program)
    assert done.stdout == "[]\n", done.stderr


def test_closing_and_opening_leaks_no_descriptor(kms, make):
    kms.make("model")
    provider = make()

    def once() -> int:
        works(provider)
        provider.close()
        return len(list(Path("/proc/self/fd").iterdir()))

    with contextlib.suppress(AssertionError):
        works(provider)
    before = once()
    for _ in range(8):
        after = once()
    # The server's ends of them are closed a moment later, in this process too.
    assert after <= before + 4


@pytest.mark.parametrize(
    ("auth", "named"),
    [
        ({"method": "environment"}, True),
        ({"method": "role", "role_arn": ROLE, "source": {"method": "environment"}}, True),
        ({"method": "profile", "profile": "a"}, True),
        ({"method": "instance"}, False),
    ],
)
def test_variables_with_credentials_are_known_to_whoever_starts_a_program(auth, named):
    settings = {"backend": "aws", "region": "eu-central-1", "keys": {}, "auth": auth}
    with Config({"providers": {"cloud": settings}}) as config:
        found = {"AWS_SECRET_ACCESS_KEY", "AWS_CONTAINER_AUTHORIZATION_TOKEN"}
        assert (found & config.secret_variables) == (found if named else set())
