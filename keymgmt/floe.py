"""FLOE, the payload cipher: Fast Lightweight Online Encryption (c2sp.org/FLOE).

Bytes in, bytes out, no I/O. A ciphertext is a header of 74 bytes and one or more segments, each
encrypted with AES-256-GCM under keys that HKDF-Expand-SHA-384 derives from the caller's key, the
header's random IV and the caller's AAD; the header commits to all three.

Rules: the caller says which position a segment has and whether it is the last, from a length that
the caller trusts and never from the segment itself. Segments are independent: they may be encrypted
and decrypted in any order and by several threads at once. Plaintext that failed to authenticate is
wiped from the caller's buffer before the error is raised.
"""

from __future__ import annotations

import hmac
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from keymgmt._crypto.dek import wipe
from keymgmt._system.closing import Closing
from keymgmt.errors import FormatError, IntegrityError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "HEADER_LENGTH",
    "KEY_LENGTH",
    "OVERHEAD",
    "FloeDecryptor",
    "FloeEncryptor",
    "FloeParameters",
    "ciphertext_length",
    "segment_count",
]

# FLOE.md, "Parameters" and "Derived Parameters".
KEY_LENGTH: Final = 32
HEADER_LENGTH: Final = 74  # encoded parameters 10, IV 32, header tag 32
OVERHEAD: Final = 32  # of each segment: length field 4, AES-GCM IV 12, AES-GCM tag 16
_IV_LENGTH: Final = 32
_TAG_LENGTH: Final = 32
_MESSAGE_KEY_LENGTH: Final = 48
_AEAD_IV: Final = slice(4, 16)
_AEAD_BODY: Final = slice(16, None)
_NOT_FINAL: Final = 0xFFFFFFFF
_MAX_SEGMENTS: Final = 1 << 40
_MAX_SEGMENT_LENGTH: Final = 1 << 30  # AESGCM takes less than 2**31 bytes in a call


@dataclass(frozen=True, slots=True)
class FloeParameters:
    """The parameters of FLOE that vary; both sides have to use the same.

    ``segment_length``: bytes of one whole encrypted segment, 33 to 2**30.
    ``rotation_bits``: a new AES key every 2**rotation_bits segments. The specification fixes 20
    and the header does not carry it; other values exist for its known answers alone.
    """

    segment_length: int = 1 << 20
    rotation_bits: int = 20

    def __post_init__(self) -> None:
        if not OVERHEAD < self.segment_length <= _MAX_SEGMENT_LENGTH:
            raise ValueError(f"a segment has 33 to 2**30 bytes, not {self.segment_length}")
        if not 0 <= self.rotation_bits <= 40:
            raise ValueError(f"rotation_bits is 0 to 40, not {self.rotation_bits}")

    @property
    def plaintext_length(self) -> int:
        """Bytes of plaintext in every segment but the last."""
        return self.segment_length - OVERHEAD

    def encode(self) -> bytes:
        """PARAM_ENCODE of the specification, 10 bytes."""
        return struct.pack(">BBII", 0, 0, self.segment_length, _IV_LENGTH)


