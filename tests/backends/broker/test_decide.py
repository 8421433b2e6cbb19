"""What the broker makes of failures behind it, and of what its config says."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import Any

import programs
import pytest

pytest.importorskip("keymgmt_broker_service")

from keymgmt_broker import BrokerSettings
from keymgmt_broker.protocol import STATUS, Request
from keymgmt_broker_service._decide import Broker, Refusal
from keymgmt_broker_service._settings import KeyEntry, load_service_settings
from keymgmt_broker_service._verify import TdxPolicy
from loopback import Authority
from quotes import MRENCLAVE

from keymgmt import load_settings
from keymgmt.backend import (
    ConfigError,
    Dek,
    ProviderUnavailable,
    Recipient,
    WrappedKey,
    hpke_generate,
    hpke_public,
)

pytestmark = pytest.mark.once

BEHIND = """
from keymgmt import errors
from keymgmt.backend import Health, KeyProvider, Settings

class Nothing(Settings):
    pass

class Behind(KeyProvider[Nothing]):
    backend = "behind"
    Settings = Nothing
    def wrap(self, key, dek, context): raise NotImplementedError
    def check(self, key=None): return Health(())
    def unwrap(self, wrapped, context):
        assert wrapped.backend == "behind"
        raise getattr(errors, wrapped.params["error"])("the key service says 4711")
