"""How a token wraps: one class for each mechanism, and which of them a key may be used with.

    name            key and usage         binds the context by   blob
    AES-GCM         AES decrypt           additional data        IV (12), ciphertext (32), tag (16)
    AES-KWP         AES unwrap            InnerKey               RFC 5649 inside an InnerKey
    AES-KW          AES unwrap            InnerKey               RFC 3394 inside an InnerKey
    RSA-OAEP-256-L  RSA decrypt           OAEP label             RFC 8017, SHA-256, MGF1-SHA-256
    RSA-OAEP-256    RSA decrypt           InnerKey               the same without a label
    RSA-OAEP        RSA decrypt           InnerKey               SHA-1, MGF1-SHA-1; by opt-in only
    hpke-p256/384   EC derive             HPKE info              RFC 9180, by CKM_ECDH1_DERIVE

The first that fits a key and survives a round trip is used to wrap; any that fits may unwrap.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from pkcs11 import MGF, Attribute, KeyType, Mechanism, ObjectClass

from keymgmt.backend import (
    DEK_LENGTH,
    RSA_OAEP_256,
    Dek,
    UnwrapFailed,
    hpke_seal,
    hpke_split,
    inner_unwrap,
    inner_wrap,
    open_with_ecdh,
    wipe,
)
from keymgmt_pkcs11._cryptoki import Cryptoki, Parameters

if TYPE_CHECKING:
    from keymgmt_pkcs11._keys import KeyObject
    from keymgmt_pkcs11._quirks import Quirks
    from keymgmt_pkcs11._sessions import Channel

__all__ = ["MECHANISMS", "Use", "Wrapping", "fitting"]

_IV: Final = 12
_TAG: Final = 16


@dataclass(frozen=True)
class Use:
    """A key in an open session, and the module's code for the mechanism that it is used with."""

    channel: Channel
    key: KeyObject
    code: int

    @property
    def ck(self) -> Cryptoki:
        """The calls."""
        return self.channel.ck

    @property
    def session(self) -> int:
        """The session's number."""
        return self.channel.handle


class Wrapping(ABC):
    """One mechanism; ``name`` is what a WrappedKey says."""

    name: ClassVar[str]
    code: ClassVar[Mechanism]

    @abstractmethod
    def fits(self, key: KeyObject) -> bool:
        """Whether the type and attributes of ``key`` allow it to unwrap so."""

    def wraps(self, key: KeyObject) -> bool:
        """Whether it may also wrap; with a public key, anybody may."""
        return key.public is not None

    @abstractmethod
    def wrap(self, use: Use, dek: Dek, context: bytes) -> bytes:
        """Encrypt ``dek``, bound to ``context``."""

    @abstractmethod
    def unwrap(self, use: Use, blob: bytes, context: bytes) -> Dek:
        """Reverse ``wrap``; UnwrapFailed where the blob cannot be of this kind at all."""


class AesGcm(Wrapping):
    """AES-256-GCM inside the token, the context as additional data."""

    name = "AES-GCM"
    code = Mechanism.AES_GCM

    def fits(self, key: KeyObject) -> bool:
        return _aes256(key) and key.can("decrypt")

    def wraps(self, key: KeyObject) -> bool:
        return key.can("encrypt")

    def wrap(self, use: Use, dek: Dek, context: bytes) -> bytes:
        iv = bytearray(os.urandom(_IV))
        how = Parameters.gcm(use.code, iv, context)
        sealed = use.ck.encrypt(use.session, how, use.key.handle, dek.view())
        # Read after the call: some tokens make the IV and write it here.
        return bytes(iv) + sealed

    def unwrap(self, use: Use, blob: bytes, context: bytes) -> Dek:
        _length(blob, _IV + DEK_LENGTH + _TAG)
        how = Parameters.gcm(use.code, bytearray(blob[:_IV]), context)
        return _taken(use.ck.decrypt(use.session, how, use.key.handle, blob[_IV:]))


