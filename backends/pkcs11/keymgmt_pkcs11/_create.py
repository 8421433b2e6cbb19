"""Creating keys in the token: a key whose attributes are not proven right is destroyed again.

The template switches every usage off that a key does not need, since modules differ in their
defaults. A new key is accepted when its attributes read back right and every try to get the secret
out was refused; otherwise it is destroyed. It stays modifiable, so that a version can be retired.
That is safe: the standard lets nobody set CKA_SENSITIVE to false or CKA_EXTRACTABLE to true again.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from pkcs11 import Attribute, KeyType, Mechanism

from keymgmt.backend import UnsupportedOperation, wipe
from keymgmt_pkcs11._cryptoki import ULONG_SIZE, CkMechanism
from keymgmt_pkcs11._errors import REFUSED_MECHANISM, REFUSED_TEMPLATE, CkError, Ckr
from keymgmt_pkcs11._keys import CURVES, USAGES, KeyObject, find_versions, session_object
from keymgmt_pkcs11._kinds import Kind, kind_of, shortcomings

if TYPE_CHECKING:
    from keymgmt_pkcs11._connection import Session
    from keymgmt_pkcs11._settings import CreateSettings

    Template = dict[Any, Any]

__all__ = ["destroy", "generate", "session_key"]

_A = Attribute
_GENERATE: Final = {
    KeyType.AES: Mechanism.AES_KEY_GEN,
    KeyType.EC: Mechanism.EC_KEY_PAIR_GEN,
    KeyType.RSA: Mechanism.RSA_PKCS_KEY_PAIR_GEN,
}
_SECRET_PARTS: Final = {
    "AES": (Attribute.VALUE,),
    "EC": (Attribute.VALUE,),
    "RSA": (Attribute.PRIVATE_EXPONENT, Attribute.PRIME_1, Attribute.PRIME_2),
}
# tpm2-pkcs11 answers CKR_GENERAL_ERROR to a template that it does not accept.
_REFUSED: Final = REFUSED_TEMPLATE | {Ckr.GENERAL_ERROR, Ckr.ARGUMENTS_BAD}
_PUBLIC_EXPONENT: Final = b"\x01\x00\x01"


def generate(session: Session, kind: Kind, bits: int, identifier: bytes, key: str) -> KeyObject:
    """Create a key or key pair in the token, and prove it; a key that fails is destroyed.

    Args:
        session: a writing session.
        kind: kind of the new key.
        bits: its size.
        identifier: its CKA_ID.
        key: the key name.

    Raises:
        UnsupportedOperation: the module cannot create such a key, or gave it other attributes.
    """
    settings = session.settings
    label = settings.entry(key).label or key
    name: Template = {_A.LABEL: label.encode(), _A.ID: identifier}
    try:
        handles = _generate(session, kind, bits, {_A.TOKEN: True, **name}, settings.create)
    except CkError as error:
        if error.code in REFUSED_MECHANISM | REFUSED_TEMPLATE:
            raise UnsupportedOperation(
                f"the module makes no key of kind {kind.name} ({error.name})",
                hint="see what it can do: keymgmt pkcs11 mechanisms PROVIDER; if it takes only "
                f'short ids, name them in the table keys: {key} = {{ id = ["01", "02"] }}',
            ) from error
        raise
    try:
        return _proven(session, kind, identifier, key)
    except BaseException:
        destroy(session, handles)
        raise


def session_key(session: Session, kind: Kind) -> tuple[KeyObject, tuple[int, ...]]:
    """A key for a trial, which ends with the session; an RSA key has 2048 bits, to be quick."""
    bits = 2048 if kind.type is KeyType.RSA else kind.bits
    identifier = os.urandom(12)
    name = {_A.TOKEN: False, _A.LABEL: b"keymgmt trial", _A.ID: identifier}
    handles = _generate(session, kind, bits, name, None)
    return session_object(session, identifier), handles


def destroy(session: Session, handles: tuple[int, ...]) -> None:
    """Destroy objects; errors are ignored."""
    for handle in handles:
        with contextlib.suppress(CkError):
            session.ck.destroy(session.handle, handle)


def _generate(
    session: Session, kind: Kind, bits: int, name: Template, create: CreateSettings | None
) -> tuple[int, ...]:
    """The handles of a new key, created with the fullest template that the module accepts."""
    how = CkMechanism(_GENERATE[kind.type])
    templates = list(_templates(kind, bits, name, create))
    for number, (public, secret) in enumerate(templates, 1):
        try:
            if kind.type is KeyType.AES:
                return (session.ck.generate(session.handle, how, secret),)
            return session.ck.generate_pair(session.handle, how, public, secret)
        except CkError as error:
            if error.code not in _REFUSED or number == len(templates):
                raise
            session.renew()
    raise AssertionError("unreachable")


def _templates(
    kind: Kind, bits: int, name: Template, create: CreateSettings | None
) -> Iterator[tuple[Template, Template]]:
    """Templates of the public and of the secret or private key, the fullest first.

    Some modules refuse a template that sets an attribute which they set themselves. ``_proven``
    reads the attributes back, also those that a template leaves out.
    """
    secret: Template = {_A.PRIVATE: True, _A.SENSITIVE: True, _A.EXTRACTABLE: False, **name}
    public: Template = dict(name)
    if kind.type is KeyType.AES:
        secret[_A.VALUE_LEN] = bits // 8
    elif kind.type is KeyType.RSA:
        public |= {_A.MODULUS_BITS: bits, _A.PUBLIC_EXPONENT: _PUBLIC_EXPONENT}
    else:
        public[_A.EC_PARAMS] = next(der for der, curve in CURVES.items() if curve.key_size == bits)
    if create is not None:
        secret |= create.template
        if not create.modifiable:
            secret[_A.MODIFIABLE] = False
        if create.allowed_mechanisms:
            secret[_A.ALLOWED_MECHANISMS] = b"".join(
                int(code).to_bytes(ULONG_SIZE, sys.byteorder) for code in kind.mechanisms
            )
    possible = {_A.DECRYPT, _A.UNWRAP, _A.SIGN, _A.DERIVE}
    if kind.type is KeyType.AES:
        possible |= {_A.ENCRYPT, _A.WRAP, _A.VERIFY}
    others = {_A.ENCRYPT, _A.WRAP, _A.VERIFY}
    yield (
        public | {usage: usage in kind.public for usage in others},
        secret | {usage: usage in kind.secret for usage in possible},
    )
    yield public | dict.fromkeys(kind.public, True), secret | dict.fromkeys(kind.secret, True)
    yield public, secret


def _proven(session: Session, kind: Kind, identifier: bytes, name: str) -> KeyObject:
    key = find_versions(session, name).get(identifier.hex())
    if key is None:
        raise UnsupportedOperation("the module did not keep the label and id of a new key")
    wrong = list(shortcomings(key, session.settings, name).values())
    if (actual := kind_of(key)) is not kind:
        wrong.append(f"its usages are those of {actual.name if actual else 'no kind'}")
    if missing := {USAGES[usage] for usage in kind.secret} - key.flags:
        wrong.append(f"it may not {', '.join(sorted(missing))}")
    if wrong:
        raise UnsupportedOperation(
            f"the module made a key with wrong attributes ({'; '.join(wrong)}); it was destroyed",
            hint="ask the vendor how to make non-extractable keys with one purpose",
        )
    if (how := _extraction(session, key)) is not None:
        raise UnsupportedOperation(
            f"the module let the secret of a new key out ({how}); the key was destroyed",
            hint="do not use this module for secrets",
        )
    return key


def _extraction(session: Session, key: KeyObject) -> str | None:
    """Try to get the secret of a key out: a description of the success, or None."""
    for part in _SECRET_PARTS.get(key.type, ()):
        with contextlib.suppress(CkError):
            value = session.ck.read(session.handle, key.handle, part, 4096)
            empty = not any(value)
            wipe(value)
            if not empty:
                return f"{part.name} was read"
    if session.module.quirks.wraps_out:
        return None
    # A temporary wrapping key, with which the module must refuse to wrap the new key.
    template = {_A.WRAP: True, _A.UNWRAP: True, _A.TOKEN: False, _A.ENCRYPT: False}
    try:
        how = CkMechanism(Mechanism.AES_KEY_GEN)
        wrapper = session.ck.generate(session.handle, how, {_A.VALUE_LEN: 32, **template})
    except CkError:
        return None  # the module has no such wrapping keys, so none can wrap the new key
    try:
        for mechanism in (Mechanism.AES_KEY_WRAP, Mechanism.AES_KEY_WRAP_PAD):
            with contextlib.suppress(CkError):
                session.ck.wrap_key(session.handle, CkMechanism(mechanism), wrapper, key.handle)
                return f"{mechanism.name} wrapped it"
    finally:
        destroy(session, (wrapper,))
    return None
