"""FLOE: the reference implementations' known answers, and what must never pass."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import whole_floe
from hypothesis import given
from hypothesis import strategies as st

from keymgmt import floe
from keymgmt.errors import FormatError, IntegrityError, SealedModelError
from keymgmt.floe import FloeDecryptor, FloeEncryptor, FloeParameters

VECTORS = Path(__file__).parent.parent / "vectors" / "floe"
VECTOR_PARAMETERS = {
    "GCM256_IV256_4K": FloeParameters(4096),
    "GCM256_IV256_64": FloeParameters(64),
    "rotation": FloeParameters(40, rotation_bits=2),
}
KEY = bytes(range(32))
AAD = b"context"
SMALL = FloeParameters(48)  # 16 bytes of plaintext in a segment


def known(path: Path) -> tuple[FloeParameters, bytes, bytes]:
    kind = path.name.removesuffix("_ct.txt").split("_", 1)[1]
    plaintext = path.with_name(path.name.replace("_ct", "_pt"))
    return (
        VECTOR_PARAMETERS[kind],
        bytes.fromhex(path.read_text()),
        bytes.fromhex(plaintext.read_text()),
    )


KNOWN = sorted(VECTORS.glob("*_ct.txt"))


def test_known_answers_are_there():
    assert len(KNOWN) == 6


@pytest.mark.parametrize("path", KNOWN, ids=lambda path: path.stem)
def test_known_answer_opens(path):
    parameters, ciphertext, plaintext = known(path)
    assert whole_floe.decrypt(bytes(32), b"This is AAD", ciphertext, parameters) == plaintext


@pytest.mark.parametrize("path", KNOWN, ids=lambda path: path.stem)
def test_known_answer_opens_backwards(path):
    parameters, ciphertext, plaintext = known(path)
    header, body = ciphertext[:74], ciphertext[74:]
    size, step = parameters.segment_length, parameters.plaintext_length
    count = -(-len(body) // size)
    with FloeDecryptor(bytes(32), b"This is AAD", header, parameters) as decryptor:
        for index in reversed(range(count)):
            segment = body[index * size : (index + 1) * size]
            out = bytearray(len(segment) - 32)
            decryptor.decrypt_segment_into(index, index == count - 1, segment, out)
            assert out == plaintext[index * step : (index + 1) * step]


@pytest.mark.parametrize("path", KNOWN[:1] + KNOWN[-1:], ids=lambda path: path.stem)
def test_known_answer_needs_its_key_aad_and_parameters(path):
    parameters, ciphertext, _ = known(path)
    with pytest.raises(IntegrityError):
        whole_floe.decrypt(bytes(31) + b"\1", b"This is AAD", ciphertext, parameters)
    with pytest.raises(IntegrityError):
        whole_floe.decrypt(bytes(32), b"This is aAD", ciphertext, parameters)
    with pytest.raises(FormatError):
        whole_floe.decrypt(bytes(32), b"This is AAD", ciphertext, FloeParameters(65))


@given(
    plaintext=st.binary(max_size=200),
    aad=st.binary(max_size=50),
    segment_length=st.integers(33, 100),
    rotation_bits=st.integers(0, 3),
)
def test_round_trip(plaintext, aad, segment_length, rotation_bits):
    parameters = FloeParameters(segment_length, rotation_bits)
    ciphertext = whole_floe.encrypt(KEY, aad, plaintext, parameters)
    assert len(ciphertext) == floe.ciphertext_length(len(plaintext), segment_length)
    assert whole_floe.decrypt(KEY, aad, ciphertext, parameters) == plaintext


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 32, 33, 48])
def test_every_flipped_bit_is_refused(size):
    ciphertext = whole_floe.encrypt(KEY, AAD, bytes(size), SMALL)
    for index in range(len(ciphertext)):
        for bit in (0, 3, 7):
            damaged = bytearray(ciphertext)
            damaged[index] ^= 1 << bit
            with pytest.raises(SealedModelError):
                whole_floe.decrypt(KEY, AAD, damaged, SMALL)


@pytest.mark.parametrize("size", [0, 1, 16, 17, 32, 48])
def test_every_truncation_and_extension_is_refused(size):
    ciphertext = whole_floe.encrypt(KEY, AAD, bytes(size), SMALL)
    for length in range(len(ciphertext)):
        with pytest.raises(SealedModelError):
            whole_floe.decrypt(KEY, AAD, ciphertext[:length], SMALL)
    for more in (b"\0", bytes(32), bytes(48), ciphertext[74:]):
        with pytest.raises(SealedModelError):
            whole_floe.decrypt(KEY, AAD, ciphertext + more, SMALL)


@given(order=st.permutations(range(4)))
def test_segments_keep_their_places(order):
    ciphertext = whole_floe.encrypt(KEY, AAD, bytes(64), SMALL)
    segments = [ciphertext[74 + 48 * i : 74 + 48 * (i + 1)] for i in range(4)]
    moved = ciphertext[:74] + b"".join(segments[i] for i in order)
    if order == [0, 1, 2, 3]:
        assert whole_floe.decrypt(KEY, AAD, moved, SMALL) == bytes(64)
    else:
        with pytest.raises(IntegrityError):
            whole_floe.decrypt(KEY, AAD, moved, SMALL)


def test_a_segment_of_another_ciphertext_is_refused():
    one, other = (whole_floe.encrypt(KEY, AAD, bytes(64), SMALL) for _ in range(2))
    with pytest.raises(IntegrityError):
        whole_floe.decrypt(KEY, AAD, one[:74] + other[74:], SMALL)


def test_an_empty_last_segment_is_of_the_specification():
    with FloeEncryptor(KEY, AAD, SMALL) as encryptor:
        full, empty = bytearray(48), bytearray(32)
        encryptor.encrypt_segment_into(0, False, bytes(16), full)
        encryptor.encrypt_segment_into(1, True, b"", empty)
    assert whole_floe.decrypt(KEY, AAD, encryptor.header + full + empty, SMALL) == bytes(16)
    assert len(encryptor.header + full + empty) != floe.ciphertext_length(16, 48)


def test_a_failed_segment_leaves_nothing_in_the_buffer():
    ciphertext = bytearray(whole_floe.encrypt(KEY, AAD, b"secret weights!!", SMALL))
    ciphertext[-1] ^= 1
    out = bytearray(b"?" * 16)
    with FloeDecryptor(KEY, AAD, bytes(ciphertext[:74]), SMALL) as decryptor:
        with pytest.raises(IntegrityError, match="segment 0"):
            decryptor.decrypt_segment_into(0, True, ciphertext[74:], out)
        assert out == bytes(16)
        # The same bytes as an inner segment: finality is the caller's, not the segment's.
        out[:] = b"?" * 16
        with pytest.raises(IntegrityError):
            decryptor.decrypt_segment_into(0, False, ciphertext[74:], out)
        assert out == bytes(16)


def test_threads_share_one_state():
    parameters = FloeParameters(96, rotation_bits=1)
    plaintext = bytes(index % 251 for index in range(64 * 300))
    with FloeEncryptor(KEY, AAD, parameters) as encryptor, ThreadPoolExecutor(4) as pool:
        segments = [bytearray(96) for _ in range(300)]

        def seal(i: int) -> None:
            encryptor.encrypt_segment_into(
                i, i == 299, plaintext[64 * i : 64 * (i + 1)], segments[i]
            )

        list(pool.map(seal, range(300)))
    assert (
        whole_floe.decrypt(KEY, AAD, encryptor.header + b"".join(segments), parameters) == plaintext
    )


def test_a_closed_state_is_of_no_use_and_holds_no_key():
    encryptor = FloeEncryptor(KEY, AAD, SMALL)
    message_key = encryptor._message_key
    assert any(message_key)
    encryptor.close()
    encryptor.close()
    assert not any(message_key)
    with pytest.raises(ValueError, match="closed"):
        encryptor.encrypt_segment_into(0, True, b"", bytearray(32))


def test_a_mistaken_call_is_refused():
    with pytest.raises(ValueError, match="32 bytes"):
        whole_floe.encrypt(bytes(16), AAD, b"")
    with FloeEncryptor(KEY, AAD, SMALL) as encryptor:
        for position, final, size, room in [
            (0, False, 15, 47),  # an inner segment is full
            (0, True, 17, 49),  # none is fuller
            (0, True, 16, 47),  # no room
            (-1, True, 0, 32),
            (1 << 40, True, 0, 32),
        ]:
            with pytest.raises(ValueError, match=r"segment|encrypt"):
                encryptor.encrypt_segment_into(position, final, bytes(size), bytearray(room))
    for length in (0, 32, (1 << 30) + 1):
        with pytest.raises(ValueError, match="33"):
            FloeParameters(length)


def test_lengths():
    assert floe.segment_count(0, 48) == 1
    assert floe.ciphertext_length(0, 48) == 74 + 32
    assert floe.segment_count(16, 48) == 1
    assert floe.segment_count(17, 48) == 2
    assert floe.ciphertext_length(17, 48) == 74 + 48 + 33
    for size in (-1, (1 << 44) + 1):
        with pytest.raises(ValueError, match="segments"):
            floe.segment_count(size, 48)
