"""What vendors' modules do otherwise, as personalities of ``fault.c``: from manuals and reports.

The modules that can be had are run for real: the kit in ``test_contract.py``, and here.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from keymgmt_pkcs11._cryptoki import LibraryInfo
from keymgmt_pkcs11._keys import KeyObject
from keymgmt_pkcs11._kinds import kind_of, purpose_of
from keymgmt_pkcs11._quirks import quirks_of
from programs import run, run_keymgmt

from keymgmt.backend import ConfigError, Dek, KeyRetired, UnsupportedOperation, UnwrapFailed

MANUAL = Path(__file__).parents[3] / "docs" / "backends" / "pkcs11.md"

# Personality and what a config says for it.
PERSONALITIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "own iv": {},
    "CloudHSM": {},
    "Luna FIPS": {"user_type": 0x80000001},
    "strict templates": {},
    "ePass2003": {},
    "tpm2-pkcs11": {},
    "stops": {},
    "slow": {"timeout": 20.0},
}


@pytest.mark.parametrize("kind", ["aes256", "aes256-kw", "ecdh-p256"])
@pytest.mark.parametrize("name", PERSONALITIES)
def test_a_personality_wraps_and_unwraps(faulty, faults, request, name, kind):
    key = re.sub(r"[^a-z0-9]", "-", request.node.callspec.id.lower())
    # A rigid token fixes the usages itself; SoftHSM then has all of them.
    rigid = {"allow": ("usages",)} if name == "tpm2-pkcs11" else {}
    settings = {**PERSONALITIES[name], "keys": {key: rigid}}
    faults.personality(name)
    provider = faulty.provider(**settings)
    if name == "tpm2-pkcs11" and kind == "aes256-kw":
        # With all usages on, nothing tells it from aes256.
        with pytest.raises(UnsupportedOperation, match="usages are those of aes256"):
            provider.create_key(key, kind, {})
        return
    provider.create_key(key, kind, {})
    with Dek.generate() as dek:
        made = [provider.wrap(key, dek, b"c") for _ in range(2)]
        assert made[0].blob != made[1].blob
        fresh = faulty.provider(**settings)
        for wrapped in made:
            assert fresh.unwrap(wrapped, b"c") == dek
            with pytest.raises(UnwrapFailed):
                fresh.unwrap(wrapped, b"d")
            # Whatever the failure left active, the next call works.
            assert fresh.unwrap(wrapped, b"c") == dek
            flipped = wrapped.blob[:-1] + bytes([wrapped.blob[-1] ^ 1])
            with pytest.raises(UnwrapFailed):
                fresh.unwrap(replace(wrapped, blob=flipped), b"c")
    assert key in {info.key for info in fresh.list_keys()}


def test_blobs_of_one_personality_open_on_another(faulty, faults):
    """The blob is the same whoever made its IV, so an HSM can be replaced by another vendor's."""
    with faulty.provider() as provider:
        provider.create_key("portable", "aes256", {})
    with Dek.generate() as dek:
        made = {}
        for name in ("plain", "CloudHSM", "Luna FIPS"):
            faults.personality(name)
            with faulty.provider(**PERSONALITIES[name]) as provider:
                made[name] = provider.wrap("portable", dek, b"c")
        for name in made:
            faults.personality(name)
            with faulty.provider(**PERSONALITIES[name]) as provider:
                for wrapped in made.values():
                    assert provider.unwrap(wrapped, b"c") == dek


@pytest.mark.parametrize("kind", ["aes256", "ecdh-p256"])
def test_ids_of_one_byte_are_the_versions_that_the_config_lists(faulty, faults, kind):
    """Some modules give a key the number of its slot, and take no other id (ykcs11 #204)."""
    name = f"short-{kind}"
    faults.personality("short ids")
    with pytest.raises(UnsupportedOperation) as caught:
        faulty.provider().create_key(name, kind, {})
    assert 'id = ["01", "02"]' in str(caught.value.hint)
    first, second = ("a1", "0a") if kind == "aes256" else ("b1", "0b")
    provider = faulty.provider(keys={name: {"id": [first, second]}})
    assert provider.create_key(name, kind, {}).newest == first
    with Dek.generate() as dek:
        old = provider.wrap(name, dek, b"c")
        # The order is that of the config, and not that of the numbers.
        assert provider.rotate_key(name).newest == second
        new = provider.wrap(name, dek, b"c")
        assert (old.version, new.version) == (first, second)
        fresh = faulty.provider(keys={name: {"id": [first, second]}})
        assert fresh.unwrap(old, b"c") == dek
        assert fresh.unwrap(new, b"c") == dek
        with pytest.raises(ConfigError, match="ids that are all in use") as full:
            provider.rotate_key(name)
        assert f'id = ["{first}", "{second}", ...]' in str(full.value.hint)
        fresh.retire_version(name, first)
        with pytest.raises(KeyRetired):
            fresh.unwrap(old, b"c")
    (info,) = [each for each in fresh.list_keys() if each.key == name]
    assert [(each.version, each.state) for each in info.versions] == [
        (first, "retired"),
        (second, "active"),
    ]
    assert {f.status for f in fresh.check().findings if f.name == f"key {name}"} == {"ok"}


