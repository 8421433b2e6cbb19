"""An ONNX file in memory must not reach for data outside of itself."""

from __future__ import annotations

import numpy as np
import onnx
import openvino as ov
import pytest
from keymgmt_openvino import load
from keymgmt_openvino._onnx import check_self_contained
from onnx import TensorProto, helper

from keymgmt.errors import FormatError


def tensor(external: bool) -> TensorProto:
    made = helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    if external:
        made.ClearField("float_data")
        made.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", "*/_ORT_MEM_ADDR_/*"),
            ("offset", "4096"),
            ("length", "16"),
        ):
            made.external_data.add(key=key, value=value)
    return made


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
def test_outside_data_is_found_wherever_it_is(place):
    check_self_contained(memoryview(place(tensor(external=False)).SerializeToString()), "m.onnx")
    outside = memoryview(place(tensor(external=True)).SerializeToString())
    with pytest.raises(FormatError, match="outside of itself"):
        check_self_contained(outside, "m.onnx")


def test_either_sign_of_outside_data_is_enough():
    located, named = tensor(external=False), tensor(external=False)
    located.data_location = TensorProto.EXTERNAL
    named.external_data.add(key="location", value="/etc/passwd")
    for weight in (located, named):
        with pytest.raises(FormatError, match="outside of itself"):
            check_self_contained(memoryview(in_initializer(weight).SerializeToString()), "m.onnx")


def test_a_second_graph_is_merged_by_parsers_and_so_is_looked_at():
    plain = in_initializer(tensor(external=False)).SerializeToString()
    extra = onnx.ModelProto()
    extra.graph.initializer.append(tensor(external=True))
    with pytest.raises(FormatError, match="outside of itself"):
        check_self_contained(memoryview(plain + extra.SerializeToString()), "m.onnx")


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
    ],
)
def test_what_is_no_protobuf_message(data):
    with pytest.raises(FormatError, match="not an ONNX model"):
        check_self_contained(memoryview(data), "m.onnx")


def test_nesting_has_a_bound():
    data = b""
    for _ in range(40):  # Graph.node.attribute.g, from the inside out
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            size = len(data)
            data = tag + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + data
    with pytest.raises(FormatError, match="nested"):
        check_self_contained(
            memoryview(b"\x3a" + bytes([len(data) & 0x7F | 0x80, len(data) >> 7]) + data), "m.onnx"
        )


def test_loading_refuses_it_and_takes_the_same_model_without(tmp_path, seal, site):
    for external, name in ((False, "inside"), (True, "outside")):
        model = in_initializer(tensor(external))
        model.ir_version = 8
        model.opset_import[0].version = 13
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    with load(seal(tmp_path / "inside.onnx", "inside"), keys=site) as model:
        x = np.ones(4, np.float32)
        expected = ov.Core().compile_model(tmp_path / "inside.onnx", "CPU")(x)[0]
        assert model(x)[0].tolist() == expected.tolist() == [2, 3, 4, 5]
    with pytest.raises(FormatError, match="outside of itself") as caught:
        load(seal(tmp_path / "outside.onnx", "outside"), keys=site)
    assert "convert" in str(caught.value.hint)
