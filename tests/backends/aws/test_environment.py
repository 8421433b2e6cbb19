"""Nothing of the environment or ~/.aws that a login does not name."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aws_logins import ROLE, container_words, instance_answers, profile, works
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from programs import run_python

from keymgmt import Config
from keymgmt.backend import Dek, ProviderUnavailable

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
