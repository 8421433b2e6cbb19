"""Canonical JSON: one spelling, which is RFC 8785's."""

from __future__ import annotations

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from keymgmt._system.strict_json import MAX_INTEGER, dump_json, load_json
from keymgmt.errors import FormatError

ascii_text = st.text(st.characters(max_codepoint=127), max_size=20)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def values(text):
    scalar = st.one_of(st.none(), text, st.integers(-MAX_INTEGER, MAX_INTEGER))
    return st.dictionaries(
        text,
        st.recursive(
            scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner)
        ),
        max_size=4,
    )


@given(values(ascii_text) | values(any_text))
def test_it_is_rfc_8785(value):
    assert dump_json(value) == rfc8785.dumps(value)


@given(values(any_text))
def test_what_is_written_is_read(value):
    load_json(dump_json(value), "a file", 1 << 20)


def test_members_are_sorted_by_utf_16():
    """RFC 8785, section 3.2.3: U+1F600 before U+FB33, since its first unit is 0xD83D."""
    assert dump_json({"\ufb33": 1, "\U0001f600": 2}) == '{"\U0001f600":2,"\ufb33":1}'.encode()


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1}',
        b'{"b":1,"a":1}',
        b'{"a":1}\n',
        b'{"a":1,"a":1}',
        b'{"a":1.0}',
        b'{"a":"\\u0061"}',
    ],
)
def test_other_spellings_are_refused(data):
    with pytest.raises(FormatError):
        load_json(data, "a file", 100)


def test_the_bound_comes_before_the_parser():
    with pytest.raises(FormatError, match="larger than 10 bytes"):
        load_json(b"[" * 11, "a file", 10)


def count_parts(value):
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return max(1, len(value)) + sum(map(count_parts, inner))
    return 0


@given(values(st.text('",[]{}\\\n\u00e4', max_size=5)))
def test_parts_are_counted_whatever_the_strings_hold(value):
    data, parts = dump_json(value), count_parts(value)
    load_json(data, "a file", 1 << 20, parts)
    with pytest.raises(FormatError, match="more than"):
        load_json(data, "a file", 1 << 20, parts - 1)


def test_flags_and_objects_that_may_be_null():
    file = load_json(b'{"a":true,"b":{"c":"d"},"e":null,"f":1,"g":[]}', "a file", 100)
    assert file.flag("a") is True
    inner = file.object_or_none("b")
    assert inner is not None
    assert inner.text("c", limit=1) == "d"
    assert file.object_or_none("e") is None
    for name in ("f", "g", "missing"):
        with pytest.raises(FormatError, match=f"{name} in a file is not true or false"):
            file.flag(name)
    with pytest.raises(FormatError, match="has no missing"):
        file.object_or_none("missing")
