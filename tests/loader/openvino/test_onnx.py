"""Tensors outside of an ONNX file: those of the same sealed model are loaded, others refused."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from keymgmt_openvino import _read, load, read
from onnx import TensorProto, helper

import keymgmt
from keymgmt.errors import ConfigError, FormatError, KeymgmtError
from keymgmt.loading import External, move_external, outside_path

ADDRESS = {"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096", "length": "16"}


def tensor(external: dict[str, str] | bool) -> TensorProto:
    made = helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    if external:
        made.ClearField("float_data")
        made.data_location = TensorProto.EXTERNAL
        for key, value in (ADDRESS if external is True else external).items():
            made.external_data.add(key=key, value=value)
    return made


def seen(model: bytes) -> list[External]:
    """The tensors that are outside."""
    found: list[External] = []
    assert move_external(memoryview(model), "m.onnx", found.append) is None
    return found


def add_graph(weights: list[TensorProto], nodes=None) -> onnx.GraphProto:
    return helper.make_graph(
        nodes or [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        weights,
    )


def in_initializer(weight):
    return helper.make_model(add_graph([weight]))


def in_constant(weight):
    constant = helper.make_node("Constant", [], ["w"], value=weight)
    return helper.make_model(add_graph([], [constant, helper.make_node("Add", ["x", "w"], ["y"])]))


def in_subgraph(weight):
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["b"], value=weight)],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [4])],
    )
    condition = helper.make_node(
        "Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True])
    )
    choose = helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)
    return helper.make_model(
        add_graph([], [condition, choose, helper.make_node("Add", ["x", "w"], ["y"])])
    )


def in_function(weight):
    model = in_initializer(tensor(external=False))
    model.functions.append(
        helper.make_function(
            "local", "f", [], ["w"], [helper.make_node("Constant", [], ["w"], value=weight)], []
        )
    )
    return model


def in_sparse(weight):
    model = in_initializer(tensor(external=False))
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(weight)
    return model


def in_training(weight):
    model = in_initializer(tensor(external=False))
    model.training_info.add().algorithm.initializer.append(weight)
    return model


PLACES = [in_initializer, in_constant, in_subgraph, in_function, in_sparse, in_training]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_outside_data_is_found_and_moved_wherever_it_is(place):
    assert not seen(place(tensor(external=False)).SerializeToString())
    outside = place(tensor(external=True)).SerializeToString()
    found = seen(outside)
    assert set(found) == {External("*/_ORT_MEM_ADDR_/*", 4096, 16)}
    new = External("elsewhere", 1 << 40, 300)
    parts = move_external(memoryview(outside), "m.onnx", lambda _: new)
    moved = b"".join(map(bytes, parts))
    assert seen(moved) == [new] * len(found)
    # Else nothing changed: the onnx package reads the same model with the tensors elsewhere.
    expected = onnx.ModelProto.FromString(outside)
    text = str(expected).replace("*/_ORT_MEM_ADDR_/*", "elsewhere")
    text = text.replace('"4096"', f'"{1 << 40}"').replace('"16"', '"300"')
    assert str(onnx.ModelProto.FromString(moved)) == text


@pytest.mark.parametrize("sign", ["located", "named", "both ways"])
def test_a_tensor_that_contradicts_itself_is_refused(sign):
    """Runtimes differ in what they make of it."""
    weight = tensor(external=sign == "both ways")
    if sign == "located":
        weight.data_location = TensorProto.EXTERNAL
    elif sign == "named":
        weight.external_data.add(key="location", value="/etc/passwd")
    data = in_initializer(weight).SerializeToString()
    if sign == "both ways":
        inner = weight.SerializeToString()
        assert inner in data
        again = inner.replace(b"\x70\x01", b"\x70\x01\x70\x00")  # data_location, twice
        assert len(again) == len(inner) + 2
        graph = b"\x2a" + bytes([len(again)]) + again
        data = b"\x3a" + bytes([len(graph)]) + graph
    with pytest.raises(FormatError, match="contradicts itself"):
        seen(data)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([("location", "a"), ("location", "b")], "twice"),
        ([("location", "a"), ("offset", "-1")], "offset '-1'"),
        ([("location", "a"), ("length", "0x10")], "length '0x10'"),
        ([("location", "a"), ("length", "\u0664")], "length"),
        ([("location", "a"), ("length", "9" * 20)], "length"),
    ],
)
def test_external_data_that_runtimes_could_read_in_two_ways(entries, said):
    weight = tensor(external=True)
    weight.ClearField("external_data")
    for key, value in entries:
        weight.external_data.add(key=key, value=value)
    with pytest.raises(FormatError, match=said):
        seen(in_initializer(weight).SerializeToString())


def test_a_second_graph_is_merged_by_parsers_and_so_is_looked_at():
    plain = in_initializer(tensor(external=False)).SerializeToString()
    extra = onnx.ModelProto()
    extra.graph.initializer.append(tensor(external=True))
    assert len(seen(plain + extra.SerializeToString())) == 1


def test_a_location_is_within_the_folder_of_the_model():
    assert outside_path("m.onnx", "w.data", "m") == "w.data"
    assert outside_path("1/m.onnx", "./sub/w.data", "m") == "1/sub/w.data"
    for location in ("", "/etc/passwd", "../w", "sub/../../w", "*/_ORT_MEM_ADDR_/*", "a\0b"):
        with pytest.raises(FormatError, match="no file of this model") as caught:
            outside_path("1/m.onnx", location, "m")
        assert "compress_to_fp16=False" in caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        b"\x3a\x05abc",  # a graph longer than the file
        b"\x3a",  # a tag alone
        b"\x3b\x3c",  # a group
        b"\x3f\x00",  # wire type 7
        b"\xba\x80\x80\x80\x80\x01\x00",  # a tag of more than 32 bits
        b"\x08" + b"\xff" * 10 + b"\x01",  # a number of more than 10 bytes
        b"\x09abc",  # 8 bytes, of which 3 are there
        b"\x3a\x04\x2a\x02\x68\x01",  # external data that is a number
        b"\x3a\x04\x2a\x02\x72\x00",  # a data location that is a message
    ],
)
def test_what_is_no_protobuf_message(data):
    with pytest.raises(FormatError, match="not an ONNX model"):
        seen(data)


def test_nesting_has_a_bound():
    data = b""
    for _ in range(40):  # Graph.node.attribute.g, from the inside out
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            size = len(data)
            data = tag + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + data
    with pytest.raises(FormatError, match="nested"):
        seen(b"\x3a" + bytes([len(data) & 0x7F | 0x80, len(data) >> 7]) + data)


INPUT = np.ones(4, np.float32)


def write(path: Path, weight: TensorProto) -> Path:
    model = in_initializer(weight)
    model.ir_version = 8
    model.opset_import[0].version = 13
    path.write_bytes(model.SerializeToString())
    return path


def test_a_model_with_all_inside(tmp_path, seal, site, core):
    plain = write(tmp_path / "inside.onnx", tensor(external=False))
    with load(seal(plain, "inside"), keys=site) as model:
        expected = core.compile_model(plain, "CPU")(INPUT)[0]
        assert model(INPUT)[0].tolist() == expected.tolist() == [2, 3, 4, 5]


def at(location: str, offset: str = "", length: str = "") -> TensorProto:
    entries = {"location": location, "offset": offset, "length": length}
    return tensor({key: value for key, value in entries.items() if value})


WEIGHTS = np.array([1, 2, 3, 4], np.float32)


@pytest.mark.parametrize("offset", ["", "0", "4096"])
@pytest.mark.parametrize("length", ["", "0", "16"])
def test_tensors_beside_the_file_are_sealed_with_it_and_loaded(
    offset, length, tmp_path, seal, site, core, monkeypatch, watched
):
    plain = write(tmp_path / "model.onnx", at("sub/w.data", offset, length))
    (tmp_path / "sub").mkdir()
    content = bytes(int(offset or 0)) + WEIGHTS.tobytes()
    (tmp_path / "sub" / "w.data").write_bytes(content)
    (tmp_path / "another.data").write_bytes(b"not of this model")
    expected = core.compile_model(plain, "CPU")(INPUT)[0]
    sealed = seal(plain, "outside")
    assert list(keymgmt.inspect(sealed).manifest.by_path) == ["model.onnx", "sub/w.data"]
    # OpenVINO would look here for it.
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (here / "sub" / "w.data").write_bytes(bytes(len(content)))
    monkeypatch.chdir(here)
    graph = read(sealed, keys=site)
    assert watched
    assert all(memory.zeros() for memory in watched)  # OpenVINO has a copy of its own
    assert core.compile_model(graph, "CPU")(INPUT)[0].tolist() == expected.tolist() == [2, 3, 4, 5]
    with load(sealed, keys=site) as model:
        assert model(INPUT)[0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (tensor(external=True), "no file of this model"),
        (at("/etc/passwd"), "no file of this model"),
        (at("../w.data"), "no file of this model"),
        (at("sub/../../w.data"), "no file of this model"),
    ],
)
def test_what_load_refuses_is_said_when_it_is_sealed(weight, said, tmp_path, seal, site, caplog):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.data").write_bytes(WEIGHTS.tobytes())
    plain = write(folder / "m.onnx", weight)
    for source in (plain, folder):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "keymgmt"):
            sealed = seal(source, "outside")
        (record,) = caplog.records
        assert said in record.getMessage()
        assert "load will refuse it" in record.getMessage()
        with pytest.raises(FormatError, match=said) as caught:
            load(sealed, keys=site)
        assert "compress_to_fp16=False" in caught.value.hint


def test_tensors_that_are_missing(tmp_path, seal, site, caplog):
    folder = tmp_path / "model"
    folder.mkdir()
    plain = write(folder / "m.onnx", at("w.data"))
    with pytest.raises(ConfigError, match=r"w\.data, which is not beside it"):
        seal(plain, "missing")
    with caplog.at_level(logging.WARNING, "keymgmt"):
        sealed = seal(folder, "missing")
    assert "w.data, which is not in the folder" in caplog.text
    with pytest.raises(FormatError, match=r"w\.data, which is no file of it"):
        load(sealed, keys=site)


@pytest.mark.parametrize(("offset", "length"), [("1", "16"), ("16", ""), ("0", "17")])
def test_tensors_beyond_the_end_of_their_file(offset, length, tmp_path, seal, site):
    plain = write(tmp_path / "m.onnx", at("w.data", offset, length))
    (tmp_path / "w.data").write_bytes(WEIGHTS.tobytes())
    with pytest.raises(FormatError, match="beyond the end"):
        load(seal(plain, "short"), keys=site)


def test_tensors_that_are_named_again_and_again_count_each_time(tmp_path, seal, site, monkeypatch):
    """OpenVINO copies each: a small file could ask for any amount of memory."""
    model = in_initializer(at("w.data", "0", "65536"))
    for number in range(100):
        again = model.graph.initializer.add()
        again.CopyFrom(model.graph.initializer[0])
        again.name = f"w{number}"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "w.data").write_bytes(bytes(65536))
    asked: list[int] = []
    monkeypatch.setattr(_read, "check_free_memory", lambda size, name: asked.append(size))
    with contextlib.suppress(KeymgmtError):
        load(seal(tmp_path / "m.onnx", "again"), keys=site)
    assert max(asked) == 101 * 65536


def test_a_real_model_with_its_weights_outside(tmp_path, seal, site, core):
    from keymgmt_openvino_demo import _magika

    plain = tmp_path / "m.onnx"
    onnx.save_model(
        onnx.load(_magika.model_directory() / "model.onnx"),
        plain,
        save_as_external_data=True,
        location="weights.data",
        size_threshold=0,
    )
    assert (tmp_path / "weights.data").stat().st_size > 3_000_000
    inputs = _magika.features(Path(__file__))
    expected = core.compile_model(plain, "CPU")(inputs)[0]
    with load(seal(plain, "magika"), keys=site) as model:
        assert model(inputs)[0].tobytes() == expected.tobytes()
        assert _magika.labels()[expected[0].argmax()] == "python"
