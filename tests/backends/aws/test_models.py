"""Models, policies and doctor with AWS KMS: the command line on the simulation, keys on moto."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import keymgmt
import keymgmt.cli
from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    Dek,
    KeymgmtError,
    Recipient,
    UnsupportedOperation,
    UnwrapFailed,
    wrap_for,
)

PAGE = Path(__file__).parents[3] / "docs" / "backends" / "aws.md"
Run = Callable[..., str]


@pytest.fixture
def site(
    kms,
    secret_file,
    tmp_path,
    monkeypatch,
    capsys,
) -> Run:
    """A config of two regions' providers, and a way to run commands beside it."""
    name, secret = kms.user
    keys = f"access_key_id = {{ file = '{secret_file(name)['file']}' }}, "
    keys += f"secret_access_key = {{ file = '{secret_file(secret)['file']}' }}"
    (tmp_path / "keymgmt.toml").write_text(
        '[providers.cloud]\nbackend = "aws"\nregion = "eu-central-1"\n'
        f'endpoint = "{kms.address}"\nsts_endpoint = "{kms.address}"\n'
        f'auth = {{ method = "static", {keys} }}\ncontext = {{ fleet = "press-17" }}\n'
        '[policy]\npublishers = { "publisher.pem" = ["*"] }\n'
        '[seal]\nsign = "cloud:publisher"\nto = ["cloud:resnet50"]\n'
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(os.urandom(1 << 20))

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["keymgmt", "-c", "keymgmt.toml", *arguments])
        try:
            keymgmt.cli.main()
            returned: Any = 0
        except SystemExit as ended:
            returned = ended.code or 0
        said = capsys.readouterr()
        assert returned == code, said.out + said.err
        return said.out + said.err

    return run


def test_a_model_by_the_command_line(kms, site, tmp_path):
    """The commands of docs/backends/aws.md, in their order."""
    site("keys", "create", "cloud:resnet50")
    site("keys", "create", "cloud:publisher", "--sign")
    site("keys", "export", "cloud:publisher", "-o", "publisher.pem")
    assert "round trip" in site("doctor", "cloud:resnet50")
    site("seal", "model", "resnet50.sealed", "--name", "resnet50", "--release", "1")
    site("unseal", "resnet50.sealed", "plain")
    weights = (tmp_path / "model" / "weights.bin").read_bytes()
    assert (tmp_path / "plain" / "weights.bin").read_bytes() == weights
    (key,) = (key for key in kms.keys.values() if key.spec == "SYMMETRIC_DEFAULT")

    # Rotation inside of AWS: nothing is rewrapped, and all is counted by the key.
    before = (tmp_path / "resnet50.sealed" / "keys.json").read_bytes()
    assert key.id in site("keys", "rotate", "cloud:resnet50")
    assert len(key.material) == 2
    site("verify", "resnet50.sealed")
    site("unseal", "resnet50.sealed", "again")
    assert (tmp_path / "resnet50.sealed" / "keys.json").read_bytes() == before
    counted = " ".join(site("keys", "usage", ".", "cloud:resnet50", "--csv").split())
    assert re.search(rf"aws,resnet50,{key.id},name,,1,1", counted), counted

    # What takes the place of retiring a version: a new key.
    said = site("keys", "retire", f"cloud:resnet50@{key.id}", code=1)
    assert "AWS KMS cannot retire a version" in said
    hint = " ".join(said.split()).replace("PROVIDER:NEW", "cloud:resnet50-2027")
    for command in re.findall(r"keymgmt ([^;]*)", hint):
        site(*command.replace("MODEL", "resnet50.sealed").split())
    key.state = "Disabled"
    site("unseal", "resnet50.sealed", "third")
    assert "disabled" in site("doctor", "cloud:resnet50", code=1)

    # AWS waits, and what is waited for is said, also the second time.
    assert "it was not checked" in site("keys", "delete", "cloud:resnet50-2027", "--yes", code=3)
    delete = ("keys", "delete", "cloud:resnet50-2027", "--tree", ".", "--yes")
    assert "opens 1 model" in site(*delete, code=3)
    said = site(*delete[:3], "--force", "--yes")
    assert re.search(r"cannot be used any more, and is deleted at \d{4}-\d\d-\d\dT", said)
    assert site(*delete[:3], "--force", "--yes") == said
    assert "pending deletion" in site("verify", "resnet50.sealed", code=5)


