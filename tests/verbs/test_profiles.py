"""Profiles: what each allows is checked where a model is made and where it is read."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

import keymgmt
from keymgmt import errors
from keymgmt._crypto.hpke import HPKE_KINDS
from keymgmt._crypto.signatures import ALGORITHMS
from keymgmt.sealed.profiles import PROFILES

SPEC = files("keymgmt.sealed").joinpath("SPEC.md").read_text()
WRAPS = {"aes256": "HKDF-SHA384-A256GCM"} | {kind: kind for kind in HPKE_KINDS}
SIGNS = ["ed25519", "ml-dsa-65", "ml-dsa-87"]


def test_the_table_is_that_of_the_spec():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in SPEC.partition("### 4.1 Profiles")[2].partition("\n## ")[0].splitlines()
        if line.startswith("|")
    ]
    table = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}
    for name, profile in PROFILES.items():
        digest = {"blake3": "BLAKE3 (32)", "sha256": "SHA-256 (32)", "sha384": "SHA-384 (48)"}
        assert table["digest (bytes)"][f"`{name}`"] == digest[profile.digest]
        recipients = table["recipients"][f"`{name}`"]
        found = set(re.findall(r"`([^`]+)`", recipients))
        assert found == (profile.mechanisms or set())
        assert (profile.mechanisms is None) == (recipients == "any mechanism")
        signs = table["signatures"][f"`{name}`"]
        assert profile.signatures == (set(ALGORITHMS) if signs == "section 7" else {signs.lower()})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("profiles")
    data = {"providers": {"local": {"backend": "file", "path": str(root / "keys")}}}
    provider = keymgmt.Config(data).provider("local")
    for kind in WRAPS:
        provider.create_key(f"w-{kind}", kind, {})
    publishers = {}
    for kind in SIGNS:
        provider.create_key(f"s-{kind}", kind, {})
        pem = root / f"{kind}.pem"
        pem.write_bytes(keymgmt.backend.PublicKey(provider.public_key(f"s-{kind}")).to_pem())
        publishers[pem.name] = ["*"]
    data["policy"] = {"publishers": publishers}
    return keymgmt.Config(data, path=root / "keymgmt.toml")


@pytest.fixture
def plain(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "m.bin").write_bytes(b"weights")
    return tmp_path / "plain"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", WRAPS)
def test_a_recipient_is_of_the_profile_or_refused_before_anything_is_written(
    plain, tmp_path, config, profile, kind
):
    rules, out = PROFILES[profile], tmp_path / "m.sealed"
    options = {"sign": "local:s-ml-dsa-87", "keys": config, "profile": profile}
    if rules.mechanisms is None or WRAPS[kind] in rules.mechanisms:
        keymgmt.seal(plain, out, to=[f"local:w-{kind}"], **options)
        with keymgmt.open(out, keys=config) as model:
            assert model.read("m.bin") == b"weights"
        return
    said = f"the profile {profile} does not allow {WRAPS[kind]}"
    with pytest.raises(errors.ConfigError, match=said):
        keymgmt.seal(plain, out, to=["local:w-aes256", f"local:w-{kind}"], **options)
    config.provider("local").export_recipient(f"w-{kind}").save(tmp_path / "device.recipient")
    mark = config.provider("local").export_recipient(f"w-{kind}").fingerprint
    to = [f"@{tmp_path / 'device.recipient'}"]
    with pytest.raises(errors.ConfigError, match=f"the profile {profile} does not allow"):
        keymgmt.seal(plain, out, to=to, fingerprints=[mark], **options)
    assert not out.exists()
    keymgmt.seal(plain, out, to=["local:w-aes256"], **options)
    before = (out / "keys.json").read_bytes()
    for verb in (
        lambda: keymgmt.rewrap(out, add=[f"local:w-{kind}"], keys=config),
        lambda: keymgmt.reseal(out, to=[f"local:w-{kind}"], sign="local:s-ml-dsa-87", keys=config),
    ):
        with pytest.raises(errors.ConfigError, match=f"the profile {profile} does not allow"):
            verb()
    assert (out / "keys.json").read_bytes() == before


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", SIGNS)
def test_a_signer_is_of_the_profile_or_refused(plain, tmp_path, config, profile, kind):
    out = tmp_path / "m.sealed"
    options = {"to": ["local:w-aes256"], "keys": config, "profile": profile}
    if kind in PROFILES[profile].signatures:
        keymgmt.seal(plain, out, sign=f"local:s-{kind}", **options)
        keymgmt.verify(out, keys=config)
        return
    with pytest.raises(errors.ConfigError, match=f"the profile {profile} does not allow {kind}"):
        keymgmt.seal(plain, out, sign=f"local:s-{kind}", **options)
    assert not out.exists()
    keymgmt.seal(plain, out, **options)
    with pytest.raises(errors.ConfigError, match=f"the profile {profile} does not allow {kind}"):
        keymgmt.sign(out, key=f"local:s-{kind}", keys=config)


def test_an_unknown_profile_names_the_known_ones(plain, tmp_path, config):
    with pytest.raises(errors.ConfigError) as caught:
        keymgmt.seal(
            plain, tmp_path / "m.sealed", to=["local:w-aes256"], keys=config, profile="fast"
        )
    assert "default, fips, cnsa2" in str(caught.value.hint)
