"""What is refused before any work starts, and how."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import openvino.properties as props
import pytest
from keymgmt_openvino import _memory, load, read
from keymgmt_openvino_demo._throwaway_keys import make_throwaway_keys
from openvino import opset13 as op

import keymgmt
from keymgmt._system import free_memory
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


@pytest.mark.parametrize("device", ["TPU", "GPU.7", "HETERO:TPU,CPU", "AUTO:-CPU", ""])
def test_a_device_that_is_not_there(device, nothing_opened, magika_sealed, site):
    with pytest.raises(ConfigError, match="no device") as caught:
        load(magika_sealed, device, keys=site)
    assert "CPU" in str(caught.value.hint)
    assert caught.value.__notes__[0].startswith("OpenVINO said:\n")


def test_an_option_that_the_device_does_not_know(magika_sealed, site):
    with pytest.raises(KeymgmtError, match="NO_SUCH_OPTION") as caught:
        load(magika_sealed, ov_config={"NO_SUCH_OPTION": 1}, keys=site)
    assert "Exception from src" in caught.value.__notes__[0]


def test_more_weights_than_memory(magika_sealed, site, monkeypatch):
    monkeypatch.setattr(free_memory, "free_memory", lambda: 1 << 20)
    monkeypatch.setattr(_memory, "Memory", lambda size: pytest.fail("allocated"))
    with pytest.raises(KeymgmtError, match=r"magika needs 3 MiB of memory and 1 MiB are free"):
        load(magika_sealed, keys=site)


def test_memory_for_one_copy_and_not_for_openvinos_is_said(
    magika_sealed, site, monkeypatch, caplog
):
    monkeypatch.setattr(free_memory, "free_memory", lambda: 5 << 20)
    load(magika_sealed, keys=site).close()
    assert "magika needs 6 MiB of memory and 5 MiB are free, counting the copy" in caplog.text


def test_free_memory_is_that_of_the_machine_or_less():
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert 0 < free_memory.free_memory() <= total


def test_a_folder_without_a_model(tmp_path, seal, site):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "readme.txt").write_text("nothing to run")
    with pytest.raises(FormatError, match=r"notes \(files\) has no graph") as caught:
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
    with make_throwaway_keys(tmp_path / "other") as other, pytest.raises(UntrustedPublisher):
        load(magika_sealed, keys=other)
    shutil.copy(site.path.parent / "publisher.pem", tmp_path / "other" / "publisher.pem")
    with (
        keymgmt.load_config(tmp_path / "other" / "keymgmt.toml") as thief,
        pytest.raises(CannotUnlock),
    ):
        load(magika_sealed, keys=thief)


def test_an_operation_that_openvino_lacks_is_named_with_the_way_out(tmp_path, seal, site, core):
    x = op.parameter([1, 4], np.float32, name="x")
    path = tmp_path / "foo.xml"
    ov.save_model(ov.Model([op.result(op.relu(x, name="acme"))], [x], "foo"), path)
    path.write_text(
        path.read_text().replace('type="ReLU" version="opset1"', 'type="Foo" version="acme"')
    )
    with pytest.raises(KeymgmtError, match="Cannot create Foo layer acme") as caught:
        load(seal(path, "foo"), keys=site)
    assert "core=" in caught.value.hint
    assert "Exception from src" in caught.value.__notes__[0]


def test_an_operation_of_onnx_that_openvino_lacks(tmp_path, seal, site):
    helper = onnx.helper
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 4]) for n in "xy")
    node = helper.make_node("Foo", ["x"], ["y"], domain="com.acme")
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.acme", 1)],
    )
    (tmp_path / "foo.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(KeymgmtError, match=r"operations: com\.acme\.Foo") as caught:
        load(seal(tmp_path / "foo.onnx", "foo"), keys=site)
    assert "core=" in caught.value.hint
