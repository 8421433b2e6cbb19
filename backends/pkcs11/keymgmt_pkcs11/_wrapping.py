"""How a token wraps: one class for each mechanism, and which of them a key may be used with.

    name            key and usage         binds the context by   blob
    AES-GCM         AES decrypt           additional data        IV (12, 16), ciphertext, tag (16)
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from pkcs11 import MGF, Attribute, KeyType, Mechanism, ObjectClass

from keymgmt.backend import (
    DEK_LENGTH,
    RSA_OAEP_256,
    Dek,
    UnsupportedOperation,
    UnwrapFailed,
    hpke_seal,
    hpke_split,
    inner_unwrap,
    inner_wrap,
    open_with_ecdh,
    wipe,
)
from keymgmt_pkcs11._cryptoki import Cryptoki, Parameters, Verb
from keymgmt_pkcs11._errors import REFUSED_TEMPLATE, CkError, Ckr

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from keymgmt_pkcs11._connection import Session
    from keymgmt_pkcs11._keys import KeyObject
    from keymgmt_pkcs11._quirks import Quirks

__all__ = ["MECHANISMS", "KeyInUse", "Wrapping", "fitting"]

W = TypeVar("W")
R = TypeVar("R")
_TAG: Final = 16
_IV_LENGTHS: Final = (12, 16)
_IVS: Final[tuple[Callable[[], bytes], ...]] = (lambda: os.urandom(12), lambda: bytes(12), bytes)
_REFUSED_IV: Final = frozenset({Ckr.MECHANISM_PARAM_INVALID, Ckr.ARGUMENTS_BAD})


@dataclass(slots=True)
class KeyInUse:
    """A key in an open session, and the module's code for the mechanism that wraps with it."""

    session: Session
    key: KeyObject
    code: int = 0

    @property
    def ck(self) -> Cryptoki:
        """The calls."""
        return self.session.ck

    def apply(self, verb: Verb, how: Parameters, data: Buffer) -> bytearray:
        """Encrypt, decrypt or sign; with a login for this use, where the key wants one."""
        approve = self.session.approve if self.key.wants_approval else None
        return self.ck.apply(verb, self.session.handle, how, self.key.handle, data, approve)


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
    def wrap(self, use: KeyInUse, dek: Dek, context: bytes) -> bytes:
        """Encrypt ``dek``, bound to ``context``."""

    @abstractmethod
    def unwrap(self, use: KeyInUse, blob: bytes, context: bytes) -> Dek:
        """Reverse ``wrap``; UnwrapFailed where the blob cannot be of this kind at all."""


class AesGcm(Wrapping):
    """AES-256-GCM inside the token, the context as additional data.

    Who makes the IV differs: most tokens take ours, CloudHSM wants zeros and writes its own over
    them, Luna in FIPS mode wants none and appends its own to the ciphertext. The first way that a
    token does not refuse is remembered for the connection.
    """

    name = "AES-GCM"
    code = Mechanism.AES_GCM

    def fits(self, key: KeyObject) -> bool:
        return _aes256(key) and key.can("decrypt")

    def wraps(self, key: KeyObject) -> bool:
        return key.can("encrypt")

    def wrap(self, use: KeyInUse, dek: Dek, context: bytes) -> bytes:
        def encrypt(iv: bytes) -> bytes:
            how = Parameters.gcm(use.code, iv, context)
            sealed = bytes(use.apply("Encrypt", how, dek.view()))
            body, appended = sealed[: DEK_LENGTH + _TAG], sealed[DEK_LENGTH + _TAG :]
            # Read after the call: some tokens make the IV and write it here.
            used = appended or how.first(len(iv))
            if len(used) not in _IV_LENGTHS or (not any(iv) and used == iv):
                raise UnsupportedOperation("the token took an IV of zeros as it was, or none")
            return used + body

        return _by_first_way(use, "IV", _IVS, lambda make: encrypt(make()))

    def unwrap(self, use: KeyInUse, blob: bytes, context: bytes) -> Dek:
        iv, body = blob[: -DEK_LENGTH - _TAG], blob[-DEK_LENGTH - _TAG :]
        if len(iv) not in _IV_LENGTHS:
            raise UnwrapFailed(f"the wrapped key has {len(blob)} bytes, and no IV fits in them")

        def decrypt(appended: bool) -> Dek:
            how = Parameters.gcm(use.code, b"" if appended else iv, context)
            given = body + iv if appended else body
            return _taken(use.apply("Decrypt", how, given))

        return _by_first_way(use, "IV appended", (False, True), decrypt)