def test_a_disabled_key_that_is_the_only_way_in_is_not_deleted_by_its_other_name(kms, site):
    site("keys", "create", "cloud:resnet50")
    site("keys", "create", "cloud:publisher", "--sign")
    site("keys", "export", "cloud:publisher", "-o", "publisher.pem")
    site("seal", "model", "resnet50.sealed", "--name", "resnet50", "--release", "1")
    key = kms.keys[kms.aliases["alias/keymgmt/resnet50"]]
    kms.aliases["alias/keymgmt/second"] = key.id
    delete = ("keys", "delete", "cloud:second", "--tree", ".", "--yes")
    assert "opens 1 model" in site(*delete, code=3)
    key.state = "Disabled"
    need = keymgmt.needs("cloud:second", ".", keys="keymgmt.toml")
    assert (need.verdict, need.proved, need.opens) == ("unknown", False, ())
    said = " ".join(site(*delete, code=3).split())
    assert f"cloud:second@{key.id} is retired, so it cannot be tried" in said
    assert "--names-only" in said
    assert key.state == "Disabled"
    # Nor does the config's own proof count it as nobody's.
    assert not keymgmt.usage(".", prove="keymgmt.toml").to_json()["complete"]
    assert "by name" in site(*delete, "--names-only")
    assert key.state == "PendingDeletion"


def test_a_model_that_others_seal_offline(kms, site, tmp_path):
    kms.make("publisher", "ML_DSA_65")
    site("keys", "export", "cloud:publisher", "-o", "publisher.pem")
    site("keys", "create", "cloud:office", "--kind", "rsa-3072")
    said = site("keys", "export", "cloud:office", "-o", "office.recipient")
    fingerprint = said.split("fingerprint ")[1].split()[0]
    to = ("--to", "@office.recipient", "--fingerprint", fingerprint)
    site("seal", "model", "m.sealed", "--name", "m", "--release", "1", *to)
    asked = [name for name, _, _ in kms.seen if name in ("Encrypt", "Decrypt")]
    assert not asked
    site("unseal", "m.sealed", "plain")
    assert "office" in site("doctor", "cloud:office")
    site("keys", "rotate", "cloud:office", code=1)


def test_the_core_alone_wraps_for_an_rsa_key(kms, make):
    kms.make("office", "RSA_2048")
    provider = make()
    recipient = Recipient.from_bytes(provider.export_recipient("office").to_bytes())
    with Dek.generate() as dek:
        assert provider.unwrap(wrap_for(recipient, dek, b"c"), b"c") == dek
        # The provider itself wraps the same way.
        wrapped = provider.wrap("office", dek, b"c")
        assert wrapped.mechanism == "RSA-OAEP-256"
        assert provider.unwrap(wrapped, b"c") == dek
        with pytest.raises(UnwrapFailed):
            provider.unwrap(wrapped, b"d")


def test_sealed_in_one_region_opened_in_another(kms, make, simulate):
    there = simulate("us-east-1")
    there.user = kms.user
    here = make()
    info = here.create_key("model", "symmetric", {"multi-region": "yes"})
    assert info.detail["multi-Region"] == "primary"
    assert info.newest.startswith("mrk-")
    assert "replicas" not in info.detail
    replica = kms.replicate(kms.keys[info.newest], there)
    other = make(
        region="us-east-1",
        endpoint=there.address,
        sts_endpoint=there.address,
        keys={"model": {"arn": replica.arn}},
    )
    with Dek.generate() as dek:
        assert other.unwrap(here.wrap("model", dek, b"c"), b"c") == dek
        assert here.unwrap(other.wrap("model", dek, b"c"), b"c") == dek
    # AWS would delete the primary some time after its replicas, and cannot say when.
    with pytest.raises(UnsupportedOperation, match=r"replicas.*us-east-1"):
        here.delete_key("model")
    assert here.describe_key("model").detail["state"] == "Enabled"
    assert other.describe_key("model").detail["multi-Region"] == "replica"
    other.delete_key("model")


