"""What the loaders share: which file, and its content in memory that is wiped."""

from __future__ import annotations

import pytest
from bits import flipped

import keymgmt
from keymgmt.errors import FormatError, IntegrityError
from keymgmt.loading import External, choose_file, file_bytes, file_memory, outside_part

HINT = "seal one"


@pytest.fixture
def opened(site):
    with keymgmt.open(site.seal(), keys=site.config()) as sealed:
        yield sealed


def test_which_file_is_read(opened):
    def chosen(*suffixes, file=None):
        return choose_file(opened, file, suffixes, label="model", hint=HINT)

    assert chosen(".xml", ".bin") == "model.xml"  # its main one
    assert chosen(".bin") == "model.bin"
    assert chosen(file="sub/empty") == "sub/empty"
    with pytest.raises(FormatError, match="no file 'other'") as caught:
        chosen(file="other")
    assert caught.value.hint == "it has model.bin, model.xml, sub/empty"
    with pytest.raises(FormatError, match="has 2 models") as caught:
        chosen("", ".bin")
    assert caught.value.hint == "say which: file=model.bin, sub/empty"
    with pytest.raises(FormatError, match="has no model") as caught:
        chosen(".onnx")
    assert caught.value.hint == HINT


def test_its_content(opened, site):
    expected = (site.plain / "model.bin").read_bytes()
    assert file_memory(opened, "model.bin")[:] == expected
    assert file_memory(opened, "sub/empty")[:] == bytes(1)
    with file_bytes(opened, "model.bin") as (data, room):
        assert data == expected
    assert not any(room)


def test_a_damaged_one_is_wiped(opened, site):
    payload = site.root / "m.sealed" / "payload" / "model.bin.floe"
    payload.write_bytes(flipped(payload.read_bytes()))
    with pytest.raises(IntegrityError):
        file_memory(opened, "model.bin")


def test_where_tensors_outside_are(opened):
    def part(location, offset=0, length=None):
        return outside_part(opened, "model.xml", External(location, offset, length), "it")

    assert part("./model.bin") == ("model.bin", 2_560_000)
    assert part("model.bin", 10, 20) == ("model.bin", 20)
    for wrong in (("no.bin",), ("../model.bin",), ("model.bin", 1, 2_560_000), ("sub/empty",)):
        with pytest.raises(FormatError):
            part(*wrong)
