"""The compiled model, kept for this device: what it saves, what it is bound to, what it leaks."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from bits import flip_in, flipped
from keymgmt_openvino import load
from programs import run_python
from waiting import until

import keymgmt
from keymgmt._system import free_memory
from keymgmt.errors import ConfigError, IntegrityError


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def sealed(magika_sealed, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(magika_sealed, tmp_path / "magika.sealed")


def ones(model):
    return [
        np.ones(
            [1 if size.is_dynamic else size.get_length() for size in port.partial_shape],
            port.element_type.to_dtype(),
        )
        for port in model.inputs
    ]


@pytest.fixture
def answer(site):
    """``answer(path, ...)``: load, infer once, close."""

    def ask(path, *arguments, **options):
        with load(path, *arguments, keys=site, **options) as model:
            return model(ones(model))[0].copy()

    return ask


def kept(cache) -> Path:
    (file,) = cache.glob("*.compiled")
    return file


def damage(sealed) -> None:
    """Weights that no load would accept, so that a load which succeeds did not read them."""
    payload = sealed / "payload" / "magika.bin.floe"
    flip_in(payload, 1000)


def test_the_second_load_compiles_nothing_and_answers_the_same(sealed, cache, answer):
    expected = answer(sealed)
    assert np.array_equal(answer(sealed, cache=cache), expected)
    damage(sealed)
    with pytest.raises(IntegrityError):
        answer(sealed)
    assert np.array_equal(answer(sealed, cache=cache), expected)


def test_only_its_user_can_use_it(sealed, cache, answer):
    answer(sealed, cache=cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert sorted(file.stat().st_mode & 0o777 for file in cache.iterdir()) == [0o600] * 3
    cache.chmod(0o755)
    with pytest.raises(ConfigError, match="others can use it") as caught:
        answer(sealed, cache=cache)
    assert "chmod" in caught.value.hint
    cache.chmod(0o700)
    (cache / "device.secret").chmod(0o644)
    with pytest.raises(ConfigError, match=r"device\.secret is refused: others can"):
        answer(sealed, cache=cache)


def test_no_weights_are_in_it(magika_ir, sealed, cache, answer):
    answer(sealed, cache=cache)
    weights = magika_ir.with_suffix(".bin").read_bytes()
    samples = [weights[place : place + 32] for place in range(0, len(weights) - 32, 50_000)]
    samples = [sample for sample in samples if len(set(sample)) > 16]
    blob = ov.Core().compile_model(magika_ir, "CPU").export_model().getvalue()
    assert sum(sample in blob for sample in samples) > len(samples) / 2  # so they could be found
    everything = b"".join(file.read_bytes() for file in cache.iterdir())
    assert not any(sample in everything for sample in samples)


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[: 74 + (1 << 20)]),  # whole segments
        lambda file: file.write_bytes(flipped(file.read_bytes())),
        lambda file: file.write_bytes(os.urandom(100_000)),
        lambda file: (file.rename(file.with_name("moved")), file.symlink_to("moved")),
        lambda file: (file.unlink(), os.mkfifo(file)),
    ],
    ids=["empty", "cut", "cut at a segment", "changed", "random", "link", "fifo"],
)
def test_a_damaged_one_is_made_anew(sealed, cache, answer, harm):
    expected = answer(sealed, cache=cache)
    harm(kept(cache))
    assert np.array_equal(answer(sealed, cache=cache), expected)
    assert kept(cache).is_file()
    assert not kept(cache).is_symlink()
    damage(sealed)
    assert np.array_equal(answer(sealed, cache=cache), expected)


def test_a_damaged_one_is_told(sealed, cache, answer, caplog):
    answer(sealed, cache=cache)
    file = kept(cache)
    file.write_bytes(flipped(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        answer(sealed, cache=cache)
    assert f"{file} cannot be used" in caplog.text


@pytest.mark.parametrize("what", ["version", "secret", "release", "processor"])
def test_it_is_bound_to(what, sealed, magika_ir, cache, answer, site, monkeypatch):
    answer(sealed, cache=cache)
    if what == "version":
        monkeypatch.setattr(ov, "get_version", lambda: "another")
    elif what == "processor":
        monkeypatch.setattr("keymgmt_openvino._compiled._processor", lambda: "another")
    elif what == "secret":
        (cache / "device.secret").write_bytes(os.urandom(32))
    else:
        shutil.rmtree(sealed)
        keymgmt.seal(
            magika_ir, sealed, to=["local:models"], sign="local:publisher", keys=site, name="magika"
        )
    damage(sealed)
    with pytest.raises(IntegrityError):  # the weights are read again
        answer(sealed, cache=cache)


def test_it_is_bound_to_what_was_set_on_the_core(sealed, cache, answer):
    answer(sealed, cache=cache)
    core = ov.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    damage(sealed)
    with pytest.raises(IntegrityError):
        answer(sealed, core=core, cache=cache)


def test_the_next_release_takes_its_place(sealed, magika_ir, cache, answer, site):
    answer(sealed, cache=cache)
    before = kept(cache).read_bytes()
    shutil.rmtree(sealed)
    keymgmt.seal(
        magika_ir, sealed, to=["local:models"], sign="local:publisher", keys=site, name="magika"
    )
    answer(sealed, cache=cache)
    assert kept(cache).read_bytes() != before


def test_other_options_have_one_of_their_own(sealed, cache, answer):
    answer(sealed, cache=cache)
    answer(sealed, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}, cache=cache)
    assert len(list(cache.glob("*.compiled"))) == 2


def test_trust_comes_first(sealed, cache, answer):
    answer(sealed, cache=cache)
    with pytest.raises(keymgmt.errors.KeymgmtError, match="magika"):
        answer(sealed, name="another", cache=cache)
    (sealed / "signatures.json").unlink()
    with pytest.raises(keymgmt.errors.UntrustedPublisher):
        answer(sealed, cache=cache)


def test_its_memory_is_wiped_at_close(sealed, cache, site, answer, watched):
    answer(sealed, cache=cache)
    del watched[:]
    with load(sealed, keys=site, cache=cache) as model:
        (memory,) = watched
        assert memory.in_use()
        assert not memory.zeros()
        assert model.locked == memory.locked
    until(lambda: memory.gone)
    assert memory.zeros()


@pytest.mark.parametrize("device", ["CPU", "HETERO:CPU"])
def test_every_device_that_exports(device, sealed, cache, answer):
    expected = answer(sealed, device)
    assert np.array_equal(answer(sealed, device, cache=cache), expected)
    damage(sealed)
    assert np.array_equal(answer(sealed, device, cache=cache), expected)


@pytest.mark.parametrize("device", ["AUTO", "MULTI:CPU", "BATCH:CPU"])
def test_a_device_that_does_not_export_is_refused_before_work_starts(
    device, tmp_path, cache, answer
):
    with pytest.raises(ConfigError, match=f"not kept for {device}") as caught:
        answer(tmp_path / "not opened.sealed", device, cache=cache)
    assert "name the device itself" in caught.value.hint
    assert caught.value.__notes__[0].startswith("OpenVINO said:\n")


def test_a_cold_folder_that_cannot_be_written_harms_no_load(sealed, answer, caplog):
    expected = answer(sealed)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(answer(sealed, cache=Path("/sys/keymgmt-of-a-test")), expected)
    assert "is compiled again" in caplog.text


def test_a_folder_that_cannot_be(sealed, tmp_path, answer):
    with pytest.raises(ConfigError, match="cannot keep files for this device"):
        answer(sealed, cache=tmp_path / "no" / "such")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file"):
        answer(sealed, cache=tmp_path / "file")


# One load under a limit of the process; what it answers, and that it still answers without.
UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
import numpy as np
from keymgmt_openvino import _load, load
def limit(which, value):
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
def ones(port):
    shape = [1 if size.is_dynamic else size.get_length() for size in port.partial_shape]
    return np.ones(shape, port.element_type.to_dtype())
def answer(**options):
    with load(sys.argv[1], keys=sys.argv[2], **options) as model:
        return model([ones(port) for port in model.inputs])[0].tobytes()
expected = answer()
LIMIT
print(answer(cache=sys.argv[3]) == expected and any(expected))
"""


