"""What is refused before any work starts, and how."""

from __future__ import annotations

import shutil
from pathlib import Path

import openvino.properties as props
import pytest
from keymgmt_openvino import _load, load, read
from keymgmt_openvino._site import make_site

import keymgmt
from keymgmt import room
from keymgmt.errors import (
    CannotUnlock,
    ConfigError,
    FormatError,
    IntegrityError,
    KeymgmtError,
    UntrustedPublisher,
)


@pytest.fixture
def nothing_opened(monkeypatch):
    """Fails if the sealed model is opened all the same."""

    def opened(*arguments, **options):
        pytest.fail("work was started")

    monkeypatch.setattr(keymgmt, "open", opened)


@pytest.mark.parametrize(
    "options",
    [
        {"CACHE_DIR": "cache"},
        {"cache_dir": "cache"},
        {props.cache_dir: "cache"},
        {"DEVICE_PROPERTIES": {"CPU": {"CACHE_DIR": "cache"}}},
        {"CACHE_MODE": "OPTIMIZE_SIZE"},
        {"CACHE_ENCRYPTION_CALLBACKS": [bytes, bytes]},
        {"WEIGHTS_PATH": "model.bin"},
    ],
    ids=str,
)
def test_a_plaintext_cache_in_the_options(options, nothing_opened, magika_sealed, site):
    with pytest.raises(ConfigError, match="is refused for a sealed model") as caught:
        load(magika_sealed, ov_config=options, keys=site)
    assert "plaintext" in str(caught.value.hint)


@pytest.mark.parametrize("place", [(), ("CPU",)], ids=["core", "device"])
def test_a_plaintext_cache_of_the_core(place, nothing_opened, magika_sealed, site, core, tmp_path):
    core.set_property(*place, {"CACHE_DIR": str(tmp_path / "cache")})
    for verb in (load, read):
        with pytest.raises(ConfigError, match="CACHE_DIR is set on"):
            verb(magika_sealed, keys=site, core=core)


def test_an_empty_cache_is_no_cache(magika_sealed, site):
    load(magika_sealed, ov_config={"CACHE_DIR": ""}, keys=site).close()


@pytest.mark.parametrize("device", ["TPU", "GPU.7", "HETERO:TPU,CPU", "MULTI:CPU,TPU(2)", ""])
def test_a_device_that_is_not_there(device, nothing_opened, magika_sealed, site):
    with pytest.raises(ConfigError, match="no device") as caught:
        load(magika_sealed, device, keys=site)
    assert "CPU" in str(caught.value.hint)


def test_an_option_that_the_device_does_not_know(magika_sealed, site):
    with pytest.raises(KeymgmtError, match="NO_SUCH_OPTION"):
        load(magika_sealed, ov_config={"NO_SUCH_OPTION": 1}, keys=site)


def test_more_weights_than_memory(magika_sealed, site, monkeypatch):
    monkeypatch.setattr(room, "_free_memory", lambda: 1 << 20)
    monkeypatch.setattr(_load, "Memory", lambda size: pytest.fail("allocated"))
    with pytest.raises(KeymgmtError, match=r"magika needs 3 MiB of memory and 1 MiB are free"):
        load(magika_sealed, keys=site)


def test_free_memory_is_that_of_the_machine_or_less():
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert 0 < room._free_memory() <= total


def test_a_folder_without_a_model(tmp_path, seal, site):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "readme.txt").write_text("nothing to run")
    with pytest.raises(FormatError, match="no OpenVINO IR or ONNX") as caught:
        load(seal(folder, "notes"), keys=site)
    assert "keymgmt_openvino.genai" in caught.value.hint


def test_a_broken_graph(tmp_path, seal, site):
    (tmp_path / "broken.xml").write_text("<net>")
    (tmp_path / "broken.bin").write_bytes(b"weights")
    with pytest.raises(KeymgmtError, match=r"OpenVINO cannot read broken\.xml of broken"):
        load(seal(tmp_path / "broken.xml", "broken"), keys=site)


def test_weights_that_end_too_early(tmp_path, magika_ir, seal, site):
    shutil.copy(magika_ir, tmp_path / "short.xml")
    (tmp_path / "short.bin").write_bytes(magika_ir.with_suffix(".bin").read_bytes()[:-4096])
    with pytest.raises(KeymgmtError, match="OpenVINO cannot read"):
        load(seal(tmp_path / "short.xml", "short"), keys=site)


def test_a_missing_model(tmp_path, site):
    with pytest.raises(KeymgmtError, match=r"nowhere\.sealed"):
        load(tmp_path / "nowhere.sealed", keys=site)


def test_damage_and_strangers(magika_sealed, tmp_path, site):
    cut = tmp_path / "cut.sealed"
    shutil.copytree(magika_sealed, cut)
    with (cut / "payload" / "magika.bin.floe").open("r+b") as file:
        file.truncate(1 << 20)
    with pytest.raises(IntegrityError):
        load(cut, keys=site)
    with make_site(tmp_path / "other", "*") as other, pytest.raises(UntrustedPublisher):
        load(magika_sealed, keys=other)
    shutil.copy(site.base / "release.pub.pem", tmp_path / "other" / "release.pub.pem")
    with (
        keymgmt.load_config(tmp_path / "other" / "keymgmt.toml") as thief,
        pytest.raises(CannotUnlock),
    ):
        load(magika_sealed, keys=thief)
