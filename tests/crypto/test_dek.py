"""Data keys: split, joined, wiped, and never shown."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keymgmt._crypto.dek import Dek, wipe


@given(st.integers(1, 16))
def test_shares_join_to_the_key(count):
    with Dek.generate() as dek:
        shares = dek.split(count)
        assert len(shares) == count
        assert Dek.join(shares) == dek
        if count > 1:
            assert Dek.join(shares[1:]) != dek
            assert all(share != dek for share in shares)


def test_generated_keys_differ():
    keys = [Dek.generate() for _ in range(50)]
    assert len({bytes(key.view()) for key in keys}) == 50


def test_a_wiped_key_is_gone():
    dek = Dek.generate()
    view = dek.view()
    dek.wipe()
    dek.wipe()
    assert bytes(view) == bytes(32)
    with pytest.raises(ValueError, match="wiped"):
        dek.view()


@pytest.mark.parametrize("size", [0, 1, 32, 4096, 4097, 1 << 20])
def test_wipe_clears_buffers_of_any_size(size):
    buffer = bytearray(b"s" * (size + 2))
    wipe(memoryview(buffer)[1:-1])
    assert buffer == b"s" + bytes(size) + b"s"


def test_the_context_manager_wipes():
    with Dek.generate() as dek:
        view = dek.view()
        assert any(view)
    assert not any(view)


def test_it_copies_what_it_is_given():
    source = bytearray(b"k" * 32)
    dek = Dek(source)
    wipe(source)
    assert not any(source)
    assert bytes(dek.view()) == b"k" * 32


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_other_lengths_are_no_keys(length):
    with pytest.raises(ValueError, match="32 bytes") as caught:
        Dek(b"k" * length)
    frame = caught.tb.tb_next
    assert frame is not None
    assert repr(frame.tb_frame.f_locals["self"]) == "<Dek, wiped>"


def test_nothing_shows_or_copies_it():
    dek = Dek(b"\xab" * 32)
    assert "ab" not in repr(dek).lower()
    for spread in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            spread(dek)
    with pytest.raises(TypeError):
        hash(dek)
    with pytest.raises(TypeError):
        dek.view()[0] = 1
