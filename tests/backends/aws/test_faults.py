"""What AWS KMS says on bad days, as its API reference has it: all of it on the simulation."""

from __future__ import annotations

import gzip
import json
import re
import traceback
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    Dek,
    KeyNotFound,
    KeyRetired,
    ProviderError,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)

JSON = {"Content-Type": "application/x-amz-json-1.1"}


def says(code: str, words: str = "", status: int = 400) -> Any:
    return status, JSON, json.dumps({"__type": code, "message": words}).encode()


@pytest.fixture
def dek() -> Dek:
    return Dek.generate()


@pytest.mark.parametrize(
    ("state", "kind", "words"),
    [
        ("Disabled", KeyRetired, "disabled"),
        ("PendingDeletion", KeyRetired, "pending deletion"),
        ("PendingImport", ProviderUnavailable, "cannot be used now|in the state PendingImport"),
    ],
)
def test_a_key_that_cannot_be_used_now(kms, make, dek, state, kind, words):
    key = kms.make("model")
    provider = make()
    wrapped = provider.wrap("model", dek, b"c")
    key.state = state
    for call in (
        lambda: provider.unwrap(wrapped, b"c"),
        lambda: provider.wrap("model", dek, b"c"),
    ):
        with pytest.raises(kind, match=words) as caught:
            call()
        assert caught.value.hint
    (found,) = [f for f in provider.check("model").findings if f.name == "key"]
    assert found.status == "failed"
    assert found.hint
    key.state = "Enabled"
    assert provider.unwrap(wrapped, b"c") == dek


def test_doctor_says_when_a_key_will_be_deleted(kms, make):
    key = kms.make("model")
    key.state, key.deletion = "PendingDeletion", 1_800_000_000.0
    health = make().check("model")
    assert "pending deletion on 2027-01-15T08:00:00Z" in health.findings[-1].detail


def test_another_key_is_known_by_its_arn_without_a_call(kms, make, dek):
    first, second = kms.make("a"), kms.make("b")
    provider = make(keys={"model": {"arn": first.arn}})
    wrapped = provider.wrap("model", dek, b"c")
    other = make(keys={"model": {"arn": second.arn}})
    seen = len(kms.seen)
    with pytest.raises(WrongKey, match="no version"):
        other.unwrap(wrapped, b"c")
    assert len(kms.seen) == seen


def test_an_alias_that_was_given_to_another_key(kms, make, dek):
    old = kms.make("model")
    provider = make()
    wrapped = provider.wrap("model", dek, b"c")
    new = kms.make("model")
    # The way out: a second provider, whose table names the old key by its ARN.
    assert make(keys={"model": {"arn": old.arn}}).unwrap(wrapped, b"c") == dek
    with pytest.raises(WrongKey):
        provider.unwrap(wrapped, b"c")
    # A file that claims the new key's id does not open either.
    with pytest.raises(WrongKey, match="another key"):
        provider.unwrap(replace(wrapped, version=new.id), b"c")
    del kms.aliases["alias/keymgmt/model"]
    with pytest.raises(WrongKey, match="no such key"):
        provider.unwrap(wrapped, b"c")


def test_a_device_that_may_only_decrypt(kms, make, dek):
    kms.make("model")
    wrapped = make().wrap("model", dek, b"c")
    kms.deny = lambda operation, *_: None if operation == "Decrypt" else "no policy allows it"
    device = make()
    assert device.unwrap(wrapped, b"c") == dek
    assert kms.called("DescribeKey") == 1  # the sealer's
    with pytest.raises(UnwrapFailed):
        device.unwrap(wrapped, b"another context")
    with pytest.raises(WrongKey):
        device.unwrap(replace(wrapped, version="0"), b"c")


def needs_fleet(operation: str, request: dict[str, Any], who: str) -> str | None:
    """A grant with EncryptionContextSubset (API reference, GrantConstraints)."""
    pairs = request.get("EncryptionContext") or {}
    if operation == "Decrypt" and pairs.get("fleet") != "press-17":
        return "no grant allows the kms:Decrypt action"
    return None


def needs_attestation(operation: str, request: dict[str, Any], who: str) -> str | None:
    """A key policy with kms:RecipientAttestation:ImageSha384: without Recipient it denies."""
    if operation == "Decrypt" and "Recipient" not in request:
        return "no resource-based policy allows the kms:Decrypt action"
    return None