def test_a_slow_key_pair_fails_no_command(faulty, faults):
    faults.personality("slow")
    provider = faulty.provider(timeout=1.0)
    assert provider.create_key("slow-pair", "ecdsa-p256", {}).kind == "ecdsa-p256"


def test_doctor_fails_for_a_token_that_does_nothing(faulty, faults):
    provider = faulty.provider()
    found = {f.name: f for f in provider.check().findings}
    assert "aes256" in found["mechanisms"].detail
    faults.personality("does nothing")
    found = {f.name: f for f in provider.check().findings}
    assert found["mechanisms"].status == "failed"


def test_a_module_that_never_ends_its_answers(faulty, faults):
    def look(session: Any) -> list[int]:
        ck, slot = session.ck, session.token.slot
        return [len(ck.find(session.handle, {})), len(ck.slots()), len(ck.mechanisms(slot))]

    provider = faulty.provider()
    assert max(provider.connection.run("looking", look)) < 200
    faults.personality("endless")
    assert provider.connection.run("looking", look) == [65536, 4096, 4096]


def test_attributes_are_read_in_one_call(faulty, faults):
    provider = faulty.provider()
    provider.create_key("batch", "aes256", {})
    before = faults.calls("C_GetAttributeValue")
    provider.describe_key("batch")
    assert faults.calls("C_GetAttributeValue") - before == 1


def test_the_purpose_is_that_of_the_type():
    flags = frozenset({"sign", "decrypt", "private"})
    key = KeyObject(1, "k", b"\x01", "EC", 256, flags)
    kind = kind_of(key)
    assert kind is not None
    assert (kind.name, purpose_of(key)) == ("ecdsa-p256", "sign")


def test_quirks_end_with_a_version():
    def softhsm(*version: int) -> LibraryInfo:
        return LibraryInfo("SoftHSM", "Implementation of PKCS11", version, (2, 40))  # type: ignore[arg-type]

    assert quirks_of(softhsm(2, 6)).broken
    assert not quirks_of(softhsm(2, 7)).broken
    assert quirks_of(softhsm(2, 7)).codes


def test_the_manuals_commands_for_a_security_team(new_token, require_tool, tmp_path):
    """Each command of the section, as it is printed, but for the names of library and PIN."""
    require_tool("pkcs11-tool", package="opensc")
    token = new_token("Model Keys")
    section = MANUAL.read_text().partition("## A token from nothing")[2].partition("\n## ")[0]
    (block,) = [
        each for each in re.findall(r"```\w*\n(.*?)```", section, re.DOTALL) if "--keygen" in each
    ]
    (tmp_path / "keymgmt.toml").write_text(
        f'[providers.hsm]\nbackend = "pkcs11"\nmodule = "{token.module}"\ntoken = "{token.label}"\n'
        f'pin = {{ file = "{token.pin_file}" }}\n'
        '[providers.hsm.keys]\nresnet50 = { label = "Model KEK 2026" }\n'
    )
    script = (
        block.replace("LIBRARY.so", str(token.module))
        .replace("--login", f"--login --pin {token.pin}")
        .replace("keymgmt ", f"{sys.executable} -m keymgmt.cli -c keymgmt.toml ")
    )
    assert script.count("pkcs11-tool") == 3
    done = run("bash", "-euc", script, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    provider = token.provider(keys={"resnet50": {"label": "Model KEK 2026"}})
    with Dek.generate() as dek:
        for key in ("resnet50", "fleet"):
            assert provider.unwrap(provider.wrap(key, dek, b"c"), b"c") == dek
    assert provider.sign("publisher", b"m").signature
    # Without a login, nothing is seen of the secret keys.
    assert "Model KEK 2026" not in token.tool("--list-objects", login=False)
    assert "Model KEK 2026" in token.tool("--list-objects")
    # The same without --private is refused, and doctor fails.
    token.tool("--keygen", "--key-type", "AES:32", "--label", "open", "--id", "09", "--sensitive")
    with Dek.generate() as dek, pytest.raises(UnsupportedOperation, match="CKA_PRIVATE is false"):
        token.provider().wrap("open", dek, b"c")
    done = run_keymgmt("-c", "keymgmt.toml", "doctor", cwd=tmp_path)
    assert done.returncode == 1
    assert "CKA_PRIVATE is false" in done.stdout
