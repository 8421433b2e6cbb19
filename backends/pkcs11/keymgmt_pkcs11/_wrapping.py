"""Wrapping in a token: a class for each mechanism, and which mechanisms a key may be used with.

    name            key and usage         binds the context by   blob
    AES-GCM         AES decrypt           additional data        IV (12, 16), ciphertext, tag (16)
    AES-KWP         AES unwrap            InnerKey               RFC 5649 inside an InnerKey
    AES-KW          AES unwrap            InnerKey               RFC 3394 inside an InnerKey
    RSA-OAEP-256    RSA decrypt           InnerKey               RFC 8017, SHA-256, MGF1-SHA-256
    RSA-OAEP        RSA decrypt           InnerKey               SHA-1, MGF1-SHA-1; by opt-in only
    hpke-p256/384   EC derive             HPKE info              RFC 9180, by CKM_ECDH1_DERIVE

The first mechanism that fits a key and survives a round trip wraps; any that fits may unwrap.
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
from keymgmt_pkcs11._cryptoki import CkMechanism, Cryptoki, Verb
from keymgmt_pkcs11._errors import REFUSED_TEMPLATE, CkError, Ckr

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from keymgmt_pkcs11._connection import Session
    from keymgmt_pkcs11._keys import KeyObject

__all__ = ["MECHANISMS", "KeyInUse", "Wrapping"]

W = TypeVar("W")
R = TypeVar("R")
_TAG: Final = 16
_IV_LENGTHS: Final = (12, 16)
_IVS: Final[tuple[Callable[[], bytes], ...]] = (lambda: os.urandom(12), lambda: bytes(12), bytes)
_REFUSED_IV: Final = frozenset({Ckr.MECHANISM_PARAM_INVALID, Ckr.ARGUMENTS_BAD})


@dataclass(slots=True)
class KeyInUse:
    """A key in an open session."""

    session: Session
    key: KeyObject

    @property
    def ck(self) -> Cryptoki:
        """The functions of the module."""
        return self.session.ck

    def code(self, wrapping: Wrapping) -> int:
        """The number of a mechanism, which some modules have different from the standard."""
        return self.session.module.quirks.codes.get(wrapping.name, wrapping.code)

    def apply(self, verb: Verb, mechanism: CkMechanism, data: Buffer) -> bytearray:
        """Encrypt, decrypt or sign; with a login for this use, where the key requires it."""
        approve = self.session.approve if self.key.wants_approval else None
        return self.ck.apply(verb, self.session.handle, mechanism, self.key.handle, data, approve)


class Wrapping(ABC):
    """One mechanism; ``name`` is the mechanism of a WrappedKey."""

    name: ClassVar[str]
    code: ClassVar[Mechanism]

    @abstractmethod
    def fits(self, key: KeyObject) -> bool:
        """Whether the type and attributes of ``key`` allow it to unwrap with this mechanism."""

    def wraps(self, key: KeyObject) -> bool:
        """Whether ``key`` may also wrap; with a public key, anybody may."""
        return key.public is not None

    @abstractmethod
    def wrap(self, use: KeyInUse, dek: Dek, context: bytes) -> bytes:
        """Encrypt ``dek``, bound to ``context``."""

    @abstractmethod
    def unwrap(self, use: KeyInUse, blob: bytes, context: bytes) -> Dek:
        """Reverse ``wrap``; UnwrapFailed where the blob cannot come from this mechanism."""


class AesGcm(Wrapping):
    """AES-256-GCM inside the token, the context as additional data.

    Tokens differ in who makes the IV: most use the IV that they are given; AWS CloudHSM requires
    zeros and writes its own IV over them; Luna in FIPS mode requires an empty IV and appends its
    own to the ciphertext. The first variant that a token does not refuse is remembered for the
    connection.
    """

    name = "AES-GCM"
    code = Mechanism.AES_GCM

    def fits(self, key: KeyObject) -> bool:
        return _aes256(key) and key.can("decrypt")

    def wraps(self, key: KeyObject) -> bool:
        return key.can("encrypt")

    def wrap(self, use: KeyInUse, dek: Dek, context: bytes) -> bytes:
        def encrypt(iv: bytes) -> bytes:
            mechanism = CkMechanism.gcm(use.code(self), iv, context)
            sealed = bytes(use.apply("Encrypt", mechanism, dek.view()))
            body, appended = sealed[: DEK_LENGTH + _TAG], sealed[DEK_LENGTH + _TAG :]
            # Read after the call: CloudHSM has written its own IV over ours.
            used = appended or mechanism.first(len(iv))
            if len(used) not in _IV_LENGTHS or (not any(iv) and used == iv):
                raise UnsupportedOperation("the token encrypted with an IV of zeros, or without IV")
            return used + body

        return _first_accepted(use, "IV", _IVS, lambda new_iv: encrypt(new_iv()))

    def unwrap(self, use: KeyInUse, blob: bytes, context: bytes) -> Dek:
        iv, body = blob[: -DEK_LENGTH - _TAG], blob[-DEK_LENGTH - _TAG :]
        if len(iv) not in _IV_LENGTHS:
            raise UnwrapFailed(f"the wrapped key has {len(blob)} bytes, too few or many for its IV")

        def decrypt(appended: bool) -> Dek:
            mechanism = CkMechanism.gcm(use.code(self), b"" if appended else iv, context)
            ciphertext = body + iv if appended else body
            return _to_dek(use.apply("Decrypt", mechanism, ciphertext))

        return _first_accepted(use, "IV appended", (False, True), decrypt)


class AesKeyWrap(Wrapping):
    """RFC 3394 by C_WrapKey and C_UnwrapKey, for which the inner key becomes a session object."""

    name = "AES-KW"
    code = Mechanism.AES_KEY_WRAP

    def fits(self, key: KeyObject) -> bool:
        return _aes256(key) and key.can("unwrap")

    def wraps(self, key: KeyObject) -> bool:
        return key.can("wrap")

    def wrap(self, use: KeyInUse, dek: Dek, context: bytes) -> bytes:
        def inside(inner: Dek) -> bytes:
            template = _secret_template() | {Attribute.VALUE: inner.view()}
            with _session_object(
                use, lambda accepted: use.ck.create(use.session.handle, accepted), (template,)
            ) as handle:
                mechanism = CkMechanism(use.code(self))
                return use.ck.wrap_key(use.session.handle, mechanism, use.key.handle, handle)

        return inner_wrap(dek, context, inside)

    def unwrap(self, use: KeyInUse, blob: bytes, context: bytes) -> Dek:
        def inside(wrapped: bytes) -> Dek:
            _check_length(wrapped, DEK_LENGTH + 8)
            return _unwrapped(use, CkMechanism(use.code(self)), wrapped)

        return inner_unwrap(blob, context, inside)


class AesKeyWrapPadded(AesKeyWrap):
    """RFC 5649, by CKM_AES_KEY_WRAP_KWP.

    CKM_AES_KEY_WRAP_PAD is used only for a module of ``_quirks``: modules disagree whether it means
    RFC 5649, or RFC 3394 with PKCS #7 padding.
    """

    name = "AES-KWP"
    code = Mechanism.AES_KEY_WRAP_KWP


class RsaOaep256(Wrapping):
    """The mechanism of recipient files with RSA keys: an InnerKey under OAEP with SHA-256.

    It is encrypted here, with the public key.
    """

    name = RSA_OAEP_256
    code = Mechanism.RSA_PKCS_OAEP
    hash: ClassVar[hashes.HashAlgorithm] = hashes.SHA256()
    hash_code: ClassVar[Mechanism] = Mechanism.SHA256
    mgf_code: ClassVar[MGF] = MGF.SHA256

    def fits(self, key: KeyObject) -> bool:
        return key.type == "RSA" and key.can("decrypt", "unwrap") and key.bits >= 2048

    def wrap(self, use: KeyInUse, dek: Dek, context: bytes) -> bytes:
        public = use.key.public
        assert isinstance(public, rsa.RSAPublicKey)  # noqa: S101 - see wraps()
        oaep = padding.OAEP(padding.MGF1(self.hash), self.hash, None)
        return inner_wrap(dek, context, lambda inner: public.encrypt(bytes(inner.view()), oaep))

    def unwrap(self, use: KeyInUse, blob: bytes, context: bytes) -> Dek:
        def inside(wrapped: bytes) -> Dek:
            _check_length(wrapped, (use.key.bits + 7) // 8)
            mechanism = CkMechanism.oaep(use.code(self), self.hash_code, self.mgf_code)
            if not use.key.can("decrypt"):
                return _unwrapped(use, mechanism, wrapped)
            return _to_dek(use.apply("Decrypt", mechanism, wrapped))

        return inner_unwrap(blob, context, inside)


class RsaOaepSha1(RsaOaep256):
    """For tokens without OAEP with SHA-256. OAEP stays secure although SHA-1 has collisions."""

    name = "RSA-OAEP"
    hash = hashes.SHA1()  # noqa: S303 - RFC 8017's default; by the operator's opt-in
    hash_code = Mechanism.SHA_1
    mgf_code = MGF.SHA1


class HpkeP256(Wrapping):
    """HPKE to the public key; the token computes only the ECDH shared secret."""

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
        mechanism = CkMechanism.ecdh(use.code(self), enc)
        template = _secret_template(KeyType.GENERIC_SECRET)
        sized = template | {Attribute.VALUE_LEN: length}

        def derive(attributes: dict[int, Any]) -> int:
            return use.ck.derive(use.session.handle, mechanism, use.key.handle, attributes)

        with _session_object(use, derive, (sized, template)) as handle:
            z = use.ck.read(use.session.handle, handle, Attribute.VALUE, length)
        # Some tokens leave out leading zeros of the shared secret.
        padded = bytearray(length - len(z)) + z
        try:
            return open_with_ecdh(self.name, padded, enc, use.key.point, ciphertext, context)
        finally:
            wipe(z)
            wipe(padded)


class HpkeP384(HpkeP256):
    """HPKE with P-384."""

    name = "hpke-p384"
    bits = 384


MECHANISMS: Final = {
    wrapping.name: wrapping
    for wrapping in (
        AesGcm(),
        AesKeyWrapPadded(),
        AesKeyWrap(),
        RsaOaep256(),
        RsaOaepSha1(),
        HpkeP256(),
        HpkeP384(),
    )
}
"""Every mechanism by name, in the order of preference."""


def _aes256(key: KeyObject) -> bool:
    return key.type == "AES" and key.bits == 256


def _secret_template(kind: KeyType = KeyType.AES) -> dict[int, Any]:
    # It must be readable, so it is neither sensitive nor unextractable; it ends with this session.
    return {
        Attribute.CLASS: int(ObjectClass.SECRET_KEY),
        Attribute.KEY_TYPE: int(kind),
        Attribute.TOKEN: False,
        Attribute.SENSITIVE: False,
        Attribute.EXTRACTABLE: True,
    }


@contextlib.contextmanager
def _session_object(
    use: KeyInUse, make: Callable[[dict[int, Any]], int], templates: Sequence[dict[int, Any]]
) -> Iterator[int]:
    """A session object, by the first template that is not refused; destroyed at the end."""
    lengths = tuple(Attribute.VALUE_LEN in template for template in templates)
    handle = _first_accepted(
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


def _first_accepted(
    use: KeyInUse,
    name: str,
    variants: Sequence[W],
    call: Callable[[W], R],
    refused: frozenset[int] = _REFUSED_IV,
) -> R:
    """Call with the first variant that the module does not refuse, and remember it as ``name``.

    After a refusal the session is renewed: some modules keep a failed operation active in it.
    """
    start = use.session.cache.get(name, 0)
    for number in range(start, len(variants)):
        try:
            answer = call(variants[number])
        except CkError as error:
            if error.code not in refused or number == len(variants) - 1:
                raise
            use.session.renew()
        else:
            use.session.cache[name] = number
            return answer
    raise AssertionError("unreachable")


def _unwrapped(use: KeyInUse, mechanism: CkMechanism, blob: bytes) -> Dek:
    template = _secret_template()
    sized = template | {Attribute.VALUE_LEN: DEK_LENGTH}

    def unwrap(attributes: dict[int, Any]) -> int:
        return use.ck.unwrap_key(use.session.handle, mechanism, use.key.handle, blob, attributes)

    with _session_object(use, unwrap, (template, sized)) as handle:
        return _to_dek(use.ck.read(use.session.handle, handle, Attribute.VALUE, 256))


def _to_dek(plain: bytearray) -> Dek:
    """The data key, and ``plain`` is wiped."""
    try:
        if len(plain) != DEK_LENGTH:
            raise UnwrapFailed(f"the wrapped secret has {len(plain)} bytes and is not a data key")
        return Dek(plain)
    finally:
        wipe(plain)


def _check_length(blob: bytes, length: int) -> None:
    if len(blob) != length:
        raise UnwrapFailed(f"the wrapped key has {len(blob)} bytes, not {length}")