@pytest.mark.parametrize(
    "deny",
    [
        lambda operation, *_: "of an explicit deny in a resource-based policy",
        needs_fleet,
        needs_attestation,
    ],
    ids=["a Deny policy", "a grant's constraint", "an attested recipient is asked for"],
)
def test_denied(kms, make, dek, deny):
    kms.make("model")
    provider = make()
    wrapped = provider.wrap("model", dek, b"c")
    kms.deny = deny
    with pytest.raises(AccessDenied, match=r"denied .*not authorized to perform: kms:Decrypt") as e:
        provider.unwrap(wrapped, b"c")
    assert "keymgmt aws policy" in str(e.value.hint)
    assert kms.called("Decrypt") == 1  # a refusal is not tried again


def test_a_missing_right_is_not_another_key(kms, make, dek):
    """AWS says this of a key that we may not use; what is of another key is IncorrectKey."""
    kms.make("model")
    provider = make()
    wrapped = provider.wrap("model", dek, b"c")
    words = (
        "The ciphertext refers to a customer master key that does not exist, does not exist in "
        "this region, or you are not allowed to access."
    )
    kms.before = lambda *_: says("AccessDeniedException", words)
    with pytest.raises(AccessDenied, match="customer master key") as caught:
        provider.unwrap(wrapped, b"c")
    assert "keymgmt aws policy" in str(caught.value.hint)


def test_a_grant_is_met_by_the_pairs_of_the_settings(kms, make, dek):
    kms.make("model")
    kms.deny = needs_fleet
    provider = make(context={"fleet": "press-17"})
    wrapped = provider.wrap("model", dek, b"c")
    assert provider.unwrap(wrapped, b"c") == dek
    for other in ({"fleet": "press-18"}, {}):
        with pytest.raises(AccessDenied):
            make(context=other).unwrap(wrapped, b"c")
    kms.deny = lambda *_: None
    with pytest.raises(UnwrapFailed, match="other pairs"):
        make(context={"fleet": "press-18"}).unwrap(wrapped, b"c")


def test_what_stands_in_the_encryption_context(kms, make, dek):
    kms.make("model")
    make(context={"fleet": "press-17"}).wrap("model", dek, b"c")
    sent = next(request for name, request, _ in kms.seen if name == "Encrypt")
    assert sent["EncryptionContext"] == {
        "fleet": "press-17",
        "keymgmt-context": "2e7d2c03a9507ae265ecf5b5356885a53393a2029d241394997265a1a25aefc6",
    }


def test_a_clock_that_is_wrong(kms, make, dek):
    kms.make("model")
    kms.clock = 1000.0
    with pytest.raises(AccessDenied, match="clock") as caught:
        make().wrap("model", dek, b"c")
    assert "clock" in str(caught.value.hint)


def test_credentials_that_nobody_has(kms, make, dek, secret_file):
    auth = {"method": "static", "access_key_id": secret_file("AKIANOBODY")}
    auth["secret_access_key"] = secret_file("no-secret-of-anybody")
    with pytest.raises(AccessDenied, match="credentials are refused"):
        make(auth=auth).wrap("model", dek, b"c")
    assert len(kms.seen) == 1


def test_a_session_that_expired_is_replaced_once(kms, make, dek, secret_file):
    kms.make("model")
    names = {"AccessKeyId": "id", "SecretAccessKey": "key", "SessionToken": "token"}

    def issue() -> dict[str, Any]:
        session = kms.session("opener/tests")
        return {ours: secret_file(session[theirs], ours) for theirs, ours in names.items()}

    files = issue()
    auth = {"method": "static", "access_key_id": files["id"]}
    auth |= {"secret_access_key": files["key"], "session_token": files["token"]}
    provider = make(auth=auth)
    wrapped = provider.wrap("model", dek, b"c")
    kms.expire()
    seen = len(kms.seen)
    with pytest.raises(AccessDenied, match="session has expired"):
        provider.unwrap(wrapped, b"c")
    assert len(kms.seen) == seen + 2
    issue()
    assert provider.unwrap(wrapped, b"c") == dek


def test_throttled_for_a_while_and_for_ever(kms, make, dek):
    kms.make("model")
    provider = make(timeout=2.0)
    words = "You have exceeded the rate at which you may call KMS. Reduce the frequency."
    left = [3]

    def throttle(operation: str, *_: Any) -> Any:
        left[0] -= 1
        return says("ThrottlingException", words) if left[0] >= 0 else None

    kms.before = throttle
    wrapped = provider.wrap("model", dek, b"c")
    kms.before = lambda *_: says("ThrottlingException", words)
    with pytest.raises(ProviderUnavailable, match="exceeded the rate") as caught:
        provider.unwrap(wrapped, b"c")
    assert "quota" in str(caught.value.hint)


