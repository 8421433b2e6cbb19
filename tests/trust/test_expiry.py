"""Until when publishers vouch, how many of them must, and a clock that was put back."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta

import pytest

import keymgmt
from keymgmt import errors
from keymgmt._crypto.signatures import PublicKey
from keymgmt._system.strict_json import dump_json
from keymgmt._trust import candidate
from keymgmt._trust.release_memory import ReleaseMemory
from keymgmt.sealed.times import is_time, utc_text


def later(**difference: float) -> datetime:
    return datetime.now(UTC) + timedelta(**difference)


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that is read when a model is looked at."""
    return lambda **difference: monkeypatch.setattr(
        candidate, "utc_text", lambda: utc_text(later(**difference))
    )


def sign(site, path, key="local:publisher", **difference):
    keymgmt.sign(path, key=key, expires=later(**difference), keys=site.config())


def opens(path, config) -> None:
    with keymgmt.open(path, keys=config) as model:
        assert model.read("model.xml")


def test_it_opens_until_its_time_and_then_is_renewed(site, clock):
    path = site.seal()
    before = json.loads((path / "signatures.json").read_bytes())["signatures"]
    sign(site, path, days=30)
    opens(path, site.config())
    clock(days=30, seconds=5)
    with pytest.raises(errors.ModelExpired, match=r"pub\.pem vouched for it until") as caught:
        keymgmt.open(path, keys=site.config())
    assert caught.value.exit_code == 4
    assert "sign" in str(caught.value.hint)
    # No key that opens, no wrap, no digest: the payload is not even there.
    (path / "payload").rename(path.parent / "payload")
    (path / "payload").mkdir()
    sign(site, path, days=60)
    (path / "payload").rmdir()
    (path.parent / "payload").rename(path / "payload")
    opens(path, site.config())
    after = json.loads((path / "signatures.json").read_bytes())
    assert after["signatures"] == before
    assert len(after["expiries"]) == 1


def test_a_config_may_warn_only(site, clock, caplog):
    path = site.seal()
    sign(site, path, days=1)
    clock(days=2)
    with caplog.at_level(logging.INFO):
        opens(path, site.config(expired="warn"))
    (event,) = [
        r.audit for r in caplog.records if getattr(r, "audit", {}).get("event") == "expired"
    ]
    assert event["outcome"] == "ModelExpired"
    assert any(r.levelname == "WARNING" and r.name == "keymgmt" for r in caplog.records)


def test_a_reseal_is_no_way_around_a_time_that_has_passed(site, clock):
    path = site.seal()
    sign(site, path, days=1)
    clock(days=2)
    keymgmt.reseal(path, to=["local:b"], keys=site.config(expired="warn"))
    with pytest.raises(errors.ModelExpired):
        keymgmt.open(path, keys=site.config())
    opens(path, site.config(expired="warn"))


def test_a_statement_that_was_taken_away_or_changed(site, clock):
    path = site.seal()
    sign(site, path, days=1)
    file = path / "signatures.json"
    whole = json.loads(file.read_bytes())
    file.write_bytes(dump_json(whole | {"expiries": []}))
    opens(path, site.config())
    strict = site.config(require_expiry=["model"])
    with pytest.raises(errors.ModelExpired, match="did not say until when"):
        keymgmt.open(path, keys=strict)
    longer = whole["expiries"][0] | {"expires": utc_text(later(days=900))}
    file.write_bytes(dump_json(whole | {"expiries": [longer]}))
    for config in (strict, site.config(), site.config(expired="warn")):
        with pytest.raises(errors.UntrustedPublisher, match=r"expiry of pub\.pem"):
            keymgmt.open(path, keys=config)
    # A stranger may add his own, which says nothing of the publisher's.
    file.write_bytes(dump_json(whole))
    sign(site, path, key="local:stranger", days=900)
    clock(days=2)
    with pytest.raises(errors.ModelExpired):
        keymgmt.open(path, keys=site.config())


def test_the_statement_of_another_manifest(site):
    path, other = site.seal(), site.seal(target="n.sealed")
    sign(site, other, days=900)
    mine = json.loads((path / "signatures.json").read_bytes())
    foreign = json.loads((other / "signatures.json").read_bytes())
    (path / "signatures.json").write_bytes(dump_json(mine | {"expiries": foreign["expiries"]}))
    with pytest.raises(errors.UntrustedPublisher, match="expiry"):
        keymgmt.open(path, keys=site.config())


