"""Key objects of a token, and how they make up the versions of a key.

All versions of a key share a CKA_LABEL and each has its own CKA_ID; a version is written as that
CKA_ID in hex, so what keymgmt says is what ``pkcs11-tool --id`` takes. The CKA_ID that we give is
``6b6d``, a counter (4 bytes, big-endian), 6 random bytes: the newest version is that of the highest
counter, and nobody else's CKA_ID is the same. A CKA_ID that others gave counts as older than ours.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11 import Attribute, KeyType, ObjectClass

from keymgmt.backend import KeyNotFound, KeyVersion, UnsupportedOperation, is_version, public_key_id
from keymgmt_pkcs11._cryptoki import MAX_OUTPUT, ULONG_SIZE
from keymgmt_pkcs11._errors import CkError, Ckr

if TYPE_CHECKING:
    from keymgmt_pkcs11._connection import Session
    from keymgmt_pkcs11._settings import KeyEntry, Pkcs11Settings

__all__ = [
    "CURVES",
    "KeyObject",
    "Versions",
    "all_keys",
    "by_name",
    "find_halves",
    "find_versions",
    "new_id",
    "read_attributes",
    "session_object",
    "switch_off",
]

NO_ID: Final = "noid"
_MARK: Final = b"km"
USAGES: Final = {
    Attribute.ENCRYPT: "encrypt",
    Attribute.DECRYPT: "decrypt",
    Attribute.WRAP: "wrap",
    Attribute.UNWRAP: "unwrap",
    Attribute.SIGN: "sign",
    Attribute.VERIFY: "verify",
    Attribute.DERIVE: "derive",
}
STATES: Final = {
    Attribute.SENSITIVE: "sensitive",
    Attribute.EXTRACTABLE: "extractable",
    Attribute.ALWAYS_SENSITIVE: "always_sensitive",
    Attribute.NEVER_EXTRACTABLE: "never_extractable",
    Attribute.LOCAL: "local",
    Attribute.MODIFIABLE: "modifiable",
    Attribute.PRIVATE: "private",
    Attribute.ALWAYS_AUTHENTICATE: "always_authenticate",
}
_U: Final = Attribute
_SECRET_STATES: Final = tuple(state for state in STATES if state is not _U.ALWAYS_AUTHENTICATE)
# What each class of object has, so that one call reads it all.
_READ: Final[Mapping[ObjectClass, tuple[Attribute, ...]]] = {
    ObjectClass.SECRET_KEY: (_U.KEY_TYPE, _U.LABEL, _U.ID, *USAGES, *_SECRET_STATES, _U.VALUE_LEN),
    ObjectClass.PRIVATE_KEY: (
        *(_U.KEY_TYPE, _U.LABEL, _U.ID, _U.DECRYPT, _U.UNWRAP, _U.SIGN, _U.DERIVE),
        *STATES,
    ),
    ObjectClass.PUBLIC_KEY: (_U.KEY_TYPE, _U.LABEL, _U.ID),
}
# Of a key pair, by its type; some tokens have them with one half only.
_PUBLIC_PARTS: Final = {
    KeyType.RSA: (_U.MODULUS, _U.PUBLIC_EXPONENT),
    KeyType.EC: (_U.EC_PARAMS, _U.EC_POINT),
}
_NUMBERS: Final = frozenset({_U.CLASS, _U.KEY_TYPE, _U.VALUE_LEN})
_TRUTHS: Final = frozenset({*USAGES, *STATES})
# DER of namedCurve (RFC 5480, section 2.1.1).
CURVES: Final[Mapping[bytes, ec.EllipticCurve]] = {
    bytes.fromhex("06082a8648ce3d030107"): ec.SECP256R1(),
    bytes.fromhex("06052b81040022"): ec.SECP384R1(),
}
_TYPES: Final = {KeyType.AES: "AES", KeyType.RSA: "RSA", KeyType.EC: "EC"}


@dataclass(frozen=True)
class KeyObject:
    """One secret or private key of the token, as it was read.

    Attributes:
        handle: its number in this connection.
        label: CKA_LABEL.
        id: CKA_ID.
        type: ``AES``, ``RSA``, ``EC``, or the module's word for another.
        bits: size of the key or curve, 0 where the token does not say.
        flags: names of the usages and states that are true.
        unknown: names of those that the token does not tell.
        public: the public key of a key pair, where the token has it.
    """

    handle: int
    label: str
    id: bytes
    type: str
    bits: int
    flags: frozenset[str]
    unknown: frozenset[str] = frozenset()
    public: ec.EllipticCurvePublicKey | rsa.RSAPublicKey | None = field(default=None, repr=False)

    @property
    def version(self) -> str:
        """The CKA_ID in hex."""
        return self.id.hex() or NO_ID

    @property
    def counter(self) -> int:
        """The place among versions; 0 for a CKA_ID that others gave."""
        ours = len(self.id) == 12 and self.id.startswith(_MARK)
        return int.from_bytes(self.id[2:6], "big") if ours else 0

    def can(self, *usages: str) -> bool:
        """Whether its attributes permit any of the usages."""
        return not self.flags.isdisjoint(usages)

    @functools.cached_property
    def wants_approval(self) -> bool:
        """Whether each single use of it wants a login of its own."""
        return self.can("always_authenticate")

    @property
    def retired(self) -> bool:
        """Whether it may be used for nothing that needs its secret."""
        return not self.can("decrypt", "unwrap", "derive", "sign")

    @property
    def point(self) -> bytes:
        """The uncompressed point of an EC public key; empty where there is none."""
        if not isinstance(self.public, ec.EllipticCurvePublicKey):
            return b""
        return self.public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    @property
    def der(self) -> bytes:
        """The public key as DER SubjectPublicKeyInfo.

        Raises:
            UnsupportedOperation: the token has no public key for it.
        """
        if self.public is None:
            raise UnsupportedOperation(
                f"the token has no public key for {self.label!r} {self.version}",
                hint="import it beside the private key, with the same label and id",
            )
        return self.public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def public_bytes(self) -> bytes:
        """As recipients of its kind have it: an EC key's point, an RSA key's ``der``."""
        return self.point or self.der

    @functools.cached_property
    def params(self) -> dict[str, str]:
        """What a WrappedKey says of it beside label and version: its public key, if it has one."""
        return {"pk": public_key_id(self.public_bytes)} if self.public else {}

    def __str__(self) -> str:
        return f"{self.type} label {self.label!r} id {self.version}"


@dataclass(frozen=True)
class Versions:
    """The versions of one key, from oldest to newest.

    Attributes:
        key: the operator's name for it.
        objects: one for each version.
        told: whether the config says their order.
    """

    key: str
    objects: tuple[KeyObject, ...]
    told: bool = False

    @classmethod
    def of(cls, key: str, found: Sequence[KeyObject], entry: KeyEntry) -> Versions:
        """In the order of the ids that the config lists, else of our counters, then of the ids."""
        if entry.ids:
            return cls(key, tuple(sorted(found, key=lambda i: entry.ids.index(i.id))), told=True)
        return cls(key, tuple(sorted(found, key=lambda item: (item.counter, item.id))))

    @property
    def newest(self) -> KeyObject:
        """The version for new wraps and signatures.

        Raises:
            UnsupportedOperation: the token does not tell which one it is.
        """
        last = self.objects[-1]
        if not self.told and last.counter == 0 and len(self.objects) > 1:
            raise _ambiguous(self.key, self.objects)
        return last

    def get(self, version: str) -> KeyObject | None:
        """The object of a version, or None.

        Raises:
            UnsupportedOperation: several objects have this label and id.
        """
        found = [item for item in self.objects if item.version == version]
        if len(found) > 1:
            raise _ambiguous(self.key, found)
        return found[0] if found else None

    def listed(self) -> tuple[KeyVersion, ...]:
        """As SupportsKeyManagement tells them."""
        last = self.objects[-1]
        return tuple(
            KeyVersion(
                item.version,
                "retired" if item.retired else "active" if item is last else "old",
            )
            for item in self.objects
        )


def new_id(counter: int) -> bytes:
    """A CKA_ID for the version of that counter."""
    return _MARK + counter.to_bytes(4, "big") + os.urandom(6)


def find_versions(session: Session, key: str, entry: KeyEntry) -> Versions:
    """The versions of a key in the token.

    Raises:
        KeyNotFound: there is none.
        UnsupportedOperation: two objects have the same label and id.
    """
    label = {} if entry.label is None else {Attribute.LABEL: _encoded(entry.label)}
    found, odd = _read(session, [{**label, Attribute.ID: each} for each in entry.ids] or [label])
    if not found:
        session.confirm()
        words = [] if entry.label is None else [f"label {entry.label!r}"]
        words += [f"id {each.hex()}" for each in entry.ids]
        raise KeyNotFound(
            f"the token {session.token.label!r} has no key {' '.join(words)}"
            + (f" that can be used: {'; '.join(odd)}" if odd else ""),
            hint="see its keys: keymgmt keys list PROVIDER; name others in the table keys of the "
            "config",
        )
    versions = Versions.of(key, found, entry)
    for item in found:
        versions.get(item.version)
    return versions


def all_keys(session: Session) -> tuple[list[KeyObject], list[str]]:
    """Every secret and private key of the token by label and version, and what cannot be read."""
    found, odd = _read(session, [{}])
    if not found:
        session.confirm()
    return found, odd


def by_name(
    keys: Sequence[KeyObject], settings: Pkcs11Settings
) -> tuple[dict[str, Versions], list[KeyObject]]:
    """The keys that have a name of ours, and those that have none or are of another type."""
    found: dict[str, list[KeyObject]] = {}
    strange = []
    for item in keys:
        name = settings.name_of(item.label, item.id)
        if name is None or item.type not in _TYPES.values():
            strange.append(item)
        else:
            found.setdefault(name, []).append(item)
    return {
        name: Versions.of(name, items, settings.entry(name)) for name, items in found.items()
    }, strange


def session_object(session: Session, identifier: bytes) -> KeyObject:
    """A key of this session only, by its CKA_ID."""
    found, odd = _read(session, [{Attribute.ID: identifier}], token=False)
    if not found:
        raise UnsupportedOperation(f"the module does not show a new key: {'; '.join(odd)}")
    return found[0]


def find_halves(session: Session, item: KeyObject) -> list[int]:
    """The key and, beside a private one, its public one."""
    name = {Attribute.LABEL: _encoded(item.label), Attribute.ID: item.id}
    return [
        handle
        for kind in (ObjectClass.SECRET_KEY, ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY)
        for handle in session.ck.find(
            session.handle, {Attribute.CLASS: int(kind), Attribute.TOKEN: True, **name}
        )
    ]


def switch_off(session: Session, item: KeyObject, keep: AbstractSet[Attribute]) -> None:
    """Set every usage of a key and its public half to false, but for those to keep.

    Raises:
        CkError: the token does not let it change.
    """
    for half in find_halves(session, item):
        usages = read_attributes(session, half, tuple(USAGES))
        for usage in (usage for usage, may in usages.items() if may and usage not in keep):
            session.ck.change(session.handle, half, {usage: False})
    session.cache.clear()


def _read(
    session: Session, templates: Sequence[Mapping[Any, Any]], *, token: bool = True
) -> tuple[list[KeyObject], list[str]]:
    """The keys that fit one, in the order of label and version, and which cannot be read."""
    public: dict[tuple[bytes, bytes], dict[Attribute, Any]] = {}
    secret: list[tuple[int, dict[Attribute, Any]]] = []
    odd: list[str] = []
    for kind, attributes in _READ.items():
        wanted = {Attribute.CLASS: int(kind), Attribute.TOKEN: token}
        handles = [session.ck.find(session.handle, {**wanted, **each}) for each in templates]
        for handle in itertools.chain(*handles):
            try:
                read = read_attributes(session, handle, attributes)
                read |= _public_parts(session, handle, read, kind)
            except ValueError as error:
                odd.append(f"object {handle} of class {kind.name}: {error}")
                continue
            if kind is ObjectClass.PUBLIC_KEY:
                place = (read.get(Attribute.LABEL, b""), read.get(Attribute.ID, b""))
                # Where several have this name, a round trip finds whether the first is the right.
                public.setdefault(place, read)
            else:
                secret.append((handle, read))
    made = []
    for handle, read in secret:
        item = _object(handle, read, public)
        if is_version(item.version):
            made.append(item)
        else:
            odd.append(f"{item.type} label {item.label[:80]!r}: its id is too long")
    return sorted(made, key=lambda item: (item.label, item.counter, item.id)), odd


def _public_parts(
    session: Session, handle: int, read: Mapping[Attribute, Any], kind: ObjectClass
) -> dict[Attribute, Any]:
    wanted = _PUBLIC_PARTS.get(read.get(Attribute.KEY_TYPE, 0), ())
    if not wanted or kind is ObjectClass.SECRET_KEY:
        return {}
    return read_attributes(session, handle, wanted)


def read_attributes(
    session: Session, handle: int, wanted: Sequence[Attribute]
) -> dict[Attribute, Any]:
    """Those of the wanted attributes that the object has and the token tells.

    Raises:
        ValueError: one of them is larger than any that is used here.
        CkError: the object or the session is gone.
    """
    # NSS takes a number or truth value into a buffer of its exact size only.
    sizes = {
        int(each): ULONG_SIZE if each in _NUMBERS else 1 if each in _TRUTHS else MAX_OUTPUT
        for each in wanted
    }
    raw: dict[int, bytes] = {}
    if session.cache.get("reads one by one") is None:
        try:
            raw = session.ck.read_many(session.handle, handle, sizes)
        except CkError as error:
            if error.passing:
                raise
            session.cache["reads one by one"] = True
    for each in sizes.keys() - raw.keys():
        try:
            raw[each] = bytes(session.ck.read(session.handle, handle, each, sizes[each]))
        except CkError as error:
            if error.code == Ckr.BUFFER_TOO_SMALL:
                name = Attribute(each).name
                raise ValueError(f"its {name} is larger than {sizes[each]} bytes") from error
            if error.passing:
                raise
    found: dict[Attribute, Any] = {}
    for each in wanted:
        if each in raw:
            value = raw[each]
            if each in _TRUTHS:
                found[each] = any(value)
            elif each in _NUMBERS:
                found[each] = int.from_bytes(value, sys.byteorder)
            else:
                found[each] = value
    return found


def _object(
    handle: int,
    read: Mapping[Attribute, Any],
    public: Mapping[tuple[bytes, bytes], Mapping[Attribute, Any]],
) -> KeyObject:
    label, identifier = read.get(Attribute.LABEL, b""), read.get(Attribute.ID, b"")
    kind = read.get(Attribute.KEY_TYPE)
    names = {**USAGES, **STATES}
    other = public.get((label, identifier), {})
    key = _public(kind, {**other, **{k: v for k, v in read.items() if v}})
    return KeyObject(
        handle,
        label.decode("utf-8", "backslashreplace"),
        identifier,
        _TYPES.get(kind, f"type {kind}"),  # type: ignore[arg-type]
        key.key_size if key else 8 * read.get(Attribute.VALUE_LEN, 0),
        frozenset(name for attribute, name in names.items() if read.get(attribute)),
        frozenset(name for attribute, name in names.items() if attribute not in read),
        key,
    )


def _public(
    kind: Any, read: Mapping[Any, Any]
) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey | None:
    try:
        if kind == KeyType.RSA:
            return rsa.RSAPublicNumbers(
                int.from_bytes(read[Attribute.PUBLIC_EXPONENT], "big"),
                int.from_bytes(read[Attribute.MODULUS], "big"),
            ).public_key()
        if kind == KeyType.EC:
            curve = CURVES[bytes(read[Attribute.EC_PARAMS])]
            point = bytes(read[Attribute.EC_POINT])
            length = 1 + 2 * ((curve.key_size + 7) // 8)
            # CKA_EC_POINT is a DER OCTET STRING; some modules leave its header out.
            return ec.EllipticCurvePublicKey.from_encoded_point(curve, point[-length:])
    except (KeyError, ValueError):
        return None
    return None


def _encoded(label: str) -> bytes:
    return label.encode("utf-8", "backslashreplace")


def _ambiguous(key: str, candidates: Sequence[KeyObject]) -> UnsupportedOperation:
    listed = "; ".join(str(item) for item in candidates[:8])
    same = len({item.id for item in candidates}) < len(candidates)
    return UnsupportedOperation(
        f"the key {key!r} is ambiguous in the token: {listed}",
        hint="give each object an id of its own with the vendor's tool, or: pkcs11-tool --module "
        "LIBRARY.so --token-label LABEL --login --type TYPE --id ID --set-id NEW"
        if same
        else f'say which one, in the table keys: {key} = {{ id = "{candidates[-1].version}" }}',
    )