PAGE = b"<html>a portal</html>"
BOMB = gzip.compress(bytes(1 << 22))


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (says("KMSInternalException", status=500), ProviderUnavailable, "internal fault"),
        ((503, {"Content-Type": "text/html"}, PAGE), ProviderUnavailable, "internal fault"),
        ((200, {"Content-Type": "text/html"}, PAGE), ProviderUnavailable, "no Key"),
        (
            (403, {"Content-Type": "text/html"}, PAGE),
            ProviderUnavailable,
            "another service than AWS",
        ),
        ((200, JSON, b"{}"), ProviderUnavailable, "no Key"),
        ((200, JSON, b"[]"), ProviderError, "cannot|no Key"),
        (False, ProviderUnavailable, "connection broke"),
        ((200, JSON, b'"' + bytes(1 << 20)), ProviderUnavailable, "more than 1048576 bytes"),
        ((200, JSON | {"Content-Encoding": "gzip"}, BOMB), ProviderUnavailable, "another service"),
        (says("DependencyTimeoutException", status=503), ProviderUnavailable, "internal fault"),
        (says("KeyUnavailableException", status=500), ProviderUnavailable, "not available"),
        (says("NobodyHeardOfThisException"), ProviderError, "NobodyHeardOfThis"),
        (says("OptInRequired", status=403), AccessDenied, "region"),
    ],
)
def test_an_answer_of_trouble(kms, make, dek, answer, kind, words):
    kms.make("model")
    provider = make()
    wrapped = provider.wrap("model", dek, b"c")
    kms.before = lambda *_: answer
    hasty = make(timeout=1.2)
    with pytest.raises(kind, match=words):
        hasty.unwrap(wrapped, b"c")
    with pytest.raises(kind, match=words):
        hasty.wrap("model", dek, b"c")
    kms.before = lambda *_: None
    assert provider.unwrap(wrapped, b"c") == dek


def test_what_answers_with_no_data_key(kms, make, dek):
    key = kms.make("model")
    provider = make()
    wrapped = provider.wrap("model", dek, b"c")
    kms.before = lambda *_: (
        200,
        JSON,
        json.dumps({"KeyId": key.arn, "Plaintext": "AAAA"}).encode(),
    )
    with pytest.raises(UnwrapFailed, match="not a data key"):
        provider.unwrap(wrapped, b"c")


def test_a_redirect_is_not_followed(kms, make, dek, simulate):
    kms.make("model")
    elsewhere = simulate("eu-central-1")
    kms.before = lambda *_: (307, {"Location": f"{elsewhere.address}/"}, b"")
    with pytest.raises(ProviderUnavailable, match="another service than AWS"):
        make().wrap("model", dek, b"c")
    assert not elsewhere.seen


@pytest.mark.parametrize("words", ["is pending deletion.", "is pending replica deletion."])
def test_a_key_that_will_be_deleted(kms, make, dek, words):
    key = kms.make("model")
    provider = make()
    wrapped = provider.wrap("model", dek, b"c")
    kms.before = lambda *_: says("KMSInvalidStateException", f"{key.arn} {words}")
    with pytest.raises(KeyRetired, match="pending deletion"):
        provider.unwrap(wrapped, b"c")


def test_an_endpoint_of_another_region(make, dek, simulate):
    elsewhere = simulate("us-east-1")
    elsewhere.user = ("AKIAELSEWHERE", "secret-of-elsewhere")
    provider = make(endpoint=elsewhere.address)
    elsewhere.user = (provider.settings.auth.access_key_id.read().decode(), "x")
    with pytest.raises(KeyNotFound, match="another region") as caught:
        provider.wrap("model", dek, b"c")
    assert "replica" in str(caught.value.hint)


def test_what_changes_something_is_asked_once(kms, make):
    provider = make()
    kms.before = lambda operation, *_: False if operation == "CreateKey" else None
    with pytest.raises(ProviderUnavailable, match="connection broke"):
        provider.create_key("model", "symmetric", {})
    assert kms.called("CreateKey") == 1


def test_an_alias_that_aws_does_not_know_for_a_while(kms, make):
    """Aliases are eventually consistent (AWS KMS Developer Guide), and so not asked for at once."""

    def before(operation: str, *_: Any) -> Any:
        made = kms.called("CreateAlias") and operation == "DescribeKey"
        return says("NotFoundException", "Alias is not found.") if made else None

    kms.before = before
    info = make().create_key("model", "symmetric", {})
    (key,) = kms.keys.values()
    assert (info.key, info.kind, info.versions[0].version) == ("model", "symmetric", key.id)
    assert info.detail["state"] == "Enabled"


