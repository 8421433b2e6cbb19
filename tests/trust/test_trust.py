"""Publishers, names and releases: what a config demands before it asks for any key."""

from __future__ import annotations

import json
import shutil

import pytest

import keymgmt
from keymgmt import Config, errors
from keymgmt._trust.unlock import Unlocker
from keymgmt.sealed.derive import file_key, payload_aad
from keymgmt.sealed.keys import UnlockPolicy
from keymgmt.sealed.payload import seal_payload


def test_unsigned(site):
    path = site.seal(
        sign=None,
        keys=Config(
            {"providers": {"local": {"backend": "file", "path": str(site.root / "keys")}}},
            path=site.root / "x.toml",
        ),
    )
    with pytest.raises(errors.UntrustedPublisher, match="is not signed"):
        keymgmt.open(path, keys=site.config())
    keymgmt.sign(path, key="local:publisher", keys=site.config())
    keymgmt.open(path, keys=site.config()).close()


def test_unknown_signer(site):
    path = site.seal(sign="local:stranger")
    with pytest.raises(errors.UntrustedPublisher, match="nobody that this config trusts"):
        keymgmt.open(path, keys=site.config())


def test_signer_of_other_names(site):
    path = site.seal(name="minilm")
    config = site.config(publishers={"pub.pem": ["resnet50"]})
    with pytest.raises(errors.UntrustedPublisher, match="not trusted to publish that name"):
        keymgmt.open(path, keys=config)
    keymgmt.open(path, keys=site.config(publishers={"pub.pem": ["resnet50", "minilm"]})).close()


def test_bad_signature(site):
    path, other = site.seal(), site.seal(target="n.sealed")
    shutil.copy(other / "signatures.json", path / "signatures.json")
    with pytest.raises(errors.UntrustedPublisher, match="is not valid"):
        keymgmt.open(path, keys=site.config())


def test_no_publisher_is_trusted_by_default(site):
    path = site.seal()
    with pytest.raises(errors.UntrustedPublisher):
        keymgmt.open(path, keys=site.config(publishers={}))


def test_several_signatures(site):
    path = site.seal(sign="local:stranger")
    keymgmt.sign(path, key="local:publisher", keys=site.config())
    assert len(keymgmt.inspect(path).signers) == 2
    keymgmt.open(path, keys=site.config()).close()
    keymgmt.sign(path, key="local:publisher", keys=site.config())
    assert len(keymgmt.inspect(path).signers) == 2


def test_a_damaged_model_is_not_signed(site):
    path = site.seal(sign="local:stranger")
    payload = path / "payload" / "model.bin.floe"
    data = payload.read_bytes()
    payload.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = (path / "signatures.json").read_bytes()
    with pytest.raises(errors.IntegrityError):
        keymgmt.sign(path, key="local:publisher", keys=site.config())
    assert (path / "signatures.json").read_bytes() == before


def test_a_payload_forged_with_the_real_data_key(site):
    """Who once held the data key puts other weights under the publisher's valid signature."""
    path, config = site.seal(), site.config()
    manifest = keymgmt.inspect(path).manifest
    policy = UnlockPolicy.from_bytes((path / "keys.json").read_bytes())
    dek, _ = Unlocker(config, manifest, policy).unlock()
    forged = site.root / "forged"
    forged.write_bytes(bytes(manifest.file("model.bin").size))
    with forged.open("rb") as source, (path / "payload/model.bin.floe").open("wb") as target:
        seal_payload(
            source.fileno(),
            manifest.file("model.bin").size,
            target.fileno(),
            key=file_key(dek, manifest.id, "model.bin"),
            aad=payload_aad(manifest.id, "model.bin"),
            segment_length=manifest.segment_length,
            digest=manifest.digest,
        )
    buffer = bytearray(b"\xff" * manifest.file("model.bin").size)
    with keymgmt.open(path, keys=config) as model:
        with pytest.raises(errors.IntegrityError):
            model.read_into("model.bin", buffer)
        assert not any(buffer)
        with pytest.raises(errors.IntegrityError), model.open("model.bin") as file:
            file.read(1)
    with pytest.raises(errors.IntegrityError):
        keymgmt.verify(path, keys=config, signature_only=True)
    unsigned = site.config(publishers={}, require_signature=False)
    with keymgmt.open(path, keys=unsigned) as model:
        assert not any(model.read("model.bin")), "without digests the forgery goes unnoticed"


