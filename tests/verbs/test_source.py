"""What is sealed is what was listed, whoever else writes in the folder meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import keymgmt
from keymgmt._verbs import source
from keymgmt.errors import ConfigError


@pytest.mark.parametrize("kind", ["link", "file", "fifo", "folder", "nothing"])
def test_a_file_that_was_exchanged_after_it_was_listed(site, monkeypatch, tmp_path, kind):
    """Whoever may write in the folder would have any file of root's sealed and signed."""
    secret = tmp_path / "shadow"
    secret.write_bytes((site.plain / "model.bin").read_bytes())
    victim = site.plain / "model.bin"
    real = source._check

    def exchange(path, files):
        real(path, files)
        victim.unlink()
        if kind == "link":
            victim.symlink_to(secret)
        elif kind == "file":
            secret.rename(victim)
        elif kind == "fifo":
            os.mkfifo(victim)
        elif kind == "folder":
            victim.mkdir()

    monkeypatch.setattr(source, "_check", exchange)
    with pytest.raises(ConfigError, match=r"model\.bin") as caught:
        site.seal()
    assert "exchanged" in str(caught.value) or "cannot read" in str(caught.value)
    assert not (site.root / "m.sealed").exists()


def test_a_folder_that_was_exchanged_for_a_link(site, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "empty").write_bytes(b"")
    real = source._check

    def exchange(path, files):
        real(path, files)
        (site.plain / "sub").rename(tmp_path / "old")
        (site.plain / "sub").symlink_to(elsewhere)

    monkeypatch.setattr(source, "_check", exchange)
    with pytest.raises(ConfigError, match="exchanged"):
        site.seal()


def test_a_folder_that_is_exchanged_while_its_sibling_is_listed(site, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_bytes(b"root's own")
    (site.plain / "zzz").mkdir()
    (site.plain / "zzz" / "x").write_bytes(b"x")
    real = os.fwalk

    def fwalk(*args, **options):
        for count, each in enumerate(real(*args, **options)):
            yield each
            if not count:
                (site.plain / "zzz").rename(tmp_path / "old")
                (site.plain / "zzz").symlink_to(elsewhere)

    monkeypatch.setattr(os, "fwalk", fwalk)
    with pytest.raises(ConfigError, match=r"zzz was exchanged while the folder was being listed"):
        site.seal()


def test_a_file_by_its_name_may_be_a_link(site, tmp_path):
    """A person named it; what was listed is what is sealed."""
    link = Path(tmp_path / "link.onnx")
    link.symlink_to(site.plain / "model.xml")
    keymgmt.seal(link, tmp_path / "l.sealed", to=["local:a"], keys=site.config())
    with keymgmt.open(tmp_path / "l.sealed", keys=site.config()) as model:
        assert model.read("link.onnx") == (site.plain / "model.xml").read_bytes()


CONSTANT = b'<net><layers><layer id="0" type="Const"/></layers></net>'
NO_CONSTANT = b'<net><layers><layer id="0" type="Parameter"/></layers></net>'


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"m.tflite": b"x"}, "files"),
        ({"m.gguf": b"x"}, "files"),
        ({"m.pb": b"x"}, "files"),
        ({"m.pdmodel": b"x", "m.pdiparams": b"y"}, "files"),
        ({"M.XML": CONSTANT, "M.bin": b"y"}, "openvino-ir"),
        ({"M.XML": CONSTANT, "M.BIN": b"y"}, "openvino-ir"),
        ({"m.xml": NO_CONSTANT}, "openvino-ir"),
        ({"M.ONNX": b""}, "onnx"),
        ({"m.safetensors": b""}, "files"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_model_that_is_one_file_and_what_is_beside_it(files, kind, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    for name, content in {**files, "another.bin": b"of another model"}.items():
        (folder / name).write_bytes(content)
    found = source.find_source(folder / next(iter(files)))
    assert (found.kind, found.main, set(found.files)) == (kind, next(iter(files)), set(files))


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "saved_model.pb"])
def test_what_is_no_model_alone(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="neither an IR") as caught:
        source.find_source(tmp_path / name)
    assert "compress_to_fp16=False" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "main", "paths", "said"),
    [
        ("openvino-ir", "m.xml", ["m.xml", "m.bin"], None),
        ("files", "m.gguf", ["m.gguf"], None),
        ("files", None, ["model/M.TFLITE", "readme.md"], None),
        ("files", None, ["openvino_tokenizer.xml", "openvino_encoder_model.xml"], None),
        ("files", None, ["a.xml", "b.onnx"], "it has 2 graphs: load(..., file='a.xml')"),
        ("files", None, ["pytorch_model.bin", "config.json"], "OpenVINO reads none of its files"),
        ("files", None, ["model.safetensors", "config.json"], None),
        ("files", None, ["tokenizer.json"], None),
    ],
)
def test_why_a_model_will_not_be_loaded(kind, main, paths, said):
    answer = source.why_not_loaded(kind, main, paths)
    assert answer is None if said is None else said in answer


def test_what_was_looked_at_is_what_is_sealed_and_no_second_look(site, monkeypatch, tmp_path):
    found = source.find_source(site.plain)
    (site.plain / "later").write_bytes(b"came after somebody was told what is sealed")
    monkeypatch.setattr(os, "fwalk", lambda *_, **__: pytest.fail("it was listed again"))
    keymgmt.seal(found, tmp_path / "m.sealed", to=["local:a"], keys=site.config())
    assert set(keymgmt.inspect(tmp_path / "m.sealed").manifest.by_path) == set(found.files)