def test_lists_go_by_prefix_and_table_over_pages(kms, make):
    kms.page = 2
    other = kms.make()
    for name in ("b", "a", "with.dot"):
        kms.make(name.replace(".", "/"))
    kms.aliases["alias/elsewhere/c"] = other.id
    kms.aliases["alias/keymgmt/Not-A-Name"] = other.id
    provider = make(keys={"mine": {"arn": "alias/elsewhere/c"}})
    listed = provider.list_keys()
    assert [info.key for info in listed] == ["a", "b", "mine", "with.dot"]
    assert listed[2].newest == other.id
    asked = [request for name, request, _ in kms.seen if name == "ListAliases"]
    assert [request["Limit"] for request in asked] == [100, 100, 100]
    with Dek.generate() as dek:
        assert provider.unwrap(provider.wrap("with.dot", dek, b""), b"") == dek


# doctor.


def findings(provider: Any, *key: str) -> dict[str, tuple[str, str]]:
    return {f.name: (f.status, f"{f.detail} {f.hint or ''}") for f in provider.check(*key).findings}


def test_doctor_says_who_we_are_and_that_it_answers(kms, make):
    found = findings(make())
    assert found["login"] == ("ok", "by static: arn:aws:iam::111122223333:user/tests ")
    assert found["service"] == ("ok", f"{kms.address} answers ")
    kms.deny = lambda *_: "no policy"
    assert findings(make())["service"][0] == "ok"


def test_doctor_without_a_way_to_sts(kms, make):
    kms.make("model")
    provider = make(sts_endpoint="http://127.0.0.1:9", timeout=1.5)
    found = findings(provider, "model")
    assert found["login"][0] == "warning"
    assert found["round trip"][0] == "ok"
    assert findings(provider)["service"][0] == "ok"
    kms.user = ("AKIAOTHER", "x")
    assert findings(provider)["service"][0] == "failed"


def test_doctor_says_what_we_may(kms, make):
    kms.make("model")
    kms.make("publisher", "ECC_NIST_P256")
    provider = make(context={"fleet": "press-17"})
    found = findings(provider, "model")
    assert found["unwrap"][0] == found["round trip"][0] == found["context"][0] == "ok"
    assert findings(provider, "publisher")["signature"] == ("ok", "signed ")
    may: set[str] = set()
    kms.deny = lambda operation, *_: None if operation in may else "no policy allows it"
    found = findings(provider, "model")
    assert (found["key"][0], found["unwrap"][0]) == ("skipped", "skipped")
    assert "keymgmt aws policy" in found["unwrap"][1]
    may = {"DescribeKey", "Encrypt"}
    assert findings(provider, "model")["round trip"][0] == "skipped"
    may = {"DescribeKey", "GetPublicKey"}
    assert findings(provider, "publisher")["signature"][0] == "skipped"


@pytest.mark.parametrize(
    ("region", "partition"),
    [
        ("eu-central-1", "aws"),
        ("us-gov-west-1", "aws-us-gov"),
        ("us-iso-east-1", "aws-iso"),
        ("us-isob-east-1", "aws-iso-b"),
        ("cn-north-1", "aws-cn"),
        ("eusc-de-east-1", "aws-eusc"),
    ],
)
def test_a_policy_is_of_the_partition_of_its_region(make, region, partition):
    from keymgmt_aws._policies import policy_of

    for role in ("open", "operate"):
        printed = policy_of(role, make(region=region).settings, "model", None)
        named = [one["Resource"] for one in json.loads(printed)["Statement"]]
        named = [resource for resource in named if resource != "*"]
        assert named
        assert all(f"arn:{partition}:kms:{region}:*:key/*" in resource for resource in named)