class AesKeyWrap(Wrapping):
    """RFC 3394 by C_WrapKey and C_UnwrapKey: the inner key is a session object for a moment."""

    name = "AES-KW"
    code = Mechanism.AES_KEY_WRAP

    def fits(self, key: KeyObject) -> bool:
        return _aes256(key) and key.can("unwrap")

    def wraps(self, key: KeyObject) -> bool:
        return key.can("wrap")

    def wrap(self, use: Use, dek: Dek, context: bytes) -> bytes:
        def inside(inner: Dek) -> bytes:
            template = _secret_template() | {Attribute.VALUE: inner.view()}
            with _passing(use, lambda ck: ck.create(use.session, template)) as handle:
                return use.ck.wrap_key(use.session, Parameters(use.code), use.key.handle, handle)

        return inner_wrap(dek, context, inside)

    def unwrap(self, use: Use, blob: bytes, context: bytes) -> Dek:
        def inside(wrapped: bytes) -> Dek:
            _length(wrapped, DEK_LENGTH + 8)
            return _unwrapped(use, Parameters(use.code), wrapped)

        return inner_unwrap(blob, context, inside)


class AesKeyWrapPadded(AesKeyWrap):
    """RFC 5649, under the code that means it without doubt."""

    name = "AES-KWP"
    code = Mechanism.AES_KEY_WRAP_KWP