def test_a_full_disk_harms_no_load(sealed, cache, site, child):
    program = UNDER_A_LIMIT.replace("LIMIT", "limit(resource.RLIMIT_FSIZE, 1 << 20)")
    said, warned = child(program, sealed, site.path, cache)
    assert said == "True"
    assert "is not kept" in warned
    assert {file.name for file in cache.iterdir()} <= {"device.secret", ".lock"}


def test_openvinos_own_cache_is_refused_all_the_same(sealed, cache, answer, tmp_path):
    with pytest.raises(ConfigError, match="CACHE_DIR"):
        answer(sealed, "CPU", {"CACHE_DIR": str(tmp_path)}, cache=cache)


def test_one_that_became_larger_than_the_memory_is_made_anew(sealed, cache, answer, caplog):
    expected = answer(sealed, cache=cache)
    size = kept(cache).stat().st_size
    os.truncate(kept(cache), 1 << 42)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(answer(sealed, cache=cache), expected)
    assert "cannot be used" in caplog.text
    assert kept(cache).stat().st_size < 2 * size


def test_too_little_memory_for_the_export_harms_no_load(sealed, cache, answer, caplog, monkeypatch):
    expected = answer(sealed)
    size = sum(entry.size for entry in keymgmt.inspect(sealed).manifest.files)
    monkeypatch.setattr(free_memory, "free_memory", lambda: int(1.5 * size))
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(answer(sealed, cache=cache), expected)
    assert "is not kept" in caplog.text
    assert {file.name for file in cache.iterdir()} <= {"device.secret", ".lock"}


