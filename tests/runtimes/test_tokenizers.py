"""A sealed tokenizer.json answers as the file does."""

from __future__ import annotations

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
