"""Real models: the sealed copy answers bit for bit as the plaintext one, and sensibly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import tokenizers
from keymgmt_openvino import load, read
from keymgmt_openvino_demo import _magika

import keymgmt


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


@pytest.fixture(scope="module")
def file_types(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    samples = {
        "python": Path(keymgmt.errors.__file__),
        "elf": Path(ov._pyopenvino.__file__),
        "onnx": _magika.model_directory() / "model.onnx",
        "markdown": _magika.model_directory() / "README.md",
        "json": _magika.model_directory() / "config.min.json",
    }
    (folder / "program.c").write_text(
        '#include <stdio.h>\n\nint main(int argc, char **argv) {\n    printf("%d\\n", argc);\n'
        "    for (int i = 0; i < argc; i++) {\n        puts(argv[i]);\n    }\n    return 0;\n}\n"
    )
    return {**samples, "c": folder / "program.c"}


@pytest.mark.parametrize("source", ["ir", "onnx"])
def test_magika_sealed_answers_as_plaintext(source, magika_ir, seal, site, core, file_types):
    plain = magika_ir if source == "ir" else _magika.model_directory() / "model.onnx"
    reference = core.compile_model(plain, "CPU")
    names = _magika.labels()
    with load(seal(plain, "magika"), name="magika", keys=site) as model:
        for expected, file in file_types.items():
            inputs = _magika.features(file)
            answer = model(inputs)[0]
            assert same_bits(answer, reference(inputs)[0])
            assert names[answer[0].argmax()] == expected


def test_minilm_sealed_answers_as_plaintext(minilm_ir, minilm_directory, seal, site, core):
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm_directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(
        [
            "A man is eating food.",
            "A man is eating a piece of bread.",
            "Quarterly revenue grew by ten percent.",
        ]
    )
    inputs = {
        "input_ids": np.array([each.ids for each in encoded], np.int64),
        "attention_mask": np.array([each.attention_mask for each in encoded], np.int64),
    }
    reference = core.compile_model(minilm_ir, "CPU")
    with load(seal(minilm_ir, "minilm"), name="minilm", keys=site) as model:
        assert [port.any_name for port in model.inputs] == ["input_ids", "attention_mask"]
        answer = model(inputs)["sentence_embedding"]
        assert same_bits(answer, reference(inputs)["sentence_embedding"])
        related, unrelated = float(answer[0] @ answer[1]), float(answer[0] @ answer[2])
        assert related == pytest.approx(0.7553, abs=1e-3)
        assert unrelated < 0.1


def test_a_graph_that_was_read_compiles_and_outlives_the_call(
    magika_sealed, magika_ir, site, core, file_types
):
    graph = read(magika_sealed, name="magika", keys=site, core=core)
    graph.reshape([1, 2048])
    compiled = core.compile_model(graph, "CPU")
    del graph
    plain = core.read_model(magika_ir)
    plain.reshape([1, 2048])
    inputs = _magika.features(file_types["python"])
    assert same_bits(compiled(inputs)[0], core.compile_model(plain, "CPU")(inputs)[0])


@pytest.mark.parametrize("device", ["AUTO", "AUTO:-GPU", "BATCH:CPU", "HETERO:CPU", "MULTI:CPU"])
def test_virtual_devices(device, magika_sealed, magika_ir, site, core, file_types):
    inputs = _magika.features(file_types["elf"])
    with load(magika_sealed, device, name="magika", keys=site) as model:
        expected = core.compile_model(magika_ir, "CPU")(inputs)[0]
        np.testing.assert_allclose(model(inputs)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_graph_without_weights(tmp_path, seal, site):
    from openvino import opset13 as op

    x = op.parameter([1, 2], np.float32, name="x")
    ov.save_model(ov.Model([op.result(op.relu(x))], [x], "plain"), tmp_path / "plain.xml")
    assert (tmp_path / "plain.bin").stat().st_size == 0
    with load(seal(tmp_path / "plain.xml", "plain"), keys=site) as model:
        assert model(np.array([[-1, 2]], np.float32))[0].tolist() == [[0, 2]]


def test_options_reach_openvino(magika_sealed, site):
    with load(magika_sealed, "CPU", {"INFERENCE_NUM_THREADS": 1}, keys=site) as model:
        assert model.compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_wrong_name_is_refused(magika_sealed, site):
    with pytest.raises(keymgmt.errors.KeymgmtError) as caught:
        load(magika_sealed, name="resnet50", keys=site)
    assert "resnet50" in str(caught.value)