def test_an_export_that_gets_no_memory_harms_no_load(minilm_ir, seal, cache, site, child):
    sealed = seal(minilm_ir, "minilm")  # larger than what the heap may have left
    program = UNDER_A_LIMIT.replace(
        "LIMIT",
        """
def without_memory(*arguments):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit(resource.RLIMIT_AS, used + (2 << 20))
    try:
        keep_compiled(*arguments)
    finally:
        limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
keep_compiled, _load.keep_compiled = _load.keep_compiled, without_memory
""",
    )
    said, warned = child(program, sealed, site.path, cache)
    assert said == "True"
    assert "is not kept" in warned
    assert {file.name for file in cache.iterdir()} <= {"device.secret", ".lock"}


def test_options_are_told_apart_as_openvino_reads_them(sealed, cache, answer, site):
    hint = "INFERENCE_PRECISION_HINT"
    answer(sealed, "CPU", {hint: ov.OVAny("f32")}, cache=cache)
    answer(sealed, "CPU", {hint: ov.OVAny("bf16")}, cache=cache)
    assert len(list(cache.glob("*.compiled"))) == 2
    damage(sealed)
    answer(sealed, "CPU", {hint: ov.Type.f32}, cache=cache)


def test_an_option_is_the_same_in_another_process(sealed, cache, site):
    for _ in range(2):
        script = (
            "import sys; import openvino.properties as props; from keymgmt_openvino import load\n"
            "options = {props.num_streams(): props.streams.Num.AUTO}\n"
            "load(sys.argv[1], 'CPU', options, keys=sys.argv[2], cache=sys.argv[3])"
        )
        subprocess.run([sys.executable, "-c", script, sealed, site.path, cache], check=True)
        assert kept(cache)


def test_what_a_killed_process_left_is_removed_by_the_next(sealed, cache, answer, site):
    script = (
        "import os, sys; from keymgmt._verbs import device_file\n"
        "from keymgmt_openvino import load\n"
        "device_file.seal_payload = lambda *_, **__: os.kill(os.getpid(), 9)\n"
        "load(sys.argv[1], keys=sys.argv[2], cache=sys.argv[3])"
    )
    done = subprocess.run([sys.executable, "-c", script, sealed, site.path, cache], check=False)
    assert done.returncode == -9
    assert list(cache.glob("*.tmp"))
    answer(sealed, cache=cache)
    assert not list(cache.glob("*.tmp"))
    assert kept(cache)


def test_one_that_another_process_writes_is_left_to_it(sealed, cache, answer, caplog):
    cache.mkdir(mode=0o700)
    lock = os.open(cache / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the other process does
        with caplog.at_level(logging.WARNING):
            answer(sealed, cache=cache)
        assert "another process" in caplog.text
        assert not list(cache.glob("*.compiled"))
    finally:
        os.close(lock)
    answer(sealed, cache=cache)
    assert kept(cache)


def test_what_openvino_does_not_take_back_is_compiled_and_not_made_again(
    seal, cache, site, caplog, watched
):
    graph = Path(__file__).parent / "models" / "whisper" / "openvino_decoder_model.xml"
    decoder = seal(graph, "decoder")
    with load(decoder, keys=site, cache=cache):
        if not list(cache.glob("*.compiled")):
            pytest.skip("OpenVINO 2025.4 does not export it in the first place")
        before = kept(cache).stat()
    del watched[:]
    with caplog.at_level(logging.WARNING), load(decoder, keys=site, cache=cache) as model:
        assert model.outputs
    assert "OpenVINO does not take back decoder-" in caplog.text
    assert kept(cache).stat().st_ino == before.st_ino
    assert len(watched) == 2
    until(lambda: all(memory.gone and memory.zeros() for memory in watched))


@pytest.mark.parametrize(
    ("variable", "value"), [("ONEDNN_MAX_CPU_ISA", "AVX2"), ("OV_CPU_MAX_ISA", "avx2")]
)
def test_fewer_instructions_by_the_environment_make_it_anew(
    variable, value, sealed, cache, answer, site
):
    answer(sealed, cache=cache)
    before = kept(cache).read_bytes()
    script = (
        "import sys; from keymgmt_openvino import load\n"
        "load(sys.argv[1], keys=sys.argv[2], cache=sys.argv[3])"
    )
    done = run_python(
        script, sealed, site.path, cache, env=os.environ | {variable: value}, check=True
    )
    assert "does not take back" not in done.stderr
    assert kept(cache).read_bytes() != before
