"""A sealed ONNX model answers in ONNX Runtime as the file does; nothing is read elsewhere."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys

import pytest
from bits import flip_in

np = pytest.importorskip("numpy")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
ours = pytest.importorskip("keymgmt_onnxruntime")

from keymgmt_onnxruntime import _load  # noqa: E402

from keymgmt.errors import ConfigError, FormatError, IntegrityError, KeymgmtError  # noqa: E402

WEIGHTS = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
INPUT = np.ones((1, 64), np.float32)


def tensor(location: str | None, offset: int = 0):
    made = onnx.numpy_helper.from_array(WEIGHTS, "w")
    if location is not None:
        made.ClearField("raw_data")
        made.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(offset))):
            made.external_data.add(key=key, value=value)
    return made


def model(nodes, weights) -> bytes:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [value("x", onnx.TensorProto.FLOAT, [1, 64])],
        [value("y", onnx.TensorProto.FLOAT, [1, 64])],
        weights,
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    made.ir_version = 10
    return made.SerializeToString()


MULTIPLY = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]


def inside(folder) -> None:
    (folder / "net.onnx").write_bytes(model(MULTIPLY, [tensor(None)]))


def outside(folder) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "w.data").write_bytes(bytes(4096) + WEIGHTS.tobytes())
    (folder / "net.onnx").write_bytes(model(MULTIPLY, [tensor("./sub/w.data", 4096)]))


def in_constant(folder) -> None:
    constant = onnx.helper.make_node("Constant", [], ["w"], value=tensor("w.data"))
    (folder / "w.data").write_bytes(WEIGHTS.tobytes())
    (folder / "net.onnx").write_bytes(model([constant, *MULTIPLY], []))


def in_branch(folder) -> None:
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["b"], value=tensor("w.data"))],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [64, 64])],
    )
    truth = onnx.helper.make_tensor("c", onnx.TensorProto.BOOL, [], [True])
    condition = onnx.helper.make_node("Constant", [], ["c"], value=truth)
    choose = onnx.helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)
    (folder / "w.data").write_bytes(WEIGHTS.tobytes())
    (folder / "net.onnx").write_bytes(model([condition, choose, *MULTIPLY], []))


def answer(session) -> bytes:
    return session.run(None, {"x": INPUT})[0].tobytes()


@pytest.mark.parametrize("write", [inside, outside, in_constant])
def test_it_answers_as_from_the_file(seal, site, monkeypatch, write, wiped):
    sealed = seal(write)
    expected = answer(onnxruntime.InferenceSession(site.plain / "net.onnx"))
    # ONNX Runtime would look here for the tensors that are outside.
    elsewhere = site.root / "elsewhere"
    (elsewhere / "sub").mkdir(parents=True)
    for name in ("w.data", "sub/w.data"):
        (elsewhere / name).write_bytes(bytes(4096 + WEIGHTS.nbytes))
    monkeypatch.chdir(elsewhere)
    session = ours.load(sealed, keys=site.config(), name="m")
    gc.collect()
    # What we decrypted is gone, and the session does not need it.
    assert len(wiped) == (write is not inside)
    assert answer(session) == expected
    assert answer(session) == expected


def test_the_bytes_are_wiped_and_not_kept(seal, site, monkeypatch):
    kept = []
    real = onnxruntime.InferenceSession

    def watching(data, *arguments):
        kept.append(memoryview(data))
        return real(data, *arguments)

    sealed = seal(inside)
    monkeypatch.setattr(onnxruntime, "InferenceSession", watching)
    session = ours.load(sealed, keys=site.config())
    assert not any(kept[0])
    data = kept.pop().obj
    assert [each for each in gc.get_referrers(data) if not inspect.isframe(each)] == []
    assert session._model_bytes is None
    assert answer(session)


def test_options_may_be_used_again(seal, site):
    sealed = seal(outside)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found = [
        answer(ours.load(sealed, options, ["CPUExecutionProvider"], keys=site.config()))
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert options.intra_op_num_threads == 1


def test_what_it_does_not_take_from_memory_is_refused_and_read_nowhere(seal, site, monkeypatch):
    sealed = seal(in_branch)
    monkeypatch.chdir(site.plain)  # where it would find the file by its name
    with pytest.raises(KeymgmtError, match=r"cannot read net\.onnx of m") as caught:
        ours.load(sealed, keys=site.config())
    assert "nested graph" in caught.value.hint
    assert "private_folder" in caught.value.hint
    assert "ONNX Runtime said" in caught.value.__notes__[0]


@pytest.mark.parametrize("location", ["/etc/passwd", "../w.data", "*/_ORT_MEM_ADDR_/*"])
def test_tensors_that_are_not_of_the_model(seal, site, location):
    sealed = seal(
        lambda folder: (folder / "net.onnx").write_bytes(model(MULTIPLY, [tensor(location)]))
    )
    with pytest.raises(FormatError, match="no file of this model"):
        ours.load(sealed, keys=site.config())


def test_what_would_write_the_model_to_a_disk(seal, site, monkeypatch):
    sealed = seal(inside)
    graph, context = onnxruntime.SessionOptions(), onnxruntime.SessionOptions()
    graph.optimized_model_filepath = str(site.root / "o.onnx")
    context.add_session_config_entry("ep.context_enable", "1")
    cache = {"trt_engine_cache_enable": True}
    for arguments, said in (
        ((graph,), "optimized_model_filepath"),
        ((context,), r"ep\.context_enable"),
        ((None, [("TensorrtExecutionProvider", cache)]), "trt_engine_cache_enable"),
        ((None, ["TensorrtExecutionProvider"], [cache]), "trt_engine_cache_enable"),
    ):
        with pytest.raises(ConfigError, match=said):
            ours.load(sealed, *arguments, keys=site.config())
    assert not (site.root / "o.onnx").exists()
    # The word may be in what an option says.
    said_in_json = {"load_config": '{"NPU":{"CACHE_DIR":"/tmp/c"}}'}
    with pytest.raises(ConfigError, match="load_config may write the model"):
        ours.load(sealed, None, [("OpenVINOExecutionProvider", said_in_json)], keys=site.config())
    monkeypatch.setenv("ORT_TENSORRT_ENGINE_CACHE_ENABLE", "1")
    with pytest.raises(ConfigError, match="ORT_TENSORRT_ENGINE_CACHE_ENABLE"):
        ours.load(sealed, keys=site.config())


def add_by_name(options) -> None:
    options.add_provider("CPUExecutionProvider", {"x_cache_dir": "/tmp/c"})


def add_by_device(options) -> None:
    options.add_provider_for_devices(onnxruntime.get_ep_devices()[:1], {"x_cache_dir": "/tmp/c"})


def add_by_policy(options) -> None:
    options.set_provider_selection_policy(onnxruntime.OrtExecutionProviderDevicePolicy.PREFER_CPU)


@pytest.mark.parametrize("add", [add_by_name, add_by_device, add_by_policy])
def test_providers_whose_options_cannot_be_looked_at(seal, site, add):
    options = onnxruntime.SessionOptions()
    add(options)
    with pytest.raises(ConfigError, match="sess_options has providers") as caught:
        ours.load(seal(inside), options, keys=site.config())
    assert "providers=" in caught.value.hint


def test_what_is_no_model(seal, site):
    def two(folder):
        inside(folder)
        (folder / "other.onnx").write_bytes(b"\x08\x0a")

    sealed = seal(two)
    with pytest.raises(FormatError, match=r"m has 2 \.onnx files") as caught:
        ours.load(sealed, keys=site.config())
    assert "net.onnx, other.onnx" in caught.value.hint
    with pytest.raises(KeymgmtError, match=r"cannot read other\.onnx of m"):
        ours.load(sealed, keys=site.config(), file="other.onnx")
    assert ours.load(sealed, keys=site.config(), file="net.onnx").get_inputs()
    with pytest.raises(FormatError, match=r"m \(files\) has no \.onnx file"):
        ours.load(seal(lambda folder: (folder / "a").touch()), keys=site.config())


def test_memory_is_asked_for_first(seal, site, monkeypatch):
    asked = []
    monkeypatch.setattr(_load, "file_bytes", lambda *each, copies: asked.append(copies) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours.load(seal(inside), keys=site.config())
    assert asked == [_load._COPIES]


def test_a_damaged_one_hands_out_nothing(seal, site):
    sealed = seal(outside)
    payload = sealed / "payload" / "sub" / "w.data.floe"
    flip_in(payload)
    with pytest.raises(IntegrityError):
        ours.load(sealed, keys=site.config())


@pytest.mark.parametrize("first", ["keymgmt_onnxruntime", "onnxruntime"])
def test_it_sends_no_telemetry(seal, site, tmp_path, first):
    sealed = seal(inside)
    (site.root / "keymgmt.toml").write_text(
        f'[providers.local]\nbackend = "file"\npath = "{site.root}/keys"\n'
        '[policy]\npublishers = { "pub.pem" = ["*"] }\n'
    )
    (site.root / "keymgmt.toml").chmod(0o600)
    program = f"""
import sys, {first}
if "keymgmt" in {first!r}:
    session = keymgmt_onnxruntime.load(sys.argv[1], keys=sys.argv[2])
"""
    home = tmp_path / "home"
    home.mkdir()
    off = {"CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in off}
    line = [sys.executable, "-B", "-c", program, sealed, site.root / "keymgmt.toml"]
    subprocess.run(line, check=True, env=environment | {"HOME": str(home)}, timeout=120)
    written = [path for path in home.rglob("*") if path.is_file()]
    if first == "keymgmt_onnxruntime":
        assert not written
    elif tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 32):
        assert written  # the control: it would have been seen