def test_a_key_without_an_alias_is_told(kms, make, caplog):
    kms.deny = lambda operation, *_: "no" if operation == "CreateAlias" else None
    with pytest.raises(AccessDenied):
        make().create_key("model", "symmetric", {})
    (key,) = kms.keys.values()
    assert f"the key {key.arn} was made without an alias" in caplog.text


def test_more_rotations_than_aws_allows(kms, make):
    kms.make("model")
    provider = make()
    for _ in range(10):
        provider.rotate_key("model")
    with pytest.raises(UnsupportedOperation, match="limit of AWS"):
        provider.rotate_key("model")


def test_what_does_not_rotate_and_what_is_no_use(kms, make, dek):
    kms.make("rsa", "RSA_2048")
    kms.make("mac", "HMAC_256", "GENERATE_VERIFY_MAC")
    provider = make()
    with pytest.raises(UnsupportedOperation, match="rotates symmetric keys"):
        provider.rotate_key("rsa")
    with pytest.raises(UnsupportedOperation, match="is not usable"):
        provider.wrap("mac", dek, b"c")
    with pytest.raises(ConfigError, match="not usable"):
        provider.create_key("mac", "symmetric", {})
    assert [info.key for info in provider.list_keys()] == ["rsa"]


def test_an_error_holds_no_frame_and_keeps_its_cause(kms, make, dek):
    kms.make("model")
    kms.deny = lambda *_: "no"
    with pytest.raises(AccessDenied) as caught:
        make().wrap("model", dek, b"c")
    cause = caught.value.__cause__
    assert type(cause).__name__ == "ClientError"
    assert cause.__traceback__ is None
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert set(frames) <= {"test_an_error_holds_no_frame_and_keeps_its_cause", "run"}


def test_only_what_is_allowed_for_a_key_unwraps(kms, make, dek):
    arn = kms.make("x").arn
    wrapped = make(keys={"model": {"arn": arn}}).wrap("model", dek, b"c")
    strict = make(keys={"model": {"arn": arn, "mechanisms": ["RSA-OAEP-256"]}})
    with pytest.raises(UnsupportedOperation, match="does not allow SYMMETRIC_DEFAULT"):
        strict.unwrap(wrapped, b"c")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"region": "Frankfurt"}, "region"),
        ({"keys": {"m": {"arn": "arn:aws:kms:us-east-1:111122223333:key/a"}}}, "replica"),
        ({"keys": {"m": {"arn": "arn:aws:s3:::bucket"}}}, "neither an ARN of AWS KMS"),
        ({"keys": {"m": {"arn": "1234abcd-12ab-34cd-56ef-1234567890ab"}}}, "neither an ARN"),
        ({"keys": {"..": {"arn": "alias/a"}}}, "not a key name"),
        ({"keys": {"m": {"arn": "alias/a", "mechanisms": ["none"]}}}, "RSA-OAEP-256"),
        ({"endpoint": "http://kms.eu-central-1.amazonaws.com"}, "not protected"),
        ({"endpoint": "http://localhost:1"}, "not protected"),
        ({"endpoint": "https://user:secret@host"}, "no user name"),
        ({"endpoint": "http://169.254.169.254"}, "not protected"),
        ({"endpoint": "https://host/path"}, "more than"),
        ({"endpoint": "https://host:port"}, "not an address"),
        ({"context": {"keymgmt-context": "x"}}, "not a possible name"),
        ({"context": {"fleet": ""}}, "printable"),
        ({"context": {str(n): "x" for n in range(9)}}, "at most 8|context"),
        ({"alias_prefix": "aws/"}, "manages"),
        ({"auth": {"method": "static", "access_key_id": "AKIA"}}, "secret is not written here"),
        (
            {
                "auth": {
                    "method": "static",
                    "access_key_id": {"env": "A"},
                    "secret_access_key": {"prompt": "key"},
                }
            },
            "secret_access_key\n.*a prompt is not possible",
        ),
        ({"auth": {"method": "container", "uri": {"prompt": "uri"}}}, "a prompt is not possible"),
        ({"auth": {"method": "role", "role_arn": "arn:aws:iam::1:role/x"}}, "role_arn|source"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_settings_that_are_wrong(make, settings, words):
    with pytest.raises(ValidationError) as caught:
        make(**settings)
    assert re.search(words, str(caught.value))
    assert "secret@" not in str(caught.value)