def test_a_policy_of_a_region_that_is_not_known(make):
    from keymgmt_aws._policies import policy_of

    with pytest.raises(ConfigError, match="partition"):
        policy_of("open", make(region="moon-base-1").settings, "model", None)
    alias = "arn:aws-moon:kms:moon-base-1:111122223333:alias/model"
    settings = make(region="moon-base-1", keys={"model": {"arn": alias}}).settings
    for role, account in (("open", "111122223333"), ("operate", "*")):
        keys = f"arn:aws-moon:kms:moon-base-1:{account}:key/*"
        assert keys in policy_of(role, settings, "model", None)


def test_doctor_says_whether_a_policy_asks_for_the_context(kms, make):
    kms.make("model")
    provider = make(context={"fleet": "press-17"})

    def policies() -> dict[str, str]:
        found = [f for f in provider.check("model").findings if f.name == "policy"]
        return {f.detail.split(" requires ")[1].split()[0]: f.status for f in found}

    assert policies() == {"keymgmt-context": "warning", "fleet": "warning"}

    def deny(operation: str, request: dict[str, Any], who: str) -> str | None:
        pairs = request.get("EncryptionContext") or {}
        asked = operation == "Decrypt" and "keymgmt-context" not in pairs
        return "no policy allows it" if asked else None

    kms.deny = deny
    assert policies() == {"keymgmt-context": "ok", "fleet": "warning"}


def test_doctor_notices_a_service_that_binds_nothing(kms, make, monkeypatch):
    kms.make("model")
    monkeypatch.setattr(kms, "_bound", lambda key, request: b"")
    assert findings(make(), "model")["context"][0] == "failed"


# Policies.


def allows(policy: dict[str, Any], kms: Any) -> Any:
    """IAM's evaluation, as far as our policies need it (IAM user guide, policy evaluation)."""

    def holds(kind: str, name: str, wanted: str, request: dict[str, Any], key: Any) -> bool:
        aliases = [alias for alias, owner in kms.aliases.items() if key and owner == key.id]
        pairs = request.get("EncryptionContext") or {}
        have = pairs.get(name.removeprefix("kms:EncryptionContext:"))
        return {
            "Null": (have is None) == (wanted == "true"),
            "StringEquals": have == wanted,
            "ForAnyValue:StringEquals": wanted in aliases,
            "ForAnyValue:StringLike": bool(fnmatch.filter(aliases, wanted)),
        }[kind]

    def allowed(operation: str, request: dict[str, Any], resource: str, key: Any) -> bool:
        for one in policy["Statement"]:
            places = one["Resource"] if isinstance(one["Resource"], list) else [one["Resource"]]
            if (
                f"kms:{operation}" in one["Action"]
                and any(fnmatch.fnmatchcase(resource, place) for place in places)
                and all(
                    holds(kind, name, wanted, request, key)
                    for kind, tests in one.get("Condition", {}).items()
                    for name, wanted in tests.items()
                )
            ):
                return True
        return False

    def deny(operation: str, request: dict[str, Any], who: str) -> str | None:
        where = f"arn:aws:kms:{kms.region}:111122223333:"
        resources: list[tuple[str, Any]] = []
        if name := request.get("KeyId") or request.get("TargetKeyId"):
            if name in kms.aliases or not str(name).startswith("alias/"):
                key = kms._find({"KeyId": name})
                resources.append((key.arn, key))
        else:
            resources.append(("*", None))
        if alias := request.get("AliasName"):
            resources.append((where + alias, None))
        right = all(allowed(operation, request, *one) for one in resources)
        return None if right else "no identity-based policy allows it"

    return deny


MAY = {
    "open": {"unwrap"},
    "seal": {"wrap", "describe"},
    "publish": {"sign", "describe the publisher"},
    "operate": {"describe", "rotate", "create", "list"},
}