def segment_count(size: int, segment_length: int) -> int:
    """Segments of ``size`` bytes of plaintext: at least one, and the last is empty only if all is.

    Raises:
        ValueError: negative, or more than the 2**40 segments of the specification.
    """
    plaintext_length = FloeParameters(segment_length).plaintext_length
    count = max(1, -(-size // plaintext_length))
    if size < 0 or count > _MAX_SEGMENTS:
        raise ValueError(f"{size} bytes are not 1 to 2**40 segments of {segment_length}")
    return count


def ciphertext_length(size: int, segment_length: int) -> int:
    """Bytes of the whole ciphertext, header included, of ``size`` bytes of plaintext."""
    return HEADER_LENGTH + size + OVERHEAD * segment_count(size, segment_length)


class _Segments(Closing):
    """The state of both directions: IV, AAD, message key and the AES key in use."""

    def __init__(self, key: Buffer, aad: bytes, parameters: FloeParameters, iv: bytes) -> None:
        self.parameters = parameters
        self._prefix = parameters.encode() + iv
        self._aad = aad
        self._message_key = bytearray(_MESSAGE_KEY_LENGTH)
        self._header_tag = bytearray(_TAG_LENGTH)
        # The start of a range of segments, and the cipher of that range. The pair is replaced as a
        # whole, so a thread never sees half of it; threads in two ranges derive them in turn.
        self._cipher: tuple[int, AESGCM] | None = None
        if memoryview(key).nbytes != KEY_LENGTH:
            raise ValueError(f"a FLOE key has {KEY_LENGTH} bytes")
        self._kdf(key, b"HEADER_TAG:", self._header_tag)
        self._kdf(key, b"MESSAGE_KEY:", self._message_key)

    def _kdf(self, key: Buffer, purpose: bytes, target: bytearray) -> None:
        info = self._prefix + purpose + self._aad
        HKDFExpand(SHA384(), len(target), info).derive_into(memoryview(key), target)

    def _cipher_of(self, position: int) -> AESGCM:
        if not 0 <= position < _MAX_SEGMENTS:
            raise ValueError(f"a segment's position is 0 to 2**40 - 1, not {position}")
        bits = self.parameters.rotation_bits
        first = position >> bits << bits
        cached = self._cipher
        if cached is not None and cached[0] == first:
            return cached[1]
        if not self._message_key:
            raise ValueError("this FLOE state was closed")
        key = bytearray(KEY_LENGTH)
        try:
            self._kdf(self._message_key, b"DEK:" + first.to_bytes(8, "big"), key)
            cipher = AESGCM(key)
        finally:
            wipe(key)
        self._cipher = (first, cipher)
        return cipher

    def close(self) -> None:
        """Wipe the derived keys; may be called again. No thread may be in a call."""
        wipe(self._message_key)
        self._message_key = bytearray()
        # The library clears its copy of the AES key when the last reference is gone.
        self._cipher = None

    def __del__(self) -> None:
        if hasattr(self, "_message_key"):
            self.close()


def _aead_aad(position: int, final: bool) -> bytes:
    return struct.pack(">QB", position, final)


class FloeEncryptor(_Segments):
    """Encrypts the segments of one new ciphertext; ``header`` (74 bytes) goes before them.

    A context manager that wipes the derived keys. The caller has to make every position from 0 on
    exactly once, and the last of them final: this class does not check that.
    """

    def __init__(self, key: Buffer, aad: bytes, parameters: FloeParameters | None = None) -> None:
        """Begin a ciphertext under ``key`` (32 bytes), bound to ``aad``, with a random IV.

        Raises:
            ValueError: ``key`` has the wrong length.
        """
        super().__init__(key, aad, parameters or FloeParameters(), os.urandom(_IV_LENGTH))
        self.header = self._prefix + bytes(self._header_tag)

    def encrypt_segment_into(
        self, position: int, final: bool, plaintext: Buffer, target: Buffer
    ) -> None:
        """Encrypt one segment; any thread.

        Args:
            position: 0 for the first segment.
            final: whether it is the last segment.
            plaintext: ``parameters.plaintext_length`` bytes; the last may have fewer, or none.
            target: writable, 32 bytes more than ``plaintext``, not overlapping it.

        Raises:
            ValueError: lengths or position are wrong, or this state was closed.
        """
        source, view = memoryview(plaintext).cast("B"), memoryview(target).cast("B")
        full = self.parameters.plaintext_length
        if len(source) > full or (not final and len(source) != full):
            raise ValueError(f"a segment has {full} bytes of plaintext, not {len(source)}")
        if len(view) != len(source) + OVERHEAD:
            raise ValueError(f"{len(source)} bytes do not encrypt to {len(view)}")
        cipher = self._cipher_of(position)
        iv = os.urandom(12)
        struct.pack_into(">I12s", view, 0, len(view) if final else _NOT_FINAL, iv)
        cipher.encrypt_into(iv, source, _aead_aad(position, final), view[_AEAD_BODY])


class FloeDecryptor(_Segments):
    """Decrypts the segments of one ciphertext, in any order. Made from its header.

    A context manager that wipes the derived keys.
    """

    def __init__(
        self, key: Buffer, aad: bytes, header: bytes, parameters: FloeParameters | None = None
    ) -> None:
        """Check the header (74 bytes) against key, AAD and parameters, before any segment.

        Raises:
            FormatError: ``header`` is not a FLOE header, or has other parameters.
            IntegrityError: the header belongs to another key or AAD, or was changed.
            ValueError: ``key`` does not have 32 bytes.
        """
        parameters = parameters or FloeParameters()
        if len(header) != HEADER_LENGTH:
            raise FormatError(f"a FLOE header has {HEADER_LENGTH} bytes, here are {len(header)}")
        encoded, iv, tag = header[:10], header[10:-_TAG_LENGTH], header[-_TAG_LENGTH:]
        if encoded != parameters.encode():
            raise FormatError(
                f"the FLOE header has the parameters {bytes(encoded).hex()}, "
                f"and {parameters.encode().hex()} are expected"
            )
        super().__init__(key, aad, parameters, bytes(iv))
        if not hmac.compare_digest(self._header_tag, tag):
            self.close()
            raise IntegrityError(
                "the FLOE header belongs to another key or context, or was changed"
            )

    def decrypt_segment_into(
        self, position: int, final: bool, segment: Buffer, target: Buffer
    ) -> None:
        """Decrypt one segment; any thread.

        Args:
            position: 0 for the first segment.
            final: whether it is the last, from a length that the caller trusts.
            segment: ``parameters.segment_length`` bytes; the last may have fewer, down to 32.
            target: writable, 32 bytes fewer than ``segment``; all zeros after an IntegrityError.

        Raises:
            FormatError: no segment at this position can have this length.
            IntegrityError: this is not the segment of this position in this ciphertext.
            ValueError: ``target`` or the position is wrong, or this state was closed.
        """
        source, view = memoryview(segment).cast("B"), memoryview(target).cast("B")
        full = self.parameters.segment_length
        if not (OVERHEAD <= len(source) <= full if final else len(source) == full):
            raise FormatError(f"segment {position} has {len(source)} bytes and should have {full}")
        if len(view) != len(source) - OVERHEAD:
            raise ValueError(f"{len(source)} bytes do not decrypt to {len(view)}")
        cipher = self._cipher_of(position)
        (length,) = struct.unpack_from(">I", source)
        if length != (len(source) if final else _NOT_FINAL):
            wipe(view)
            raise IntegrityError(f"segment {position} states another length than its own")
        try:
            cipher.decrypt_into(
                source[_AEAD_IV], source[_AEAD_BODY], _aead_aad(position, final), view
            )
        except BaseException as error:
            # decrypt_into leaves unauthenticated plaintext in the buffer when the tag is wrong.
            wipe(view)
            if isinstance(error, InvalidTag):
                raise IntegrityError(f"segment {position} is damaged or forged") from error
            raise