def test_expected_name(site):
    path = site.seal(name="minilm")
    with pytest.raises(errors.UntrustedPublisher, match="minilm, not resnet50"):
        keymgmt.open(path, keys=site.config(), name="resnet50")
    with pytest.raises(errors.UntrustedPublisher, match="does not open"):
        keymgmt.open(path, keys=site.config(names=["resnet50"]))
    keymgmt.open(path, keys=site.config(names=["minilm"]), name="minilm").close()


def test_minimum_release(site):
    path = site.seal(name="minilm", release=6)
    with pytest.raises(errors.RollbackError, match="older than release 7"):
        keymgmt.open(path, keys=site.config(minimum_release={"minilm": 7}))
    with pytest.raises(errors.RollbackError, match="no entry"):
        keymgmt.open(path, keys=site.config(minimum_release={"resnet50": 1}))
    keymgmt.open(path, keys=site.config(minimum_release={"minilm": 6})).close()


def test_remembered_releases(site):
    old, new = site.seal(release=1), site.seal(target="n.sealed", release=2)
    config = site.config(remember_releases="releases.json")
    keymgmt.open(old, keys=config).close()
    keymgmt.open(new, keys=config).close()
    with pytest.raises(errors.RollbackError, match="older than release 2"):
        keymgmt.open(old, keys=config)
    assert json.loads((site.root / "releases.json").read_bytes())["releases"] == {"model": 2}


def test_a_release_is_remembered_only_when_it_is_whole(site):
    old, new = site.seal(release=1), site.seal(target="n.sealed", release=2)
    payload = new / "payload" / "model.bin.floe"
    data = payload.read_bytes()
    payload.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    config = site.config(remember_releases="releases.json")
    keymgmt.open(old, keys=config).close()
    with pytest.raises(errors.IntegrityError):
        keymgmt.open(new, keys=config)
    keymgmt.open(old, keys=config).close()


def test_a_damaged_memory_is_no_empty_one(site):
    path = site.seal(release=1)
    (site.root / "releases.json").write_text("{}")
    with pytest.raises(errors.ConfigError, match="damaged"):
        keymgmt.open(path, keys=site.config(remember_releases="releases.json"))


@pytest.mark.parametrize(
    "policy",
    [
        {"minimum_release": {"a": 1}, "publishers": {}, "require_signature": False},
        {"remember_releases": "x", "publishers": {}, "require_signature": False},
        {"require_signature": False},
    ],
)
def test_policies_that_contradict_themselves(site, policy):
    with pytest.raises(errors.ConfigError):
        site.config(**policy)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "No such file"), (b"nonsense", "not a public key")]
)
def test_publisher_keys_that_cannot_be_used(site, content, says):
    path = site.seal()
    (site.root / "pub.pem").unlink()
    if content is not None:
        (site.root / "pub.pem").write_bytes(content)
    with pytest.raises(errors.ConfigError, match=says):
        keymgmt.open(path, keys=site.config())


def test_what_remembers_releases_keeps_its_readers(site):
    """Root may maintain it for a service that reads it."""
    memory = site.root / "releases.json"
    config = site.config(remember_releases=str(memory))
    keymgmt.open(site.seal(release=1), keys=config).close()
    memory.chmod(0o644)
    keymgmt.open(site.seal(release=2, target="n.sealed"), keys=config).close()
    assert memory.stat().st_mode & 0o777 == 0o644
    assert b'"model":2' in memory.read_bytes()
