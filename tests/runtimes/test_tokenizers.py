"""A sealed tokenizer.json answers as the file does."""

from __future__ import annotations

import json

import pytest

tokenizers = pytest.importorskip("tokenizers")
ours = pytest.importorskip("keymgmt_tokenizers")

from keymgmt.errors import FormatError, UntrustedPublisher  # noqa: E402


def write(folder) -> None:
    model = tokenizers.models.BPE({"a": 0, "b": 1, " ": 2, "ab": 3}, [("a", "b")])
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    (folder / "broken.json").write_text('{"secret": ')


def test_it_answers_as_from_the_file(seal, site):
    found = ours.load(seal(write), keys=site.config(), name="m")
    plain = tokenizers.Tokenizer.from_file(str(site.plain / "tokenizer.json"))
    assert found.encode("ab ba").ids == plain.encode("ab ba").ids == [3, 2, 1, 0]
    assert found.to_str() == plain.to_str()


def test_the_text_is_wiped_and_the_tokenizer_does_not_need_it(seal, site, monkeypatch):
    kept = []
    sealed = seal(write)
    real = ours.Tokenizer.from_buffer

    class Watching:
        @staticmethod
        def from_buffer(data):
            kept.append(memoryview(data))
            return real(data)

    monkeypatch.setattr(ours, "Tokenizer", Watching)
    found = ours.load(sealed, keys=site.config())
    assert not any(kept[0])
    assert found.encode("ab").ids == [3]


def test_what_is_refused(seal, site):
    sealed = seal(write)
    with pytest.raises(FormatError, match=r"no file 'other\.json'") as caught:
        ours.load(sealed, keys=site.config(), file="other.json")
    assert "tokenizer.json" in caught.value.hint
    with pytest.raises(FormatError, match=r"cannot read broken\.json of m") as caught:
        ours.load(sealed, keys=site.config(), file="broken.json")
    assert "secret" not in str(caught.value)
    with pytest.raises(UntrustedPublisher):
        ours.load(sealed, keys=site.config(publishers={"stranger.pem": ["*"]}))


def tokenizer(model=None, **members) -> bytes:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []} | (model or {})
    whole = {"version": "1.0", "added_tokens": [], "model": model} | members
    return json.dumps(whole, ensure_ascii=False).encode()


def merging(prefix, merge, vocab=("a", "é", "aé")) -> dict:
    numbered = {token: number for number, token in enumerate(vocab)}
    return {"continuing_subword_prefix": prefix, "vocab": numbered, "merges": [merge]}


CUT = tokenizer(merging("a", ["a", "é"]))
# Most end the process, or raise what no `except Exception` catches, in one of the releases.
HOSTILE = {
    "a normalizer without its map": tokenizer(
        normalizer={"type": "Precompiled", "precompiled_charsmap": ""}
    ),
    "a merge cut within a character": CUT,
    "a merge that is a text": tokenizer(merging("a", "a é")),
    "a merge shorter than the prefix": tokenizer(merging("###", ["a", "b"], ("a", "b", "ab"))),
    "merges that are no pairs": tokenizer(merging("a", [1, {}])),
    "a merge that is a number": tokenizer(merging("a", 1)),
    "merges that are a number": tokenizer(merging("a", []) | {"merges": 5}),
    "a prefix that is a number": tokenizer(merging(5, ["a", "é"])),
    "the first of two models": CUT[:-1] + b',"model":{"type":"BPE","vocab":{},"merges":[]}}',
    "an escaped name": CUT.replace(b"continuing_", b"continuin\\u0067\\u005f"),
    "an escaped prefix": CUT.replace(b'prefix": "a"', b'prefix" :\n"\\u0061"'),
    "malformed behind it": CUT[:-1] + b',"q":\xff}',
    "deep behind it": CUT[:-1] + b',"q":' + b"[" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_makes_the_library_panic_or_is_malformed_is_refused(seal, site, name):
    sealed = seal(lambda folder: (folder / "tokenizer.json").write_bytes(HOSTILE[name]))
    with pytest.raises(FormatError, match=r"cannot read tokenizer\.json of m"):
        ours.load(sealed, keys=site.config())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_what_is_no_panic_is_passed_on(seal, site, monkeypatch, stop):
    class Stopped:
        @staticmethod
        def from_buffer(data):
            raise stop

    monkeypatch.setattr(ours, "Tokenizer", Stopped)
    with pytest.raises(stop):
        ours.load(seal(write), keys=site.config())


@pytest.mark.parametrize("merge", [["a", "##b"], "a ##b"])
def test_a_prefix_that_is_as_it_should_be(seal, site, merge):
    content = tokenizer(merging("##", merge, ("a", "##b", "ab")))
    sealed = seal(lambda folder: (folder / "tokenizer.json").write_bytes(content))
    found = ours.load(sealed, keys=site.config())
    plain = tokenizers.Tokenizer.from_file(str(site.plain / "tokenizer.json"))
    assert found.encode("ab").ids == plain.encode("ab").ids == [2]
