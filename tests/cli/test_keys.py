"""keymgmt keys."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

Cli = Callable[..., Any]
pytest.importorskip("keymgmt_file")


def test_a_key_is_made_rotated_and_retired(cli, site):
    made = cli("keys", "create", "local:edge", "--json").json()
    assert (made["reference"], made["purpose"], made["newest"]) == ("local:edge", "wrap", "1")
    assert cli("keys", "rotate", "local:edge", "--json").json()["newest"] == "2"
    retired = cli("keys", "retire", "local:edge@1", "--json").json()
    assert [each["state"] for each in retired["versions"]] == ["retired", "active"]
    assert cli("keys", "show", "local:edge", "--json").json() == retired


def test_the_kind_follows_from_what_the_key_is_for(cli, site):
    assert cli("keys", "create", "local:pub", "--sign", "--json").json()["purpose"] == "sign"
    assert cli("keys", "create", "local:q", "--kind", "ml-dsa-65", "--json").json()["kind"] == (
        "ml-dsa-65"
    )


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (("create", "local:models"), "already", "rotate local:models"),
        (("create", "local:x", "--kind", "aes265"), "aes265", "did you mean 'aes256'?"),
        (("create", "local:x", "--kind", "aes256", "--sign"), "does not sign", "leave out"),
        (("create", "local:x", "--option", "bits"), "not an option", "NAME=VALUE"),
        (("create", "local:x", "--option", "bits=4"), "bits", ""),
        (("create", "local:../x"), "not a key name", "lower-case"),
        (("create", "nowhere"), "not a key reference", "provider:key"),
        (("create", "lokal:x"), "no provider named 'lokal'", "did you mean 'local'?"),
        (("show", "local:models@1"), "not a key", "leave out the version"),
        (("retire", "local:models"), "which version", "local:models@VERSION"),
        (("retire", "local:models@1"), "newest", "keys rotate local:models"),
        (("export", "local:publisher", "--sign", "local:publisher"), "--output", ""),
    ],
)
def test_a_wrong_argument_is_the_operators_error_and_changes_nothing(
    cli, site, arguments, said, hint
):
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    ran = cli("keys", *arguments)
    assert ran.code == 3, ran.err
    assert said in ran.error
    assert hint in ran.hint
    assert before == {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}


def test_a_missing_key_is_named_with_the_nearest(cli, site):
    ran = cli("keys", "show", "local:model")
    assert ran.code == 3
    assert "model" in ran.error
    assert "local:models" in ran.hint


def test_export_writes_pem_and_replaces_nothing_unasked(cli, site):
    assert cli("keys", "export", "local:publisher").out == (site / "publisher.pem").read_text()
    (site / "publisher.pem").write_text("mine")
    ran = cli("keys", "export", "local:publisher", "-o", "publisher.pem")
    assert ran.code == 3
    assert "--force" in ran.hint
    assert (site / "publisher.pem").read_text() == "mine"
    assert cli("keys", "export", "local:publisher", "-o", "publisher.pem", "--force").code == 0
    load_pem_public_key((site / "publisher.pem").read_bytes())


def test_a_device_exports_a_recipient_to_which_another_machine_seals(cli, site):
    assert cli("keys", "create", "local:device7", "--kind", "hpke-x25519").code == 0
    exported = cli("keys", "export", "local:device7", "-o", "device7.recipient")
    assert exported.code == 0
    fingerprint = exported.err.split()[-1]
    ran = cli("seal", "model", "d.sealed", "--to", "@device7.recipient")
    assert ran.code == 4
    assert "genuine" in ran.error
    sealing = ("seal", "model", "d.sealed", "--to", "@device7.recipient")
    ran = cli(*sealing, "--fingerprint", fingerprint)
    assert ran.code == 0, ran.err
    assert cli("verify", "d.sealed").code == 0


def test_a_recipient_file_may_be_vouched_for_by_a_trusted_signer(cli, site):
    assert cli("keys", "create", "local:device7", "--kind", "hpke-x25519").code == 0
    ran = cli("keys", "export", "local:device7", "-o", "d.recipient", "--sign", "local:publisher")
    assert ran.code == 0
    config = site / "keymgmt.toml"
    text = config.read_text()
    signers = '[policy]\nrecipient_signers = ["publisher.pem"]\n'
    config.write_text(text.replace("[policy]\n", signers))
    assert cli("seal", "model", "d.sealed", "--to", "@d.recipient").code == 0


def test_a_recipient_file_of_the_config_lies_beside_it(cli, site, monkeypatch):
    assert cli("keys", "create", "local:device7", "--kind", "hpke-x25519").code == 0
    ran = cli("keys", "export", "local:device7", "-o", "d.recipient", "--sign", "local:publisher")
    assert ran.code == 0
    config = site / "keymgmt.toml"
    text = config.read_text().replace('to = ["local:models"]', 'to = ["@d.recipient"]')
    signers = '[policy]\nrecipient_signers = ["publisher.pem"]\n'
    config.write_text(text.replace("[policy]\n", signers))
    monkeypatch.chdir("/")
    assert cli("-c", config, "seal", site / "model", site / "d.sealed").code == 0
    report = cli("-c", config, "doctor", "--json").json()
    assert report["ok"]
    assert {"recipient signer publisher.pem", f"recipient @{site / 'd.recipient'}"} <= {
        finding["name"] for finding in report["findings"]
    }


def test_usage_says_what_each_version_opens_and_guards_retiring(cli, sealed):
    assert cli("keys", "rotate", "local:models").code == 0
    shown = cli("keys", "usage", ".", "local:models")
    assert "opens 1 model, is the only way into 1" in shown.out
    assert "not named in this tree" in shown.out
    refused = cli("keys", "retire", "local:models@1", "--tree", ".")
    assert refused.code == 3
    assert "opens 1 model" in refused.error
    assert "keymgmt rewrap" in refused.hint
    assert cli("rewrap", ".").code == 0
    assert "none of 1 model" in cli("keys", "retire", "local:models@1", "--tree", ".").err
    rows = list(csv.DictReader(io.StringIO(cli("keys", "usage", ".", "--csv").out)))
    assert [(row["version"], row["opens"]) for row in rows] == [("2", "1")]


def test_what_cannot_be_read_blocks_the_verdict(cli, sealed):
    assert cli("keys", "rotate", "local:models").code == 0
    (sealed / "keys.json").write_bytes(b"{}")
    ran = cli("keys", "usage", ".", "local:models", "--json")
    assert ran.code == 4
    assert ran.json()["complete"] is False
    refused = cli("keys", "retire", "local:models@1", "--tree", ".")
    assert refused.code == 3
    assert "cannot be read" in refused.error


def test_listing_shows_the_others_where_one_provider_is_down(cli, site):
    config = site / "keymgmt.toml"
    config.write_text('[providers.gone]\nbackend = "file"\npath = "gone"\n' + config.read_text())
    (site / "gone").mkdir(mode=0o700)
    (site / "gone" / "damaged.jwks").touch(mode=0o600)
    ran = cli("keys", "list", "--json")
    assert ran.code == 1
    assert [key["reference"] for key in ran.json()["keys"]] == ["local:models", "local:publisher"]
    assert "damaged" in ran.error


def test_a_recipient_file_of_another_machine_is_vouched_for(cli, site):
    cli("keys", "create", "local:device7", "--kind", "hpke-p256")
    exported = cli("keys", "export", "local:device7", "-o", "d.recipient")
    fingerprint = exported.err.split("fingerprint ")[1].strip()
    wrong = ("keys", "vouch", "d.recipient", "--sign", "local:publisher", "--fingerprint")
    assert "another fingerprint" in cli(*wrong, "0" * 64).error
    assert not (site / "d.recipient.sig").exists()
    assert cli(*wrong, fingerprint).code == 0
    assert (site / "d.recipient.sig").exists()


def test_who_rotates_a_publisher_learns_that_its_own_config_does_not_trust_it(cli, site):
    ran = cli("keys", "rotate", "local:publisher")
    assert ran.code == 0
    assert "does not trust the newest version of local:publisher" in ran.err
    assert "keys export local:publisher" in ran.hint
    report = cli("doctor", "--json").json()
    (found,) = (one for one in report["findings"] if one["name"] == "[seal] sign")
    assert found["status"] == "warning"
    ran = cli("seal", "model", "model.sealed", "--json")
    assert "this config would not open it" in ran.err
    assert "signed by nobody" in ran.json()["refusal"]
    ran = cli("reseal", "model.sealed")
    assert ran.code == 4
    # The way out that was printed.
    assert cli(*["keys", "export", "local:publisher", "--format", "pem", "-o", "NEW.pem"]).code == 0
    config = site / "keymgmt.toml"
    config.write_text(config.read_text().replace('"publisher.pem" =', '"NEW.pem" ='))
    ran = cli("reseal", "model.sealed", "--json")
    assert (ran.code, ran.json()["refusal"]) == (0, None)
    assert "warning" not in ran.err
    report = cli("doctor", "--json").json()
    (found,) = (one for one in report["findings"] if one["name"] == "[seal] sign")
    assert found["status"] == "ok"
    assert "warning" not in cli("keys", "rotate", "local:models").err


def test_a_name_without_a_release_floor_is_said_when_it_is_sealed(cli, site):
    config = site / "keymgmt.toml"
    config.write_text(
        config.read_text().replace("[policy]\n", "[policy]\nminimum_release = { other = 1 }\n")
    )
    ran = cli("seal", "model", "model.sealed", "--name", "resnet50")
    assert "this config would not open it" in ran.err
    assert "minimum_release" in ran.err
    ran = cli("sign", "model.sealed", "--json")
    assert "minimum_release" in ran.json()["refusal"]


def test_a_release_that_locks_a_name_for_ever_is_not_taken_just_so(cli, site):
    ran = cli("seal", "model", "model.sealed", "--release", str(2**53 - 1))
    assert ran.code == 3
    assert "leaves 0 numbers for later releases" in ran.error
    assert not (site / "model.sealed").exists()
    assert cli("seal", "model", "model.sealed", "--release", "20261128").code == 0
    assert cli("reseal", "model.sealed", "--release", str(2**53 - 2)).code == 3


def test_every_version_of_a_publishers_key_is_exported(cli, site):
    first = (site / "publisher.pem").read_text()
    assert cli("keys", "rotate", "local:publisher").code == 0
    assert cli("keys", "export", "local:publisher@1").out == first
    second = cli("keys", "export", "local:publisher@2").out
    assert second == cli("keys", "export", "local:publisher").out != first
    ran = cli("keys", "export", "local:publisher@3")
    assert "no version '3'" in ran.error
    assert "1, 2" in ran.hint
    assert cli("keys", "create", "local:device7", "--kind", "hpke-x25519").code == 0
    ran = cli("keys", "export", "local:device7@1")
    assert ran.code == 3
    assert "local:device7" in ran.hint


def test_unknown_is_never_zero(cli, site, sealed):
    assert cli("keys", "rotate", "local:models").code == 0
    (site / "nowhere").symlink_to("gone")
    ran = cli("keys", "usage", ".", "local:models", "--csv")
    assert ran.code == 4
    rows = {row["version"]: row for row in csv.DictReader(io.StringIO(ran.out))}
    assert (rows["1"]["opens"], rows["2"]["opens"]) == ("1", "unknown")
    report = cli("keys", "usage", ".", "local:models", "--json").json()
    assert report["unknown"] == [{"backend": "file", "key": "models", "version": "2"}]
    assert "not_referenced" not in report
    assert "unknown" in cli("keys", "usage", ".", "local:models").out
    (site / "nowhere").unlink()
    report = cli("keys", "usage", ".", "local:models", "--json").json()
    assert report["not_referenced"] == [{"backend": "file", "key": "models", "version": "2"}]


def test_a_refusal_to_retire_is_enough_for_a_job_to_decide(cli, site, sealed):
    assert cli("keys", "rotate", "local:models").code == 0
    (site / "live").mkdir()
    (site / "live" / "now.sealed").symlink_to(sealed)
    ran = cli("keys", "retire", "local:models@1", "--tree", "live", "--json")
    assert ran.code == 3
    said = ran.json()
    assert (said["verdict"], said["proved"], said["models"]) == ("needed", True, 1)
    assert said["only_way_into"] == ["live/now.sealed"]
    assert said["links"] == [{"path": "live/now.sealed", "target": str(sealed)}]
    assert ran.hint.startswith("first: keymgmt rewrap live;")
    assert cli("rewrap", "live").code == 0
    ran = cli("keys", "retire", "local:models@1", "--tree", "live", "--tree", "misspelt", "--json")
    assert ran.json()["verdict"] == "unknown"
    retiring = ("keys", "retire", "local:models@1", "--tree", "live", "--tree", ".")
    retired = cli(*retiring, "--names-only", "--json").json()
    assert [each["state"] for each in retired["versions"]] == ["retired", "active"]
    looked_at = retired["looked_at"]
    assert (looked_at["verdict"], looked_at["proved"]) == ("not_referenced", False)
    assert (looked_at["trees"], looked_at["models"]) == (["live", "."], 1)
    assert looked_at["failures"] == []
    # Again: it is retired already, and that is no fault; nothing can be tried with it any more.
    assert "looked_at" not in cli(*retiring, "--json").json()
    assert cli("keys", "retire", "local:models@1", "--names-only").code == 3


def test_a_key_is_deleted_when_nothing_needs_it(cli, sealed):
    delete = ("keys", "delete", "local:edge", "--yes")
    assert cli("keys", "create", "local:edge").code == 0
    assert cli("rewrap", ".", "--add", "local:edge").code == 0
    assert cli("keys", "rotate", "local:edge").code == 0
    unlooked = cli(*delete)
    assert (unlooked.code, unlooked.error) == (
        3,
        "it was not checked whether local:edge opens a model",
    )
    # An old version, and also one that is retired: that can be undone until the key is gone.
    for _ in range(2):
        needed = cli(*delete, "--tree", ".", "--json")
        assert (needed.code, needed.json()["verdict"]) == (3, "needed")
        assert "rewrap --add" in needed.hint
        assert cli("keys", "retire", "local:edge@1").code == 0
    assert cli("rewrap", ".", "--drop", "file:edge").code == 0
    assert cli(*delete, "--tree", "misspelt").code == 3
    assert cli("keys", "show", "local:edge").code == 0
    # Version 1 is retired; that it is none of the model's is known, since that one opens.
    deleted = cli(*delete, "--tree", ".", "--json").json()
    looked_at = deleted["looked_at"]
    assert (looked_at["verdict"], looked_at["models"]) == ("not_referenced", 1)
    # By its name alone: nobody can try it.
    assert looked_at["proved"] is False
    assert cli("keys", "show", "local:edge").code == 3
    assert cli(*delete, "--force").code == 3
    assert cli("verify", sealed).code == 0


def test_a_key_is_not_deleted_by_the_way(cli, sealed):
    assert cli("keys", "create", "local:edge").code == 0
    nobody = cli("keys", "delete", "local:edge", "--tree", ".")
    assert (nobody.code, nobody.hint) == (3, "to go on, give --yes")
    for key in ("local:models", "local:publisher"):
        named = cli("keys", "delete", key, "--yes", "--tree", ".")
        assert (named.code, named.error) == (3, f"[seal] in the config names {key}")
    assert cli("keys", "delete", "local:edge@1", "--yes", "--force").code == 3
    assert cli("keys", "delete", "local:edge", "--yes", "--force", "--tree", ".").code == 3
    assert cli("keys", "delete", "local:edge", "--yes", "--names-only").code == 3
    assert cli("keys", "show", "local:edge").code == 0
    # What verifies is the public key; a key that signs opens nothing, and no tree is asked for.
    assert cli("keys", "create", "local:former", "--sign").code == 0
    deleted = cli("keys", "delete", "local:former", "--yes", "--json").json()
    assert deleted == {
        "format": "keymgmt-delete/1",
        "reference": "local:former",
        "until": None,
    }


TOY = """
from typing import ClassVar
from keymgmt.backend import Health, KeyProvider, Settings

class Toy(KeyProvider[Settings]):
    backend: ClassVar[str] = "toy"
    Settings = Settings
    def wrap(self, key, dek, context): ...
    def unwrap(self, wrapped, context): ...
    def check(self, key=None): return Health(())
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("keys", "create", "toy:a"),
        ("keys", "show", "toy:a"),
        ("keys", "rotate", "toy:a"),
        ("keys", "retire", "toy:a@1"),
        ("keys", "delete", "toy:a", "--force", "--yes"),
        ("keys", "export", "toy:a"),
        ("keys", "export", "toy:a", "--format", "recipient"),
        ("sign", "model.sealed", "toy:a"),
    ],
    ids=" ".join,
)
def test_what_a_backend_cannot_do_is_a_wrong_argument_for_every_command(
    cli, site, sealed, install, arguments
):
    install("toy-keymgmt", "keymgmt.backends", {"toy": "toy_backend:Toy"}, toy_backend=TOY)
    with (site / "keymgmt.toml").open("a") as config:
        config.write('[providers.toy]\nbackend = "toy"\n')
    ran = cli(*arguments)
    assert ran.code == 3, ran.err
    assert ran.error.startswith("the provider toy (toy) ")
    assert "keymgmt backends" in ran.hint