class AesKeyWrap(Wrapping):
    """RFC 3394 by C_WrapKey and C_UnwrapKey: the inner key is a session object for a moment."""

    name = "AES-KW"
    code = Mechanism.AES_KEY_WRAP

    def fits(self, key: KeyObject) -> bool:
        return _aes256(key) and key.can("unwrap")

    def wraps(self, key: KeyObject) -> bool:
        return key.can("wrap")

    def wrap(self, use: KeyInUse, dek: Dek, context: bytes) -> bytes:
        def inside(inner: Dek) -> bytes:
            template = _secret_template() | {Attribute.VALUE: inner.view()}
            with _passing(
                use, lambda given: use.ck.create(use.session.handle, given), (template,)
            ) as handle:
                how = Parameters(use.code)
                return use.ck.wrap_key(use.session.handle, how, use.key.handle, handle)

        return inner_wrap(dek, context, inside)

    def unwrap(self, use: KeyInUse, blob: bytes, context: bytes) -> Dek:
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

    def wrap(self, use: KeyInUse, dek: Dek, context: bytes) -> bytes:
        return self._encrypt(use.key, dek, context or None)

    def unwrap(self, use: KeyInUse, blob: bytes, context: bytes) -> Dek:
        return self._decrypt(use, blob, context)

    def _encrypt(self, key: KeyObject, secret: Dek, label: bytes | None) -> bytes:
        assert isinstance(key.public, rsa.RSAPublicKey)  # noqa: S101 - wraps() said so
        oaep = padding.OAEP(padding.MGF1(self.hash), self.hash, label)
        return key.public.encrypt(bytes(secret.view()), oaep)

    def _decrypt(self, use: KeyInUse, blob: bytes, label: bytes) -> Dek:
        _length(blob, (use.key.bits + 7) // 8)
        how = Parameters.oaep(use.code, self.hash_code, self.mgf_code, label)
        if not use.key.can("decrypt"):
            return _unwrapped(use, how, blob)
        return _taken(use.apply("Decrypt", how, blob))


class RsaOaep256(RsaOaepLabel):
    """What recipient files of RSA keys say: an InnerKey under OAEP with SHA-256."""

    name = RSA_OAEP_256

    def wrap(self, use: KeyInUse, dek: Dek, context: bytes) -> bytes:
        return inner_wrap(dek, context, lambda inner: self._encrypt(use.key, inner, None))

    def unwrap(self, use: KeyInUse, blob: bytes, context: bytes) -> Dek:
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

    def wrap(self, use: KeyInUse, dek: Dek, context: bytes) -> bytes:
        return hpke_seal(self.name, use.key.point, dek, context)

    def unwrap(self, use: KeyInUse, blob: bytes, context: bytes) -> Dek:
        enc, ciphertext = hpke_split(self.name, blob)
        length = self.bits // 8
        how = Parameters.ecdh(use.code, enc)
        template = _secret_template(KeyType.GENERIC_SECRET)
        sized = template | {Attribute.VALUE_LEN: length}

        def derive(attributes: dict[int, Any]) -> int:
            return use.ck.derive(use.session.handle, how, use.key.handle, attributes)

        with _passing(use, derive, (sized, template)) as handle:
            z = use.ck.read(use.session.handle, handle, Attribute.VALUE, length)
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
def _passing(
    use: KeyInUse, make: Callable[[dict[int, Any]], int], templates: Sequence[dict[int, Any]]
) -> Iterator[int]:
    """A session object, by the first template that is not refused; destroyed at the end."""
    lengths = tuple(Attribute.VALUE_LEN in template for template in templates)
    handle = _by_first_way(
        use,
        f"template {lengths}",
        templates,
        make,
        refused=REFUSED_TEMPLATE | {Ckr.ARGUMENTS_BAD},
    )
    try:
        yield handle
    finally:
        use.ck.destroy(use.session.handle, handle)


def _by_first_way(
    use: KeyInUse,
    name: str,
    ways: Sequence[W],
    call: Callable[[W], R],
    refused: frozenset[int] = _REFUSED_IV,
) -> R:
    """Call with the first of the ways that the module does not refuse, from the last that worked.

    A session that saw a failed call is not used for the next: some modules keep the operation.
    """
    start = use.session.cache.get(name, 0)
    for number in range(start, len(ways)):
        try:
            answer = call(ways[number])
        except CkError as error:
            if error.code not in refused or number == len(ways) - 1:
                raise
            use.session.renew()
        else:
            use.session.cache[name] = number
            return answer
    raise AssertionError("unreachable")


def _unwrapped(use: KeyInUse, how: Parameters, blob: bytes) -> Dek:
    template = _secret_template()
    sized = template | {Attribute.VALUE_LEN: DEK_LENGTH}

    def unwrap(attributes: dict[int, Any]) -> int:
        return use.ck.unwrap_key(use.session.handle, how, use.key.handle, blob, attributes)

    with _passing(use, unwrap, (template, sized)) as handle:
        return _taken(use.ck.read(use.session.handle, handle, Attribute.VALUE, 256))


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
