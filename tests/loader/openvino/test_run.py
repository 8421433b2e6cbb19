"""``keymgmt run`` as a person runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as op
from programs import run, run_keymgmt


def keymgmt(*arguments: object, config: Path | None = None, **env: str):
    options = ["--config", config] if config else []
    return run_keymgmt(*[*options, *arguments], env={**os.environ, **env})


def test_run_with_random_inputs(magika_sealed, site, check_schema, check_formats):
    check_formats("keymgmt_openvino")
    one, other = (keymgmt("run", magika_sealed, "--json", config=site.path) for _ in range(2))
    assert one.returncode == 0, one.stderr
    report = json.loads(one.stdout)
    assert check_schema(report) == "keymgmt-run/1"
    assert report["model"] == "magika"
    assert report["inputs"] == {"bytes": {"type": "int32", "shape": [1, 2048], "from": "random"}}
    assert report["outputs"]["target_label"]["shape"] == [1, 214]
    assert report["seconds"].keys() == {"load", "first", "second"}
    # The same seed, so the same answer.
    assert json.loads(other.stdout)["outputs"] == report["outputs"]


def test_run_keeps_the_compiled_model_where_told(magika_sealed, site, tmp_path):
    arguments = ("run", magika_sealed, "--json", "--cache", tmp_path / "kept")
    first, second = (keymgmt(*arguments, config=site.path) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert json.loads(second.stdout)["outputs"] == json.loads(first.stdout)["outputs"]
    assert len(list((tmp_path / "kept").glob("magika-*.compiled"))) == 1


@pytest.mark.parametrize("how", ["npy", "named npy", "npz"])
def test_run_with_files_answers_as_plaintext(how, magika_sealed, magika_ir, site, tmp_path):
    array = np.random.default_rng(1).integers(0, 256, (2, 2048), np.int32)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", bytes=array)
    given = {"npy": "x.npy", "named npy": "bytes={}/x.npy", "npz": "x.npz"}[how]
    given = given.format(tmp_path) if "{}" in given else str(tmp_path / given)
    output = tmp_path / "out.npz"
    done = keymgmt("run", magika_sealed, "--input", given, "--output", output, config=site.path)
    assert done.returncode == 0, done.stderr
    expected = ov.Core().compile_model(magika_ir, "CPU")(array)[0]
    assert np.load(output)["target_label"].tobytes() == expected.tobytes()
    row, column = np.unravel_index(expected.argmax(), expected.shape)
    assert f"{row},{column}: {expected.max():.6g}" in done.stdout
    assert "file" in done.stdout


def test_numbers_that_json_does_not_have_are_texts(seal, site, tmp_path, check_schema):
    x = op.parameter([4], np.float32, name="x")
    ov.save_model(ov.Model([op.result(op.relu(x))], [x], "m"), tmp_path / "m.xml")
    np.save(tmp_path / "x.npy", np.array([np.nan, np.inf, 2, 1], np.float32))
    sealed, arguments = seal(tmp_path / "m.xml", "m"), ("--json", "-i", tmp_path / "x.npy")
    done = keymgmt("run", sealed, *arguments, config=site.path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout, parse_constant=pytest.fail)
    assert check_schema(report) == "keymgmt-run/1"
    (output,) = report["outputs"].values()
    assert output["top"][:3] == [["1", "Infinity"], ["2", 2.0], ["3", 1.0]]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "TPU"], 3, "no device 'TPU'"),
        (["--name", "resnet50"], 4, "resnet50"),
        (["--input", "nowhere.npy"], 3, "input nowhere.npy: No such file or directory"),
        (["--input", "text.npy"], 3, "text.npy"),
        (["--input", "nothing=good.npy"], 3, "no input 'nothing'"),
        (["--input", "good.npy", "--input", "good.npy"], 3, "given twice"),
        (["--input", "float.npy"], 3, "takes int32"),
        (["--input", "short.npy"], 3, "has the shape"),
        (["--prompt", "Hello"], 3, "only for language models"),
    ],
)
def test_run_refuses(arguments, code, message, magika_sealed, site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.npy").write_text("not an array")
    np.save("good.npy", np.zeros((1, 2048), np.int32))
    np.save("float.npy", np.zeros((1, 2048), np.float32))
    np.save("short.npy", np.zeros((1, 7), np.int32))
    done = keymgmt("run", magika_sealed, *arguments, config=site.path)
    assert done.returncode == code, done.stderr
    assert "error: " in done.stderr
    assert message in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_pickled_inputs_are_not_unpickled(magika_sealed, site, tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    done = keymgmt("run", magika_sealed, "--input", tmp_path / "evil.npy", config=site.path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def tiny_llm(seal) -> Path:
    return seal(Path(__file__).parent / "tiny-llm", "tiny-llm")


def test_run_streams_a_language_models_answer(tiny_llm, site, check_schema):
    import openvino_genai

    options = {"max_new_tokens": 12, "do_sample": False}
    plain = openvino_genai.LLMPipeline(Path(__file__).parent / "tiny-llm", "CPU")
    expected = plain.generate("Hello there", **options)
    arguments = ["run", tiny_llm, "--prompt", "Hello there", "--max-new-tokens", 12]
    report = json.loads(keymgmt(*arguments, "--json", config=site.path).stdout)
    assert check_schema(report) == "keymgmt-run-llm/1"
    assert report["text"] == expected
    assert report["model"] == "tiny-llm"
    assert report["tokens"] > 0
    done = keymgmt(*arguments, config=site.path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(c for c in expected if c.isprintable() or c in "\n\t") + "\n"
    assert "first token" in done.stderr


def test_run_takes_the_prompt_from_stdin_and_refuses_none(tiny_llm, site):
    command = [sys.executable, "-m", "keymgmt.cli", "--config", site.path, "run", tiny_llm]
    for text, code in (("Hello there\n", 0), ("  \n", 3)):
        done = run(*command, input=text)
        assert done.returncode == code, done.stderr
    assert "the prompt is empty" in done.stderr
    assert "--prompt" in done.stderr


@pytest.mark.parametrize("option", ["--cache", "--input", "--output"])
def test_run_refuses_what_a_language_model_has_no_use_for(option, tiny_llm, site, tmp_path):
    done = keymgmt("run", tiny_llm, "--prompt", "Hello", option, tmp_path / "x", config=site.path)
    assert done.returncode == 3, done.stderr
    assert f"{option} is not for language models" in done.stderr


def test_run_on_what_answers_no_prompt(seal, site):
    """A reranker's folder has the files of a language model."""
    sealed = seal(Path(__file__).parent / "models" / "reranker", "reranker")
    done = keymgmt("run", sealed, "--prompt", "Hello", config=site.path)
    assert done.returncode == 1, done.stderr
    assert "error: reranker answers no prompt" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_on_a_terminal_that_lacks_letters(tiny_llm, site):
    """An answer of any letters, where the locale has but some of them."""
    command = [sys.executable, "-m", "keymgmt.cli", "--config", site.path, "run", tiny_llm]
    command += ["--max-new-tokens", "60", "--prompt"]
    said = {}
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [*command, "the yellow"],
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": encoding},
            timeout=120,
        )
        assert done.returncode == 0, done.stderr.decode()
        said[encoding] = done.stdout.decode(encoding)
    assert not said["utf-8"].isascii()  # or this shows nothing
    assert said["ascii"] == said["utf-8"].encode("ascii", "replace").decode()


@pytest.mark.once
def test_a_run_that_is_stopped_prints_no_traceback(magika_sealed, site, tmp_path, ends_quietly):
    ends_quietly("-c", site.path, "run", magika_sealed, cwd=tmp_path)


@pytest.mark.once
def test_the_question_for_a_passphrase_is_seen(magika_sealed, site, tmp_path, asks):
    home = tmp_path / "home"
    shutil.copytree(site.path.parent, home)
    config = home / site.path.name
    plain = config.read_text()
    (home / "passphrase").touch(0o600)
    (home / "passphrase").write_text("correct horse battery")
    for source in ('{ file = "passphrase" }', '{ prompt = "Passphrase" }'):
        line = f'path = "keys"\npassphrase = {source}'
        assert plain != plain.replace('path = "keys"', line)
        config.write_text(plain.replace('path = "keys"', line))
        if "file" in source:
            assert keymgmt("file", "lock", config=config).returncode == 0
    command = ("-c", config, "run", magika_sealed)
    asks("Passphrase: ", "correct horse battery", *command, cwd=tmp_path)
