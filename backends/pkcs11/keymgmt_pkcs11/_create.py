"""Making keys in the token: with the right attributes, proven, or not at all.

Every usage that a key does not need is switched off in so many words, since modules differ in their
defaults. A new key is believed when its attributes read back right and every try to get the secret
out was refused; otherwise it is destroyed. It stays modifiable, so that a version can be retired;
the standard lets nobody make a sensitive key readable again (CKA_SENSITIVE, CKA_EXTRACTABLE).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag
from pkcs11.exceptions import PKCS11Error

from keymgmt.backend import ConfigError, UnsupportedOperation, wipe
from keymgmt_pkcs11._cryptoki import CkError, Parameters
from keymgmt_pkcs11._errors import reason
from keymgmt_pkcs11._keys import CURVES, USAGES, KeyObject, find_versions, session_object
from keymgmt_pkcs11._quirks import quirks_of

if TYPE_CHECKING:
    from keymgmt_pkcs11._sessions import Channel
    from keymgmt_pkcs11._settings import KeyEntry

__all__ = [
    "KINDS",
    "Kind",
    "bits_of",
    "destroy",
    "extraction",
    "generate",
    "kind_of",
    "session_key",
]

_RSA_BITS: Final = ("2048", "3072", "4096")


@dataclass(frozen=True)
class Kind:
    """A kind of key that we make.

    Attributes:
        name: the kind in an operator's words.
        purpose: what it is for, and nothing else.
        type: CKA_KEY_TYPE.
        secret: usages of the secret or private key.
        public: usages of the public key.
        bits: size of the key or curve; for RSA the default of the option ``bits``.
    """

    name: str
    purpose: Literal["wrap", "sign"]
    type: KeyType
    secret: frozenset[Attribute]
    public: frozenset[Attribute]
    bits: int


def _kind(
    name: str,
    purpose: Literal["wrap", "sign"],
    kind: KeyType,
    secret: set[Attribute],
    public: set[Attribute],
    bits: int,
) -> Kind:
    return Kind(name, purpose, kind, frozenset(secret), frozenset(public), bits)


_A = Attribute
KINDS: Final = {
    kind.name: kind
    for kind in (
        _kind("aes256", "wrap", KeyType.AES, {_A.ENCRYPT, _A.DECRYPT}, set(), 256),
        _kind("aes256-kw", "wrap", KeyType.AES, {_A.WRAP, _A.UNWRAP}, set(), 256),
        _kind("ecdh-p256", "wrap", KeyType.EC, {_A.DERIVE}, set(), 256),
        _kind("ecdh-p384", "wrap", KeyType.EC, {_A.DERIVE}, set(), 384),
        _kind("rsa-oaep", "wrap", KeyType.RSA, {_A.DECRYPT}, {_A.ENCRYPT}, 3072),
        _kind("ecdsa-p256", "sign", KeyType.EC, {_A.SIGN}, {_A.VERIFY}, 256),
        _kind("ecdsa-p384", "sign", KeyType.EC, {_A.SIGN}, {_A.VERIFY}, 384),
        _kind("rsa-pss", "sign", KeyType.RSA, {_A.SIGN}, {_A.VERIFY}, 3072),
    )
}
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


def bits_of(kind: Kind, options: Mapping[str, str]) -> int:
    """The size of a new key; ConfigError for an option that its kind has not."""
    for name, value in options.items():
        if name != "bits" or kind.type is not KeyType.RSA:
            raise ConfigError(
                f"a key of kind {kind.name} has no option {name!r}",
                hint="rsa-oaep and rsa-pss take bits=2048, 3072 or 4096",
            )
        if value not in _RSA_BITS:
            raise ConfigError(f"bits={value!r} is none of {', '.join(_RSA_BITS)}")
    return int(options.get("bits", kind.bits))


def kind_of(key: KeyObject) -> Kind | None:
    """The kind whose key this could be, by type, size and what it is used for; else None."""
    for kind in KINDS.values():
        if (
            kind.type.name == key.type
            and (kind.type is KeyType.RSA or kind.bits == key.bits)
            and key.can(*(USAGES[usage] for usage in kind.secret))
        ):
            return kind
    return None


def generate(
    channel: Channel, kind: Kind, bits: int, entry: KeyEntry, identifier: bytes, key: str
) -> KeyObject:
    """Make a key or key pair in the token, and prove it; nothing stays where that fails.

    Raises:
        UnsupportedOperation: the module makes no such key, or makes it extractable.
    """
    try:
        handles = _generate(channel, kind, bits, entry.label or key, identifier, store=True)
    except PKCS11Error as error:
        if reason(error).startswith(("Mechanism", "Attribute", "Template", "KeySize", "Curve")):
            raise UnsupportedOperation(
                f"the module makes no key of kind {kind.name} ({reason(error)})",
                hint="see what it can do: keymgmt pkcs11 mechanisms",
            ) from error
        raise
    try:
        made = find_versions(channel, key, entry).get(identifier.hex())
        return _proven(channel, kind, made)
    except BaseException:
        destroy(channel, handles)
        raise


def session_key(channel: Channel, kind: Kind) -> tuple[KeyObject, tuple[int, ...]]:
    """A key that ends with the session, for a trial; RSA of 2048 bits, to be quick."""
    bits = 2048 if kind.type is KeyType.RSA else kind.bits
    identifier = os.urandom(12)
    handles = _generate(channel, kind, bits, "keymgmt trial", identifier, store=False)
    return session_object(channel, identifier), handles


def destroy(channel: Channel, handles: tuple[int, ...]) -> None:
    """Destroy objects; those that are not there any more are passed over."""
    for handle in handles:
        with contextlib.suppress(CkError):
            channel.ck.destroy(channel.handle, handle)


def _generate(
    channel: Channel, kind: Kind, bits: int, label: str, identifier: bytes, *, store: bool
) -> tuple[int, ...]:
    secret: dict[Any, Any] = {
        Attribute.TOKEN: store,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
        **_usages(kind.secret, secret_key=kind.type is KeyType.AES),
    }
    common: dict[str, Any] = {
        "id": identifier,
        "label": label,
        "store": store,
        "capabilities": MechanismFlag(0),
        "mechanism": _GENERATE[kind.type],
    }
    session = channel.session
    if kind.type is KeyType.AES:
        one = session.generate_key(KeyType.AES, bits, template=secret, **common)
        return (one.handle or 0,)
    public: dict[Any, Any] = {
        usage: usage in kind.public
        for usage in (Attribute.ENCRYPT, Attribute.WRAP, Attribute.VERIFY)
    }
    if kind.type is KeyType.RSA:
        pair = session.generate_keypair(
            KeyType.RSA, bits, public_template=public, private_template=secret, **common
        )
    else:
        public[Attribute.EC_PARAMS] = next(
            der for der, curve in CURVES.items() if curve.key_size == bits
        )
        pair = session.generate_keypair(
            KeyType.EC, public_template=public, private_template=secret, **common
        )
    return tuple(half.handle or 0 for half in pair)


def _usages(wanted: frozenset[Attribute], *, secret_key: bool) -> dict[Any, Any]:
    possible = [Attribute.DECRYPT, Attribute.UNWRAP, Attribute.SIGN, Attribute.DERIVE]
    if secret_key:
        possible += [Attribute.ENCRYPT, Attribute.WRAP, Attribute.VERIFY]
    return {usage: usage in wanted for usage in possible}


def _proven(channel: Channel, kind: Kind, key: KeyObject | None) -> KeyObject:
    if key is None:
        raise UnsupportedOperation("the module did not keep the label and id of a new key")
    wrong = [name for name in ("sensitive", "never_extractable") if not key.can(name)]
    wrong += [f"not {name}" for name in ("extractable",) if key.can(name)]
    names = {USAGES[usage] for usage in kind.secret}
    wrong += [f"may {usage}" for usage in USAGES.values() if key.can(usage) and usage not in names]
    wrong += [f"may not {usage}" for usage in names if not key.can(usage)]
    if wrong:
        raise UnsupportedOperation(
            f"the module made a key with wrong attributes ({', '.join(wrong)}); it was destroyed",
            hint="ask the vendor how to make non-extractable keys with one purpose",
        )
    if (how := extraction(channel, key)) is not None:
        raise UnsupportedOperation(
            f"the module gave the secret of a new key away ({how}); the key was destroyed",
            hint="do not use this module for secrets",
        )
    return key


def extraction(channel: Channel, key: KeyObject) -> str | None:
    """Try to get the secret of a key out: how that worked, or None when all was refused."""
    for part in _SECRET_PARTS.get(key.type, ()):
        with contextlib.suppress(CkError):
            value = channel.ck.read(channel.handle, key.handle, part, 4096)
            empty = not any(value)
            wipe(value)
            if not empty:
                return f"{part.name} was read"
    if quirks_of(channel.module).wraps_out:
        return None
    # A key that wraps, and that the module would let us use to take this one out.
    template = {_A.WRAP: True, _A.UNWRAP: True, _A.TOKEN: False, _A.ENCRYPT: False}
    try:
        wrapper = channel.session.generate_key(
            KeyType.AES,
            256,
            capabilities=MechanismFlag(0),
            mechanism=Mechanism.AES_KEY_GEN,
            template=template,
        )
    except PKCS11Error:
        return None  # no such wrapping keys here, so nothing to take it out with
    handle = wrapper.handle or 0
    try:
        for mechanism in (Mechanism.AES_KEY_WRAP, Mechanism.AES_KEY_WRAP_PAD):
            with contextlib.suppress(CkError):
                channel.ck.wrap_key(channel.handle, Parameters(mechanism), handle, key.handle)
                return f"{mechanism.name} wrapped it"
    finally:
        destroy(channel, (handle,))
    return None