@pytest.mark.parametrize("named", ["by alias", "by ARN"])
@pytest.mark.parametrize("role", MAY)
def test_a_role_does_its_work_and_nothing_else(kms, make, role, named):
    from keymgmt_aws._policies import policy_of

    mine, other = ("publisher", "elsewhere") if role == "publish" else ("model", "elsewhere")
    kms.make("publisher", "ECC_NIST_P256")
    arns = {"model": kms.make("model").arn, "publisher": "alias/keymgmt/publisher"}
    arns["publisher"] = kms.keys[kms.aliases["alias/keymgmt/publisher"]].arn
    # What stands beside: by an alias that is not of our prefix.
    kms.aliases["alias/strangers"] = kms.make().id
    keys = {other: {"arn": "alias/strangers"}}
    if named == "by ARN":
        keys |= {key: {"arn": arn} for key, arn in arns.items()}
        kms.aliases = {"alias/strangers": kms.aliases["alias/strangers"]}
    provider = make(keys=keys, context={"fleet": "press-17"})
    dek = Dek.generate()
    wrapped, theirs = provider.wrap("model", dek, b"c"), provider.wrap(other, dek, b"c")
    work: dict[str, Callable[[], Any]] = {
        "wrap": lambda: provider.wrap("model", dek, b"c"),
        "unwrap": lambda: provider.unwrap(wrapped, b"c"),
        "describe": lambda: provider.describe_key("model"),
        "describe the publisher": lambda: provider.describe_key("publisher"),
        "rotate": lambda: provider.rotate_key("model"),
        "sign": lambda: provider.sign("publisher", b"m"),
        "create": lambda: provider.create_key("new", "symmetric", {}),
        "list": provider.list_keys,
        "wrap under another": lambda: provider.wrap(other, dek, b"c"),
        "unwrap another": lambda: provider.unwrap(theirs, b"c"),
        "describe another": lambda: provider.describe_key(other),
        "rotate another": lambda: provider.rotate_key(other),
    }
    kms.deny = allows(json.loads(policy_of(role, provider.settings, mine, None)), kms)
    done = set()
    for what, call in work.items():
        with contextlib.suppress(AccessDenied):
            call()
            done.add(what)
    # The operator looks after all that has our prefix, which the publisher's key has not by ARN.
    more = {"describe the publisher"} if role == "operate" and named == "by alias" else set()
    assert done == MAY[role] | more
    if role == "open":
        for context in ({}, {"fleet": "press-18"}):
            with pytest.raises(AccessDenied):
                make(keys=keys, context=context).unwrap(wrapped, b"c")


def test_policies_are_those_of_the_manual(site, tmp_path):
    page = PAGE.read_text()
    for role in MAY:
        printed = site("aws", "policy", role, "cloud:resnet50")
        assert json.loads(printed)["Version"] == "2012-10-17"
        if role == "open":
            assert printed in page
    principal = "arn:aws:iam::111122223333:role/press"
    printed = site("aws", "policy", "open", "cloud:resnet50", "--principal", principal)
    assert printed in page
    (statement,) = json.loads(printed)["Statement"]
    assert (statement["Principal"], statement["Resource"]) == ({"AWS": principal}, "*")
    site("aws", "policy", "open", "cloud:../x", code=3)
    site("aws", "policy", "open", "elsewhere:model", code=3)
    site("aws", "policy", "rule", "cloud:model", code=2)


def test_every_error_of_ours_has_a_way_out(kms, make):
    with pytest.raises(KeymgmtError) as caught:
        make().wrap("missing", Dek.generate(), b"c")
    assert "keymgmt keys create" in str(caught.value.hint)


@pytest.mark.once
def test_a_command_that_is_stopped_prints_no_traceback(site, tmp_path, ends_quietly):
    ends_quietly("-c", "keymgmt.toml", "aws", "policy", "open", "cloud:resnet50", cwd=tmp_path)