"""


@pytest.fixture
def broker(tmp_path, install, module_site) -> Broker:
    install("acme-behind", "keymgmt.backends", {"behind": "acme_behind:Behind"}, acme_behind=BEHIND)
    (tmp_path / "keymgmt.toml").write_text('[providers.site]\nbackend = "behind"\n')
    file = tmp_path / "broker.toml"
    file.write_text(
        f'config = "keymgmt.toml"\ncollateral = "{module_site}/collateral"\n'
        f'unsafe_root = "{module_site}/root.der"\n[policies.press]\nevidence = "sgx"\n'
        f'mrenclave = ["{MRENCLAVE.hex()}"]\n'
        '[keys.model]\nkey = "site:native"\nallow = ["press"]\n'
    )
    return Broker.load(load_service_settings(file), bytes(32))


@pytest.mark.parametrize(
    ("error", "word"),
    [
        ("WrongKey", "wrong-key"),
        ("KeyRetired", "retired"),
        ("KeyNotFound", "missing"),
        ("UnwrapFailed", "unwrap"),
        ("UnsupportedOperation", "unwrap"),
        ("AccessDenied", "denied"),
        ("LockedOut", "denied"),
        ("ProviderUnavailable", "unavailable"),
        ("BackendNotInstalled", "unavailable"),
    ],
)
def test_a_failure_behind_the_broker_is_told_in_one_word_and_logged_in_full(
    broker, prove, caplog, error, word
):
    caplog.set_level("INFO", "keymgmt.audit")
    wrapped = WrappedKey("broker", "model", "1", "hpke-p256", b"blob", {"error": error})
    public = hpke_public("hpke-p384", hpke_generate("hpke-p384"))
    request = Request(broker.nonces.make(), "hpke-p384", public, wrapped, b"", "sgx")
    with pytest.raises(Refusal) as raised:
        broker.answer(request.with_evidence(prove(request.report_data)).to_bytes(), "192.0.2.1")
    assert raised.value.word == word
    assert word in STATUS
    assert "4711" in caplog.text
    assert f"refused={word}" in caplog.text


def test_key_names_cannot_be_tried_without_evidence(broker, prove):
    """A known key, an unknown one, and one that takes other evidence are refused in one word."""
    tdx = TdxPolicy.model_validate({"evidence": "tdx", "mr_td": ["00" * 48], "firmware_only": True})
    settings = broker.settings
    settings = settings.model_copy(
        update={
            "policies": {**settings.policies, "guest": tdx},
            "keys": {**settings.keys, "guests": KeyEntry(key="site:guests", allow=["guest"])},
        }
    )
    broker = replace(broker, settings=settings)
    words: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for key in ("model", "guests", "absent"):
        for good in (False, True):
            wrapped = WrappedKey("broker", key, "1", "hpke-p256", b"blob", {"error": "WrongKey"})
            request = Request(broker.nonces.make(), "hpke-p384", b"", wrapped, b"", "sgx")
            evidence = prove(request.report_data if good else bytes(32))
            with pytest.raises(Refusal) as raised:
                broker.answer(request.with_evidence(evidence).to_bytes(), "192.0.2.1")
            words[good][key] = raised.value.word
    assert set(words[False].values()) == {"evidence"}
    assert words[True] == {"model": "wrong-key", "guests": "policy", "absent": "key"}


def test_evidence_that_cannot_be_judged_now_is_no_refusal_for_good(broker, prove):
    broker = replace(broker, collateral=None)
    wrapped = WrappedKey("broker", "model", "1", "hpke-p256", b"blob")
    request = Request(broker.nonces.make(), "hpke-p384", b"", wrapped, b"", "sgx")
    with pytest.raises(Refusal) as raised:
        broker.answer(request.with_evidence(prove(request.report_data)).to_bytes(), "192.0.2.1")
    assert raised.value.word == "not-ready"


class Counting:
    """A verifier that counts what it is asked for."""

    def __init__(self, verifier: Any) -> None:
        self._verifier, self.count = verifier, 0

    def verify_with_policy(self, *arguments: Any) -> Any:
        self.count += 1
        return self._verifier.verify_with_policy(*arguments)


def test_a_quote_is_verified_once_whatever_the_number_of_policies(broker, prove):
    assert broker.collateral is not None
    verifier = Counting(broker.collateral.verifier)
    wanted = broker.settings.policies["press"]
    other = wanted.model_copy(update={"mrenclave": ["00" * 32]})
    many = {f"p{number}": other for number in range(5)}
    entry = broker.settings.keys["model"].model_copy(update={"allow": [*many, "press"]})
    policies = many | {"press": wanted}
    broker = replace(
        broker,
        settings=broker.settings.model_copy(
            update={"policies": policies, "keys": {"model": entry}}
        ),
        policies=policies,
        collateral=replace(broker.collateral, verifier=verifier),
    )
    params = {"error": "KeyNotFound"}
    wrapped = WrappedKey("broker", "model", "1", "hpke-p256", b"blob", params)
    request = Request(broker.nonces.make(), "hpke-p384", b"", wrapped, b"", "sgx")
    with pytest.raises(Refusal) as raised:
        broker.answer(request.with_evidence(prove(request.report_data)).to_bytes(), "192.0.2.1")
    assert raised.value.word == "missing"  # the last policy accepted it
    assert verifier.count == 1


GOOD = {
    "listen": '"127.0.0.1:8443"',
    "config": '"keymgmt.toml"',
    "collateral": '"nowhere"',
    "[policies.press]": "",
    "evidence": '"sgx"',
    "mrenclave": f'["{MRENCLAVE.hex()}"]',
    "[keys.model]": "",
    "key": '"site:model"',
    "allow": '["press"]',
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"listen": '"0.0.0.0:8443"'}, "without TLS the broker listens on loopback alone"),
        ({"listen": '"8443"'}, "write an IP address"),
        ({"listen": '"localhost:8443"'}, "write an IP address"),
        ({"listen": '"127.0.0.1:99999"'}, "write ADDRESS:PORT"),
        ({"certificate": '"c.pem"'}, "certificate and private_key go together"),
        ({"trusted_proxies": '["proxy"]'}, "proxy"),
        ({"nonsense": "1"}, "nonsense: unknown key"),
        ({"evidence": '"nonesuch"'}, "evidence"),
        ({"key": '"model"'}, "write PROVIDER:KEY"),
        ({"key": '"site:../up"'}, "key"),
        ({"allow": '["nonesuch"]'}, "'nonesuch', which is none of the policies"),
        ({"allow": "[]"}, "allow"),
        ({"allow": '["press"]\n[keys.same]\nkey = "site:model"\nallow = ["press"]'}, "are both"),
        ({"config": '"missing.toml"'}, "missing.toml"),
        ({"key": '"other:model"'}, "other"),
        ({"nonce_key": '"short.key"'}, "has 4 bytes, not 32"),
        ({"nonce_key": '"open.key"'}, "open.key"),
        ({"nonce_key": '"missing.key"'}, "(umask 077; openssl rand -out nonce.key 32)"),
        ({}, "nowhere"),
        ({"collateral": ""}, "policies.press is of sgx and needs collateral"),
    ],
)
def test_what_is_wrong_in_the_config_is_said_before_anything_begins(tmp_path, change, said):
    (tmp_path / "keymgmt.toml").write_text('[providers.site]\nbackend = "file"\npath = "keys"\n')
    for name, size, mode in (("short.key", 4, 0o600), ("open.key", 32, 0o644)):
        (tmp_path / name).write_bytes(bytes(size))
        (tmp_path / name).chmod(mode)
    top = {name: value for name, value in change.items() if name not in GOOD}
    lines = top | GOOD | {name: value for name, value in change.items() if name in GOOD}
    if not lines["collateral"]:
        del lines["collateral"]
    file = tmp_path / "broker.toml"
    file.write_text("".join(f"{n} = {v}\n" if v else f"{n}\n" for n, v in lines.items()))
    done = run("broker", "serve", "--config", str(file))
    assert done.returncode == 3, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return programs.run_keymgmt(*arguments)


def test_a_config_that_is_not_there_is_named(tmp_path):
    done = run("broker", "serve", "--config", str(tmp_path / "none.toml"))
    assert done.returncode == 3
    assert "--config FILE" in done.stderr


def test_a_place_that_is_taken_is_said(make_service):
    service = make_service()
    done = run("broker", "serve", "--config", str(service.config))
    assert done.returncode == 3
    assert "Address already in use" in done.stderr


def test_export_writes_what_is_sealed_to(make_service, tmp_path):
    config = str(make_service(start=False).config)
    file = tmp_path / "model.recipient"
    done = run("broker", "export", "model", "-o", str(file), "--config", config)
    assert done.returncode == 0, done.stderr
    recipient = Recipient.load(file)
    assert str(recipient) == "broker:model@1"
    assert recipient.fingerprint in done.stdout
    again = run("broker", "export", "model", "-o", str(file), "--config", config)
    assert again.returncode == 3
    assert "--force" in again.stderr
    other = run("broker", "export", "nonesuch", "-o", str(file), "--config", config)
    assert "its keys: model, other" in other.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"service": "http://broker.example:8443"}, "is not protected"),
        ({"service": "http://localhost:8443"}, "is not protected"),
        ({"service": "https://user:secret@broker.example"}, "no user name or password"),
        ({"service": "https://broker.example/path"}, "write https://HOST:PORT"),
        ({"service": "ftp://broker.example"}, "write https://HOST:PORT"),
        ({"service": "https://broker.example:x"}, "is not an address"),
        ({"service": "https://broker.example"}, "https needs ca_file"),
        ({"service": []}, "1 to 16 addresses"),
        ({"service": ["http://127.0.0.1:1"] * 2}, "each once"),
        ({"evidence": 4}, "write the kind of evidence in quotes"),
        ({"evidence": {"proves": "this"}}, "write the kind of evidence in quotes"),
        ({"evidence": "../sgx"}, "is no kind of evidence"),
        ({"evidence": {"kind": "sgx", "none": 1}}, "none: extra inputs"),
        ({"recipients": {"../up": "f"}}, "not a key name"),
        ({"hpke": "hpke-p256"}, "hpke"),
    ],
)
def test_what_is_wrong_in_the_settings_of_a_client(tmp_path, client, change, said):
    client()  # the evidence of the tests is installed now
    lines = {"service": "http://127.0.0.1:8443", "evidence": "sgx"} | change
    file = tmp_path / "settings.toml"
    file.write_text("".join(f"{name} = {toml(value)}\n" for name, value in lines.items()))
    with pytest.raises(ConfigError) as raised:
        load_settings(file, BrokerSettings, absent="")
    assert said in str(raised.value)
    assert "secret" not in str(raised.value)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{name}" = {toml(each)}' for name, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_a_path_in_the_settings_of_evidence_is_relative_to_the_config(tmp_path, client):
    client()
    file = tmp_path / "settings.toml"
    file.write_text(
        'service = "http://127.0.0.1:1"\nevidence = { kind = "sgx", device = "quote" }\n'
    )
    settings = load_settings(file, BrokerSettings, absent="")
    assert settings.evidence.settings.device == tmp_path / "quote"


def test_over_tls_the_service_is_the_one_that_the_authority_vouches_for(
    make_service, client, module_site
):
    authority, other = Authority(module_site / "tls"), Authority(module_site / "other")
    certificate, key = authority.issue("server")
    key.chmod(0o600)
    service = make_service(
        host="0.0.0.0",
        secure=authority.ca_file,
        more=f'certificate = "{certificate}"\nprivate_key = "{key}"\n',
    )
    with Dek.generate() as dek:
        good = client(service.address, ca_file=authority.ca_file)
        wrapped = good.wrap("model", dek, b"c")
        with good.unwrap(wrapped, b"c") as again:
            assert again == dek
    with pytest.raises(ProviderUnavailable, match=r"certificate of .* is not accepted"):
        client(service.address, ca_file=other.ca_file).unwrap(wrapped, b"c")
    name = client(service.address.replace("127.0.0.1", "127.0.0.2"), ca_file=authority.ca_file)
    with pytest.raises(ProviderUnavailable, match="is not accepted"):
        name.unwrap(wrapped, b"c")
    with pytest.raises(ProviderUnavailable, match=r"keymgmt.toml holds no certificate in PEM"):
        client(service.address, ca_file=module_site / "keymgmt.toml").unwrap(wrapped, b"c")
