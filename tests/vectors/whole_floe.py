"""Whole ciphertexts of FLOE in one buffer, for tests and vectors alone.

What ships goes by segments, so that a file is never in memory twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keymgmt.errors import FormatError
from keymgmt.floe import (
    HEADER_LENGTH,
    OVERHEAD,
    FloeDecryptor,
    FloeEncryptor,
    FloeParameters,
    ciphertext_length,
    segment_count,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer


def encrypt(
    key: Buffer, aad: bytes, plaintext: Buffer, parameters: FloeParameters | None = None
) -> bytes:
    """Encrypt all of ``plaintext`` under ``key`` (32 bytes); header and segments in one."""
    source = memoryview(plaintext).cast("B")
    with FloeEncryptor(key, aad, parameters) as encryptor:
        step, size = encryptor.parameters.plaintext_length, encryptor.parameters.segment_length
        count = segment_count(len(source), size)
        result = bytearray(ciphertext_length(len(source), size))
        result[:HEADER_LENGTH] = encryptor.header
        body = memoryview(result)[HEADER_LENGTH:]
        for index in range(count):
            encryptor.encrypt_segment_into(
                index,
                index == count - 1,
                source[index * step : (index + 1) * step],
                body[index * size : (index + 1) * size],
            )
    return bytes(result)


def decrypt(
    key: Buffer, aad: bytes, ciphertext: Buffer, parameters: FloeParameters | None = None
) -> bytes:
    """Decrypt a whole ciphertext; all or nothing.

    Accepts what the specification accepts, an empty last segment after full ones included. That
    one has the same plaintext as without it, so where the plaintext's size is known, compare
    ``ciphertext_length`` first.

    Raises:
        FormatError: not a FLOE ciphertext of these parameters, or cut off.
        IntegrityError: of another key or AAD, or changed.
    """
    source = memoryview(ciphertext).cast("B")
    header, body = bytes(source[:HEADER_LENGTH]), source[HEADER_LENGTH:]
    with FloeDecryptor(key, aad, header, parameters) as decryptor:
        step, size = decryptor.parameters.plaintext_length, decryptor.parameters.segment_length
        count = max(1, -(-len(body) // size))
        if len(body) < count * OVERHEAD or len(body) - (count - 1) * size < OVERHEAD:
            raise FormatError("the FLOE ciphertext is cut off")
        result = bytearray(len(body) - count * OVERHEAD)
        view = memoryview(result)
        for index in range(count):
            decryptor.decrypt_segment_into(
                index,
                index == count - 1,
                body[index * size : (index + 1) * size],
                view[index * step : (index + 1) * step],
            )
    return bytes(result)