@pytest.mark.parametrize("moment", [later(days=-1), datetime(2090, 1, 1)])
def test_no_time_to_come(site, moment):
    path = site.seal()
    with pytest.raises(errors.ConfigError, match="no time to come"):
        keymgmt.sign(path, key="local:publisher", expires=moment, keys=site.config())


def test_two_of_three_by_different_keys(site, tmp_path):
    provider = site.config().provider("local")
    for key in ("second", "third"):
        provider.create_key(key, "ed25519", {})
        (site.root / f"{key}.pem").write_bytes(PublicKey(provider.public_key(key)).to_pem())
    # The same key in another file, and in another spelling of PEM.
    (site.root / "again.pem").write_bytes((site.root / "pub.pem").read_bytes() + b"\n")
    files = ["pub.pem", "again.pem", "second.pem", "third.pem"]
    config = site.config(publishers={file: ["*"] for file in files}, signatures={"model": 2})
    path = site.seal()
    with pytest.raises(errors.UntrustedPublisher, match="1 of the 2 publishers"):
        keymgmt.open(path, keys=config)
    keymgmt.sign(path, key="local:stranger", keys=config)
    with pytest.raises(errors.UntrustedPublisher, match="1 of the 2 publishers"):
        keymgmt.open(path, keys=config)
    keymgmt.sign(path, key="local:third", keys=config)
    opens(path, config)
    assert "third.pem" in keymgmt.verify(path, keys=config).findings[0].detail
    opens(path, site.config())


def test_of_two_one_expires(site, clock):
    provider = site.config().provider("local")
    provider.create_key("second", "ed25519", {})
    (site.root / "second.pem").write_bytes(PublicKey(provider.public_key("second")).to_pem())
    publishers = {"pub.pem": ["*"], "second.pem": ["*"]}
    config = site.config(publishers=publishers, signatures={"model": 2})
    path = site.seal()
    sign(site, path, days=30)
    sign(site, path, key="local:second", days=10)
    opens(path, config)
    clock(days=20)
    with pytest.raises(errors.ModelExpired, match=r"second\.pem vouched for it until"):
        keymgmt.open(path, keys=config)
    opens(path, site.config(publishers=publishers))


@pytest.mark.parametrize(
    "policy",
    [
        {"signatures": {"model": 2}},
        {"signatures": {"model": 0}},
        {"signatures": {"model": 17}},
        {"expired": "ignore"},
        {"publishers": {}, "require_signature": False, "require_expiry": ["model"]},
        {"publishers": {}, "require_signature": False, "signatures": {"model": 1}},
    ],
)
def test_a_policy_that_cannot_be(site, policy):
    with pytest.raises(errors.ConfigError):
        site.config(**policy)


def test_a_clock_that_was_put_back(site, clock, caplog):
    path, memory = site.seal(), site.root / "releases.json"
    sign(site, path, days=30)
    config = site.config(remember_releases=str(memory))
    strict = site.config(remember_releases=str(memory), require_expiry=["model"])
    opens(path, strict)
    seen = ReleaseMemory(memory).recall().time
    assert seen is not None
    assert is_time(seen)
    assert seen <= utc_text()
    opens(path, strict)
    assert ReleaseMemory(memory).recall().time == seen  # once an hour is enough
    clock(minutes=-8)
    opens(path, strict)
    clock(hours=-2)
    with pytest.raises(errors.ModelExpired, match="the clock says"):
        keymgmt.open(path, keys=strict)
    with caplog.at_level(logging.WARNING):
        opens(path, config)
    assert "was seen on this machine before" in caplog.text


def test_a_time_is_remembered_with_the_releases_and_never_goes_back(tmp_path):
    memory = tmp_path / "releases.json"
    ReleaseMemory(memory).remember("a", 3)
    assert ReleaseMemory(memory).recall().time is None
    ReleaseMemory(memory).remember("b", 1, time=True)
    ahead = utc_text(later(hours=5))
    memory.write_bytes(dump_json(json.loads(memory.read_bytes()) | {"time": ahead}))
    ReleaseMemory(memory).remember("b", 2, time=True)
    assert json.loads(memory.read_bytes()) == {
        "format": "keymgmt-releases/1",
        "releases": {"a": 3, "b": 2},
        "time": ahead,
    }
    memory.write_bytes(dump_json(json.loads(memory.read_bytes()) | {"time": "tomorrow"}))
    with pytest.raises(errors.ConfigError, match="damaged"):
        ReleaseMemory(memory).recall()
