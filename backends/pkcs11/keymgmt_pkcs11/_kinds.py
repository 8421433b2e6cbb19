"""The kinds of keys, the purpose of each, and the attributes that a safe key has.

A key has one purpose. Whoever may use a key with both CKA_WRAP and CKA_DECRYPT can wrap any
extractable key with it and decrypt the result; and whoever reaches the token can use a key that is
not CKA_PRIVATE, without a PIN.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from pkcs11 import Attribute, KeyType, Mechanism

from keymgmt.backend import ConfigError, check_options
from keymgmt_pkcs11._keys import USAGES, KeyObject

if TYPE_CHECKING:
    from keymgmt_pkcs11._settings import Pkcs11Settings

__all__ = ["KINDS", "Kind", "bits_of", "kind_of", "purpose_of", "shortcomings"]

_RSA_BITS: Final = ("2048", "3072", "4096")
# The usages that mean anything for the secret part of a key of each type. Modules that set usages
# themselves may set others too: in tpm2-pkcs11 an EC key has CKA_DECRYPT.
_MEANINGFUL: Final = {
    "AES": frozenset(USAGES.values()),
    "RSA": frozenset({"decrypt", "unwrap", "sign"}),
    "EC": frozenset({"derive", "sign"}),
}


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of key that keymgmt can create.

    Attributes:
        name: the value of ``--kind``.
        purpose: what a key of this kind is for; it has only one purpose.
        type: CKA_KEY_TYPE.
        secret: usages of the secret or private key.
        public: usages of the public key.
        bits: size of the key or curve; for RSA the default of the option ``bits``.
        mechanisms: the mechanisms that use the key.
    """

    name: str
    purpose: Literal["wrap", "sign"]
    type: KeyType
    secret: AbstractSet[Attribute]
    public: AbstractSet[Attribute]
    bits: int
    mechanisms: tuple[Mechanism, ...]


_A, _M, _T = Attribute, Mechanism, KeyType
_WRAPS: Final = (_M.AES_KEY_WRAP, _M.AES_KEY_WRAP_PAD, _M.AES_KEY_WRAP_KWP)
KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("aes256", "wrap", _T.AES, {_A.ENCRYPT, _A.DECRYPT}, set(), 256, (_M.AES_GCM,)),
        Kind("aes256-kw", "wrap", _T.AES, {_A.WRAP, _A.UNWRAP}, set(), 256, _WRAPS),
        Kind("ecdh-p256", "wrap", _T.EC, {_A.DERIVE}, set(), 256, (_M.ECDH1_DERIVE,)),
        Kind("ecdh-p384", "wrap", _T.EC, {_A.DERIVE}, set(), 384, (_M.ECDH1_DERIVE,)),
        Kind("rsa-oaep", "wrap", _T.RSA, {_A.DECRYPT}, {_A.ENCRYPT}, 3072, (_M.RSA_PKCS_OAEP,)),
        Kind("ecdsa-p256", "sign", _T.EC, {_A.SIGN}, {_A.VERIFY}, 256, (_M.ECDSA,)),
        Kind("ecdsa-p384", "sign", _T.EC, {_A.SIGN}, {_A.VERIFY}, 384, (_M.ECDSA,)),
        Kind("rsa-pss", "sign", _T.RSA, {_A.SIGN}, {_A.VERIFY}, 3072, (_M.RSA_PKCS_PSS,)),
    )
}


def bits_of(kind: Kind, options: Mapping[str, str]) -> int:
    """The size of a new key; ConfigError for an option that its kind does not have."""
    known = {"bits": "3072"} if kind.type is KeyType.RSA else {}
    check_options(options, known, f"pkcs11 for a key of kind {kind.name}")
    bits = options.get("bits", str(kind.bits))
    if "bits" in options and bits not in _RSA_BITS:
        raise ConfigError(f"bits={bits!r} is not one of {', '.join(_RSA_BITS)}")
    return int(bits)


def kind_of(key: KeyObject) -> Kind | None:
    """The kind of a key by its type, size and usages, or None; of two kinds, the one that wraps."""
    for kind in KINDS.values():
        if (
            kind.type.name == key.type
            and (kind.type is KeyType.RSA or kind.bits == key.bits)
            and key.can(*(USAGES[usage] for usage in kind.secret))
        ):
            return kind
    return None


def purpose_of(key: KeyObject) -> Literal["wrap", "sign"]:
    """What a key is for, by its kind; a retired key has no kind, so there the type decides."""
    kind = kind_of(key)
    if kind is not None:
        return kind.purpose
    return "sign" if key.type == "EC" else "wrap"


def shortcomings(key: KeyObject, settings: Pkcs11Settings, name: str) -> dict[str, str]:
    """The properties that a safe key has and this key lacks: name in ``allow`` -> a description.

    A property that the token does not tell counts as lacking. Those that the config allows for
    this key are left out.

    Args:
        key: the key as read.
        settings: the settings of its token.
        name: the key name.
    """
    wanted = {
        # Without a login the token shows no private object, so every key here is not private.
        **({"private": True} if settings.login != "none" else {}),
        "sensitive": True,
        "always_sensitive": True,
        "extractable": False,
        "never_extractable": True,
        # A key that cannot be modified is as safe, but cannot be retired.
        **({} if settings.create.modifiable else {"modifiable": False}),
    }
    wrong = {}
    for state, good in wanted.items():
        if state in key.unknown:
            wrong[state] = f"the token does not tell CKA_{state.upper()}"
        elif key.can(state) is not good:
            wrong[state] = f"CKA_{state.upper()} is {'false' if good else 'true'}"
    used = key.flags & _MEANINGFUL.get(key.type, frozenset(USAGES.values()))
    kind = kind_of(key)
    if kind is not None and (more := used - {USAGES[usage] for usage in kind.secret}):
        wrong["usages"] = f"it may also {', '.join(sorted(more))}"
    allowed = settings.keys[name].allow if name in settings.keys else ()
    return {word: text for word, text in wrong.items() if word not in allowed}