class RsaOaepLabel(Wrapping):
    """RSA-OAEP with the context as its label; encrypted outside, with the public key."""

    name = "RSA-OAEP-256-L"
    code = Mechanism.RSA_PKCS_OAEP
    hash: ClassVar[hashes.HashAlgorithm] = hashes.SHA256()
    hash_code: ClassVar[Mechanism] = Mechanism.SHA256
    mgf_code: ClassVar[MGF] = MGF.SHA256

    def fits(self, key: KeyObject) -> bool:
        return key.type == "RSA" and key.can("decrypt", "unwrap") and key.bits >= 2048

    def wrap(self, use: Use, dek: Dek, context: bytes) -> bytes:
        return self._encrypt(use.key, dek, context or None)

    def unwrap(self, use: Use, blob: bytes, context: bytes) -> Dek:
        return self._decrypt(use, blob, context)

    def _encrypt(self, key: KeyObject, secret: Dek, label: bytes | None) -> bytes:
        assert isinstance(key.public, rsa.RSAPublicKey)  # noqa: S101 - wraps() said so
        oaep = padding.OAEP(padding.MGF1(self.hash), self.hash, label)
        return key.public.encrypt(bytes(secret.view()), oaep)

    def _decrypt(self, use: Use, blob: bytes, label: bytes) -> Dek:
        _length(blob, (use.key.bits + 7) // 8)
        how = Parameters.oaep(use.code, self.hash_code, self.mgf_code, label)
        if not use.key.can("decrypt"):
            return _unwrapped(use, how, blob)
        return _taken(use.ck.decrypt(use.session, how, use.key.handle, blob))


class RsaOaep256(RsaOaepLabel):
    """What recipient files of RSA keys say: an InnerKey under OAEP with SHA-256."""

    name = RSA_OAEP_256

    def wrap(self, use: Use, dek: Dek, context: bytes) -> bytes:
        return inner_wrap(dek, context, lambda inner: self._encrypt(use.key, inner, None))

    def unwrap(self, use: Use, blob: bytes, context: bytes) -> Dek:
        return inner_unwrap(blob, context, lambda wrapped: self._decrypt(use, wrapped, b""))


class RsaOaepSha1(RsaOaep256):
    """For tokens that have nothing better. OAEP does not need SHA-1 to resist collisions."""

    name = "RSA-OAEP"
    hash = hashes.SHA1()  # noqa: S303 - RFC 8017's default; by the operator's opt-in
    hash_code = Mechanism.SHA_1
    mgf_code = MGF.SHA1


class HpkeP256(Wrapping):
    """HPKE to the public key; the token gives only the ECDH result."""

    name = "hpke-p256"
    code = Mechanism.ECDH1_DERIVE
    bits: ClassVar[int] = 256

    def fits(self, key: KeyObject) -> bool:
        return key.type == "EC" and key.bits == self.bits and key.can("derive")

    def wrap(self, use: Use, dek: Dek, context: bytes) -> bytes:
        return hpke_seal(self.name, use.key.point, dek, context)

    def unwrap(self, use: Use, blob: bytes, context: bytes) -> Dek:
        enc, ciphertext = hpke_split(self.name, blob)
        length = self.bits // 8
        how = Parameters.ecdh(use.code, enc)
        template = _secret_template(KeyType.GENERIC_SECRET) | {Attribute.VALUE_LEN: length}
        with _passing(
            use, lambda ck: ck.derive(use.session, how, use.key.handle, template)
        ) as handle:
            z = use.ck.read(use.session, handle, Attribute.VALUE, length)
        # A token may leave zeros in front out.
        padded = bytearray(length - len(z)) + z
        try:
            return open_with_ecdh(self.name, padded, enc, use.key.point, ciphertext, context)
        finally:
            wipe(z)
            wipe(padded)


class HpkeP384(HpkeP256):
    """The same on P-384."""

    name = "hpke-p384"
    bits = 384


MECHANISMS: Final = {
    made.name: made
    for made in (
        AesGcm(),
        AesKeyWrapPadded(),
        AesKeyWrap(),
        RsaOaepLabel(),
        RsaOaep256(),
        RsaOaepSha1(),
        HpkeP256(),
        HpkeP384(),
    )
}
"""Every mechanism by name, in the order of preference."""


def fitting(
    key: KeyObject, quirks: Quirks, *, sha1: bool, only: str | None
) -> dict[str, tuple[Wrapping, int]]:
    """The mechanisms that a key may be used with: name -> mechanism and the module's code.

    Args:
        key: the key as read.
        quirks: what the module is known to do otherwise.
        sha1: whether the operator allows OAEP with SHA-1.
        only: the one mechanism that the operator fixed for this key.
    """
    return {
        name: (mechanism, quirks.codes.get(name, mechanism.code))
        for name, mechanism in MECHANISMS.items()
        if mechanism.fits(key)
        and name not in quirks.broken
        and (sha1 or name != RsaOaepSha1.name)
        and only in (None, name)
    }


def _aes256(key: KeyObject) -> bool:
    return key.type == "AES" and key.bits == 256


def _secret_template(kind: KeyType = KeyType.AES) -> dict[int, Any]:
    # Only what is neither sensitive nor unextractable can be read; it lives in this session only.
    return {
        Attribute.CLASS: int(ObjectClass.SECRET_KEY),
        Attribute.KEY_TYPE: int(kind),
        Attribute.TOKEN: False,
        Attribute.SENSITIVE: False,
        Attribute.EXTRACTABLE: True,
    }


@contextlib.contextmanager
def _passing(use: Use, make: Callable[[Cryptoki], int]) -> Iterator[int]:
    """A session object that is destroyed at the end, whatever happens."""
    handle = make(use.ck)
    try:
        yield handle
    finally:
        use.ck.destroy(use.session, handle)


def _unwrapped(use: Use, how: Parameters, blob: bytes) -> Dek:
    template = _secret_template()
    with _passing(
        use, lambda ck: ck.unwrap_key(use.session, how, use.key.handle, blob, template)
    ) as handle:
        return _taken(use.ck.read(use.session, handle, Attribute.VALUE, 256))


def _taken(plain: bytearray) -> Dek:
    try:
        if len(plain) != DEK_LENGTH:
            raise UnwrapFailed("what was wrapped is no data key")
        return Dek(plain)
    finally:
        wipe(plain)


def _length(blob: bytes, length: int) -> None:
    if len(blob) != length:
        raise UnwrapFailed(f"the wrapped key has {len(blob)} bytes, not {length}")
