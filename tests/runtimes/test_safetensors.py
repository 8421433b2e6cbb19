"""Tensors of a sealed .safetensors are views of one buffer, and those that the library reads."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import pytest
from bits import flip_in

np = pytest.importorskip("numpy")
ours = pytest.importorskip("keymgmt_safetensors")

from keymgmt_safetensors import _load  # noqa: E402

from keymgmt.errors import ConfigError, FormatError, IntegrityError  # noqa: E402

chance = np.random.default_rng(0)
TENSORS = {
    "w": chance.standard_normal((7, 5)).astype(np.float32),
    "half": chance.standard_normal((3,)).astype(np.float16),
    "long": np.arange(12, dtype=np.int64).reshape(2, 3, 2),
    "bytes": np.arange(5, dtype=np.uint8),
    "yes": np.array([True, False]),
    "scalar": np.array(2.5),
    "none": np.empty((0, 4), np.float32),
}


def save(tensors, path) -> None:
    pytest.importorskip("safetensors.numpy").save_file(tensors, path, metadata={"format": "np"})


def write(folder) -> None:
    save(TENSORS, folder / "model.safetensors")


def test_it_gives_what_the_library_gives(seal, site):
    found = ours.load(seal(write), keys=site.config(), name="m")
    plain = pytest.importorskip("safetensors.numpy").load_file(site.plain / "model.safetensors")
    assert found.keys() == plain.keys() == TENSORS.keys()
    for name, array in plain.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
        found[name][...] = 0  # as the library's own, they may be written to


def test_all_are_views_of_one_memory_that_is_wiped_with_the_last(seal, site, wiped):
    found = ours.load(seal(write), keys=site.config())
    assert len({id(array.base) for array in found.values()}) == 1
    part = found["w"][3:, 1]
    expected = TENSORS["w"][3:, 1].copy()
    del found
    gc.collect()
    assert not wiped
    assert (part == expected).all()
    del part
    assert wiped == [(site.plain / "model.safetensors").stat().st_size]


def shards(folder) -> None:
    save({"a": TENSORS["w"]}, folder / "model-1.safetensors")
    save({"b": TENSORS["long"]}, folder / "model-2.safetensors")
    save({"c": TENSORS["half"]}, folder / "another.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_model_in_several_files(seal, site):
    sealed = seal(shards)
    assert ours.load(sealed, keys=site.config()).keys() == {"a", "b"}
    assert ours.load(sealed, keys=site.config(), file="another.safetensors").keys() == {"c"}


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("[]", "not an index"),
        ('{"weight_map": {"a": 1}}', "not an index|no file of the model"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not a file of the model"),
        ("[" * 100_000, "not an index"),
    ],
)
def test_an_index_that_is_none(seal, site, index, said):
    def broken(folder):
        write(folder)
        (folder / "m.safetensors.index.json").write_text(index)

    with pytest.raises(FormatError, match=said):
        ours.load(seal(broken), keys=site.config())


def file_of(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start=0, end=8, shape=(2,), kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


ENTRY = json.dumps(entry()).encode()
MEMBERS = ENTRY[1:-1]
W = b'{"w": %s}' % ENTRY

HOSTILE = {
    "empty": b"",
    "short": b"\x01",
    "header beyond the end": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": file_of(b"\xff{", b""),
    "no object": file_of([], b""),
    "deep": file_of(b"[" * 100_000, b""),
    "beyond the end": file_of({"w": entry(0, 16, (4,))}, bytes(8)),
    "before the beginning": file_of({"w": entry(-8, 0)}, bytes(8)),
    "another length than the shape": file_of({"w": entry(0, 8, (3,))}, bytes(8)),
    "huge": file_of({"w": entry(0, 8, (1 << 62, 4))}, bytes(8)),
    "no type": file_of({"w": entry(kind="F99")}, bytes(8)),
    "a type that is a list": file_of({"w": entry(kind=[])}, bytes(8)),
    "a number that is true": file_of({"w": entry(0, 4, (True,))}, bytes(4)),
    "overlapping": file_of({"v": entry(), "w": entry(4, 12)}, bytes(12)),
    "with a gap": file_of({"v": entry(), "w": entry(16, 24)}, bytes(24)),
    "with a rest": file_of({"w": entry()}, bytes(9)),
    "in UTF-16": file_of(W.decode().encode("utf-16"), bytes(8)),
    "with a byte order mark": file_of(b"\xef\xbb\xbf" + W, bytes(8)),
    "metadata that is a list": file_of({"__metadata__": [], "w": entry()}, bytes(8)),
    "metadata that is a number": file_of({"__metadata__": {"a": 1}, "w": entry()}, bytes(8)),
    "metadata twice": file_of(b'{"__metadata__": {}, "__metadata__": {}}', b""),
    "a member twice": file_of(b'{"w": {"dtype": "F32", %s}}' % MEMBERS, bytes(8)),
    "a tensor twice, the first malformed": file_of(b'{"w": {}, "w": %s}' % ENTRY, bytes(8)),
    "not a number": file_of(b'{"w": {"x": NaN, %s}}' % MEMBERS, bytes(8)),
    "half a surrogate pair": file_of(b'{"\\ud800": %s}' % ENTRY, bytes(8)),
    "half of one in the metadata": file_of({"__metadata__": {"a": "\ud800"}}, b""),
    "a shape that is a text": file_of({"w": entry(0, 4, "")}, bytes(4)),
    "a shape that is an object": file_of({"w": entry(0, 4, {})}, bytes(4)),
    "no place at minus zero": file_of(W.replace(b"[0,", b"[-0,"), bytes(8)),
    "a dimension of 2^70": file_of({"w": entry(0, 0, [0, 1 << 70])}, b""),
    "2^80 elements and none": file_of({"w": entry(0, 0, [1 << 40, 1 << 40, 0])}, b""),
    "deep in a member": file_of(
        {"w": entry() | {"x": json.loads("[" * 200 + "]" * 200)}}, bytes(8)
    ),
    "a number of 5000 digits": file_of({"w": entry(0, 0, [0, 0])}, b"").replace(
        b"[0, 0], ", b"[0, " + b"1" * 5000 + b"], "
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_valid_is_refused_as_by_the_library(seal, site, name):
    def hostile(folder):
        (folder / "m.safetensors").write_bytes(HOSTILE[name])

    with pytest.raises(FormatError, match=r"m\.safetensors of m is not a \.safetensors file"):
        ours.load(seal(hostile), keys=site.config())
    library = pytest.importorskip("safetensors")
    with pytest.raises(library.SafetensorError):
        library.safe_open(site.plain / "m.safetensors", "numpy").keys()


ACCEPTED = {
    "no metadata": b'{"__metadata__": null, "w": %s}' % ENTRY,
    "metadata with a name twice": b'{"__metadata__": {"a": "", "a": ""}, "w": %s}' % ENTRY,
    "a tensor twice": b'{"w": %s, "w": %s}' % (ENTRY, ENTRY),
    "padded": b" " + W + b" \n",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_header_that_is_odd_is_read_as_by_the_library(seal, site, name):
    def odd(folder):
        (folder / "m.safetensors").write_bytes(file_of(ACCEPTED[name], bytes(8)))

    found = ours.load(seal(odd), keys=site.config())
    assert {name: array.shape for name, array in found.items()} == {"w": (2,)}
    library = pytest.importorskip("safetensors.numpy")
    assert library.load_file(site.plain / "m.safetensors").keys() == {"w"}


def test_a_member_that_the_format_does_not_have(seal, site):
    def odd(folder):
        (folder / "m.safetensors").write_bytes(file_of({"w": entry() | {"x": "y"}}, bytes(8)))

    with pytest.raises(FormatError, match="its header is malformed"):
        ours.load(seal(odd), keys=site.config())


@pytest.mark.once
def test_a_long_shape_does_not_become_a_long_number():
    # Of a header of 100 MB, the product of all dimensions would take minutes.
    shape = [(1 << 63) - 1] * 300_000
    content = file_of({"w": entry(0, 0, shape)}, b"")
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (10, 10))\n"
        "from keymgmt_safetensors._header import read_header\n"
        "data = sys.stdin.buffer.read()\n"
        "try: read_header(data, len(data), 'it')\n"
        "except Exception as error: print(error)"
    )
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, input=content, capture_output=True, timeout=300)
    assert b"its header is malformed" in done.stdout, done


@pytest.mark.parametrize("shape", [[1] * 200, [0, 1 << 62]])
def test_a_shape_that_no_array_has(seal, site, shape):
    def odd(folder):
        content = file_of({"w": entry(0, 4 * (0 not in shape), shape)}, bytes(4 * (0 not in shape)))
        (folder / "m.safetensors").write_bytes(content)

    with pytest.raises(FormatError, match="no possible shape for 'w'"):
        ours.load(seal(odd), keys=site.config())


def test_memory_for_all_files_is_asked_for_first(seal, site, monkeypatch):
    asked = []
    monkeypatch.setattr(_load, "check_free_memory", lambda size, name: asked.append(size) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours.load(seal(shards), keys=site.config())
    sizes = [(site.plain / f"model-{each}.safetensors").stat().st_size for each in (1, 2)]
    assert asked == [sum(sizes)]


def test_what_the_framework_has_no_type_for(seal, site):
    def brain(folder):
        content = file_of({"w": entry(0, 4, kind="BF16")}, bytes(4))
        (folder / "m.safetensors").write_bytes(content)

    with pytest.raises(ConfigError, match="numpy has no type BF16") as caught:
        ours.load(seal(brain), keys=site.config())
    assert caught.value.hint == 'take framework="pt"'
    with pytest.raises(ConfigError, match="no framework 'tf'"):
        ours.load(site.root / "m.sealed", keys=site.config(), framework="tf")


def test_a_damaged_one_hands_out_nothing(seal, site, wiped):
    sealed = seal(write)
    payload = sealed / "payload" / "model.safetensors.floe"
    flip_in(payload)
    with pytest.raises(IntegrityError):
        ours.load(sealed, keys=site.config())
    assert wiped


def test_torch_has_the_same_without_a_copy(seal, site, wiped):
    torch = pytest.importorskip("torch", reason="tox -e other-programs has it")
    library = pytest.importorskip("safetensors.torch")
    names = dict(TENSORS)

    def with_brain(folder):
        tensors = {name: torch.from_numpy(array.copy()) for name, array in names.items()}
        library.save_file(tensors | {"bf": torch.randn(3, 2).bfloat16()}, folder / "m.safetensors")

    found = ours.load(seal(with_brain), keys=site.config(), framework="pt")
    plain = library.load_file(site.plain / "m.safetensors")
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    places = [each.data_ptr() for each in found.values() if each.numel()]
    assert max(places) - min(places) < (site.plain / "m.safetensors").stat().st_size
    part = found["w"][3:, 1]
    del found
    gc.collect()
    assert not wiped
    assert torch.equal(part, plain["w"][3:, 1])
    del part
    gc.collect()
    assert len(wiped) == 1
