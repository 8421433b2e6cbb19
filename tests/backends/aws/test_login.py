"""Each way to log in, by itself."""

from __future__ import annotations

import hashlib
import json
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from aws_logins import ROLE, container_words, instance_answers, profile, works

from keymgmt.backend import AccessDenied, ConfigError, Dek, ProviderError, ProviderUnavailable


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
