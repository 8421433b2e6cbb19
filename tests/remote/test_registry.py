"""Push and pull, with Debian's registry and with skopeo as another tool that reads what we push."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import keymgmt
from keymgmt.errors import (
    ConfigError,
    FormatError,
    IntegrityError,
    RollbackError,
    UntrustedPublisher,
)

pytest.importorskip("keymgmt_file")
Tree = Callable[[Path], dict[str, bytes]]


@dataclass
class Place:
    """A site, a registry, and a repository of its own in it."""

    site: Any
    registry: Any
    repository: str

    def at(self, tag: str = "1") -> str:
        return f"oci://{self.registry.host}/{self.repository}:{tag}"

    def config(self, **policy: Any) -> Any:
        config = self.site.config(**policy)
        data = {
            "providers": {"local": {"backend": "file", "path": str(self.site.root / "keys")}},
            "policy": self.site.policy | policy,
            "seal": {"sign": "local:publisher"},
            "remote": {"ca_file": str(self.registry.ca_file)},
        }
        return keymgmt.Config(data, path=config.path)

    def push(self, path: Path, tag: str = "1", **options: Any) -> keymgmt.Pushed:
        return keymgmt.push(path, self.at(tag), **{"keys": self.config(), **options})

    def pull(self, name: str = "pulled", tag: str = "1", **options: Any) -> keymgmt.Pulled:
        target = self.site.root / name
        return keymgmt.pull(self.at(tag), target, **{"keys": self.config(), **options})


@pytest.fixture
def place(site, registry, request) -> Place:
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    return Place(site, registry, f"models/{name}")


def content(tree: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in tree.items() if name != ".keymgmt.origin"}


def test_a_model_goes_there_and_comes_back(place, tree_of):
    sealed = place.site.seal()
    pushed = place.push(sealed)
    assert pushed.moved
    assert pushed.sent == sum(len(data) for data in content(tree_of(sealed)).values())
    pulled = place.pull()
    assert (pulled.state, pulled.digest) == ("new", pushed.digest)
    target = place.site.root / "pulled"
    assert tree_of(target) == tree_of(sealed)
    assert keymgmt.verify(target, keys=place.config()).manifest == pulled.manifest
    assert not [path for path in place.site.root.iterdir() if path.name.endswith(".tmp")]
    again = place.pull()
    assert again.state == "current"
    by_digest = f"oci://{place.registry.host}/{place.repository}@{pushed.digest}"
    other = place.site.root / "other"
    assert keymgmt.pull(by_digest, other, keys=place.config()).digest == pushed.digest


def test_what_is_there_is_not_sent_again(place):
    sealed = place.site.seal()
    first = place.push(sealed)
    again = place.push(sealed)
    assert (again.moved, again.sent, again.digest) == (False, 0, first.digest)
    assert place.push(sealed, "2").sent == 0


def test_after_rewrap_the_keys_alone_move(place, tree_of):
    sealed = place.site.seal()
    place.push(sealed)
    place.pull()
    before = place.registry.bytes()
    keymgmt.rewrap(sealed, add=["local:b"], keys=place.config())
    pushed = place.push(sealed)
    keys = (sealed / "keys.json").stat().st_size
    assert pushed.sent == keys
    # The keys, the artifact's configuration and its manifest.
    assert place.registry.bytes() - before < keys + 8192
    payload = place.site.root / "pulled" / "payload" / "model.bin.floe"
    inode = payload.stat().st_ino
    pulled = place.pull()
    assert pulled.state == "updated"
    assert pulled.received < keys + 8192
    assert payload.stat().st_ino == inode
    assert tree_of(place.site.root / "pulled") == tree_of(sealed)


def test_other_tools_understand_it(place, require_tool, tmp_path):
    require_tool("skopeo", package="skopeo")
    sealed = place.site.seal()
    pushed = place.push(sealed)
    source = place.at().replace("oci://", "docker://")
    raw = json.loads(place.registry.skopeo("inspect", "--raw", source))
    assert raw["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert raw["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    titles = {layer["annotations"]["org.opencontainers.image.title"] for layer in raw["layers"]}
    assert titles == {
        *("manifest.json", "keys.json", "signatures.json"),
        *(f"payload/{name}.floe" for name in ("model.xml", "model.bin", "sub/empty")),
    }
    config = json.loads(place.registry.skopeo("inspect", "--config", "--raw", source))
    assert config["config"] == {"format": "keymgmt-sealed/1"}
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in raw["layers"]]
    place.registry.skopeo("copy", source, f"dir:{tmp_path / 'copy'}")
    files = {file.name for file in (tmp_path / "copy").iterdir()}
    for layer in raw["layers"]:
        name = layer["annotations"]["org.opencontainers.image.title"]
        assert layer["digest"].removeprefix("sha256:") in files
        there = (tmp_path / "copy" / layer["digest"].removeprefix("sha256:")).read_bytes()
        assert there == (sealed / name).read_bytes()
    manifest = (tmp_path / "copy" / "manifest.json").read_bytes()
    assert f"sha256:{hashlib.sha256(manifest).hexdigest()}" == pushed.digest
    # And a mirror that another tool made is what was pushed.
    place.registry.skopeo("copy", source, place.at("mirror").replace("oci://", "docker://"))
    assert place.pull(tag="mirror").digest == pushed.digest


def test_a_tag_that_moved_is_not_moved_back(place):
    sealed = place.site.seal()
    place.push(sealed)
    place.pull()
    keymgmt.rewrap(sealed, add=["local:b"], keys=place.config())
    place.push(sealed)
    pulled = place.site.root / "pulled"
    keymgmt.rewrap(pulled, add=["local:c"], keys=place.config())
    with pytest.raises(ConfigError, match="by now") as refused:
        place.push(pulled)
    assert "--force" in str(refused.value.hint)
    # What was changed here is not lost either.
    with pytest.raises(ConfigError, match=r"keys\.json of .* was changed here"):
        place.pull()
    assert place.pull(force=True).state == "updated"
    keymgmt.rewrap(pulled, add=["local:c"], keys=place.config())
    assert place.push(pulled).moved


def test_a_strangers_tag_is_not_moved(place):
    place.push(place.site.seal())
    other = place.site.seal(target="n.sealed")
    with pytest.raises(ConfigError, match="not from it"):
        place.push(other)
    assert place.push(other, force=True).moved


def test_what_was_resealed_is_pushed_to_its_tag(place):
    place.push(place.site.seal())
    place.pull()
    pulled = place.site.root / "pulled"
    keymgmt.reseal(pulled, to=["local:a"], keys=place.config())
    assert place.push(pulled).moved


def test_what_was_sealed_elsewhere_is_not_lost(place, tree_of):
    """A model that was never pulled, of the same name, is replaced only if that is meant."""
    place.push(place.site.seal(name="resnet50", release=2))
    mine = place.site.seal(target="pulled", name="resnet50", release=1)
    before = tree_of(mine)
    with pytest.raises(ConfigError, match=r"keys\.json of .* was changed here"):
        place.pull()
    assert tree_of(mine) == before
    assert place.pull(force=True).state == "replaced"


def test_another_release_takes_the_place(place, tree_of):
    place.push(place.site.seal(release=1))
    place.pull()
    later = place.site.seal(target="n.sealed", release=2)
    place.push(later, "2")
    assert place.pull(tag="2").state == "replaced"
    assert content(tree_of(place.site.root / "pulled")) == content(tree_of(later))
    with pytest.raises(RollbackError, match="is release 2"):
        place.pull()
    assert place.pull(force=True).state == "replaced"


def test_another_model_does_not_take_the_place(place, tree_of):
    place.push(place.site.seal(name="resnet50"))
    place.push(place.site.seal(target="n.sealed", name="minilm"), "2")
    place.pull()
    before = tree_of(place.site.root / "pulled")
    with pytest.raises(ConfigError, match="resnet50, and minilm would"):
        place.pull(tag="2")
    assert tree_of(place.site.root / "pulled") == before


def test_what_is_damaged_here_comes_again(place, tree_of):
    sealed = place.site.seal()
    place.push(sealed)
    place.pull()
    pulled = place.site.root / "pulled"
    whole = tree_of(pulled)
    inode = (pulled / "payload" / "model.bin.floe").stat().st_ino
    (pulled / "payload" / "model.xml.floe").write_bytes(b"damaged")
    (pulled / "payload" / "sub" / "empty.floe").unlink()
    assert place.pull().state == "updated"
    assert tree_of(pulled) == whole
    assert (pulled / "payload" / "model.bin.floe").stat().st_ino == inode


def test_what_is_no_model_is_not_replaced(place, tree_of):
    place.push(place.site.seal())
    folder = place.site.root / "pulled"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no sealed model, so it is not replaced"):
        place.pull(force=True)
    assert tree_of(folder) == {"mine.txt": b"mine"}
    file = place.site.root / "file"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="is no folder"):
        place.pull("file", force=True)
    assert file.read_text() == "mine"


def test_who_is_not_trusted_is_not_pulled(place):
    place.push(place.site.seal(sign="local:stranger"))
    with pytest.raises(UntrustedPublisher):
        place.pull()
    assert not (place.site.root / "pulled").exists()
    # Nothing was fetched but manifest.json, keys.json and signatures.json.
    assert len(place.registry.requests(rf'"GET /v2/{place.repository}/blobs/')) == 3


def test_another_name_than_expected_is_refused(place):
    place.push(place.site.seal(name="resnet50"))
    with pytest.raises(keymgmt.errors.SealedModelError, match="resnet50"):
        keymgmt.pull(place.at(), place.site.root / "x", name="minilm", keys=place.config())
    assert not (place.site.root / "x").exists()


def test_what_is_not_there_is_said(place):
    with pytest.raises(ConfigError, match="is not there"):
        place.pull()


def test_a_push_to_a_digest_or_elsewhere_is_refused(place):
    sealed = place.site.seal()
    digest = f"oci://{place.registry.host}/{place.repository}@sha256:{'a' * 64}"
    with pytest.raises(ConfigError, match="is a digest"):
        keymgmt.push(sealed, digest, keys=place.config())
    with pytest.raises(ConfigError, match="is no registry"):
        keymgmt.push(sealed, "s3://bucket/a", keys=place.config())


def test_a_payload_of_another_length_is_not_pushed(place):
    sealed = place.site.seal()
    with (sealed / "payload" / "model.bin.floe").open("ab") as file:
        file.write(b"more")
    with pytest.raises(IntegrityError, match=r"model\.bin\.floe: the payload file has"):
        place.push(sealed)
    assert not place.registry.requests(f"PUT /v2/{place.repository}/manifests")


def test_what_the_registry_lost_is_said_and_pushed_again(place):
    sealed = place.site.seal()
    place.push(sealed)
    payload = (sealed / "payload" / "model.bin.floe").read_bytes()
    layers = place.registry.root / "docker/registry/v2/repositories" / place.repository / "_layers"
    shutil.rmtree(layers / "sha256" / hashlib.sha256(payload).hexdigest())
    with pytest.raises(IntegrityError, match=r"lacks its payload/model\.bin\.floe"):
        place.pull()
    assert not (place.site.root / "pulled").exists()
    again = place.push(sealed)
    assert (again.moved, again.sent) == (False, len(payload))
    assert place.pull().state == "new"


def test_it_opens_where_it_lies(place):
    sealed = place.site.seal()
    place.push(sealed)
    with keymgmt.open(place.at(), keys=place.config()) as model:
        # The tag is looked up once: what is pushed meanwhile is another model.
        place.push(place.site.seal(target="n.sealed"), force=True)
        assert bytes(model.read("model.bin")) == (place.site.plain / "model.bin").read_bytes()
        with model.open("model.bin") as file:
            file.seek(1_500_000)
            assert file.read(7) == (place.site.plain / "model.bin").read_bytes()[1_500_000:][:7]
    assert keymgmt.verify(place.at(), keys=place.config()).findings
    assert keymgmt.inspect(place.at(), keys=place.config()).manifest.name
    with pytest.raises(ConfigError, match="is not there"):
        keymgmt.open(place.at("none"), keys=place.config())


def test_a_stranger_opens_nowhere(place):
    place.push(place.site.seal(sign="local:stranger"))
    with pytest.raises(UntrustedPublisher):
        keymgmt.open(place.at(), keys=place.config())


def test_nothing_is_changed_in_a_registry_but_by_a_push(place):
    place.push(place.site.seal())
    before = place.registry.bytes()
    with pytest.raises(ConfigError) as refused:
        keymgmt.rewrap(place.at(), add=["local:b"], keys=place.config())
    assert "pull" in str(refused.value.hint)
    assert place.registry.bytes() == before


def test_signatures_that_were_lost_here_come_again(place, tree_of):
    sealed = place.site.seal()
    place.push(sealed)
    place.pull()
    (place.site.root / "pulled/signatures.json").unlink()
    assert place.pull().state == "updated"
    assert content(tree_of(place.site.root / "pulled")) == content(tree_of(sealed))
    # Where nobody must sign, a model has them nowhere, or here alone.
    place.site.policy = {"require_signature": False}
    (sealed / "signatures.json").unlink()
    place.push(sealed, "2")
    assert place.pull("other", "2").state == "new"
    assert place.pull("other", "2").state == "current"


@pytest.mark.parametrize("kind", ["oci", "v2s2"])
def test_an_image_is_no_sealed_model_and_its_tag_is_not_moved(place, require_tool, tmp_path, kind):
    require_tool("skopeo", package="skopeo")
    image = tmp_path / "image"
    (image / "blobs/sha256").mkdir(parents=True)

    def put(content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (image / "blobs/sha256" / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    oci = "application/vnd.oci.image"
    layer = gzip.compress(bytes(10240))
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(bytes(10240)).hexdigest()}"]}
    config = {"architecture": "amd64", "os": "linux", "rootfs": rootfs}
    manifest = {
        "schemaVersion": 2,
        "config": put(json.dumps(config).encode(), f"{oci}.config.v1+json"),
        "layers": [put(layer, f"{oci}.layer.v1.tar+gzip")],
    }
    index = {"manifests": [put(json.dumps(manifest).encode(), f"{oci}.manifest.v1+json")]}
    (image / "index.json").write_text(json.dumps({"schemaVersion": 2} | index))
    (image / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    there = place.at().replace("oci://", "docker://")
    place.registry.skopeo("copy", "--insecure-policy", "--format", kind, f"oci:{image}", there)
    with pytest.raises(FormatError, match="no sealed model"):
        place.pull()
    with pytest.raises(ConfigError, match="this model is not from it"):
        place.push(place.site.seal())
