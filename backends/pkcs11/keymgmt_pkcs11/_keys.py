"""Key objects of a token, and how they make up the versions of a key.

All versions of a key share a CKA_LABEL and each has its own CKA_ID; a version is written as that
CKA_ID in hex, so that ``pkcs11-tool --id`` takes it. keymgmt gives the CKA_ID ``6b6d``, a counter
(4 bytes, big-endian) and 6 random bytes: the newest version has the highest counter, and no other
object has the same CKA_ID. A key with a CKA_ID of another tool counts as older.
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
# The attributes to read of each class of object, in one call.
_READ: Final[Mapping[ObjectClass, tuple[Attribute, ...]]] = {
    ObjectClass.SECRET_KEY: (_U.KEY_TYPE, _U.LABEL, _U.ID, *USAGES, *_SECRET_STATES, _U.VALUE_LEN),
    ObjectClass.PRIVATE_KEY: (
        *(_U.KEY_TYPE, _U.LABEL, _U.ID, _U.DECRYPT, _U.UNWRAP, _U.SIGN, _U.DERIVE),
        *STATES,
    ),
    ObjectClass.PUBLIC_KEY: (_U.KEY_TYPE, _U.LABEL, _U.ID),
}
# The public key of a key pair, by its type. Some tokens give it with one of the two objects only.
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
        handle: the object's handle, valid until the connection is lost.
        label: CKA_LABEL.
        id: CKA_ID.
        type: ``AES``, ``RSA``, ``EC``, or ``type N`` with the number of another CKA_KEY_TYPE.
        bits: size of the key or curve, 0 where the token does not say.
        flags: names of the usages and states that are true.
        unknown: names of the usages and states that the token does not tell.
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
        """The number of the version in the CKA_ID; 0 for a CKA_ID of another tool."""
        ours = len(self.id) == 12 and self.id.startswith(_MARK)
        return int.from_bytes(self.id[2:6], "big") if ours else 0

    def can(self, *usages: str) -> bool:
        """Whether any of these usages or states is true."""
        return not self.flags.isdisjoint(usages)

    @functools.cached_property
    def wants_approval(self) -> bool:
        """Whether each use of the key requires a login of its own."""
        return self.can("always_authenticate")

    @property
    def retired(self) -> bool:
        """Whether every usage is off that needs the secret part of the key."""
        return not self.can("decrypt", "unwrap", "derive", "sign")

    @property
    def point(self) -> bytes:
        """The uncompressed point of an EC public key; empty for other keys."""
        if not isinstance(self.public, ec.EllipticCurvePublicKey):
            return b""
        return self.public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    @property
    def der(self) -> bytes:
        """The public key as DER SubjectPublicKeyInfo.

        Raises:
            UnsupportedOperation: the token does not have the public key.
        """
        if self.public is None:
            raise UnsupportedOperation(
                f"the token has no public key for {self.label!r} {self.version}",
                hint="import it beside the private key, with the same label and id",
            )
        return self.public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def public_bytes(self) -> bytes:
        """The public key in the encoding of a Recipient: an EC key's point, an RSA key's DER."""
        return self.point or self.der

    @functools.cached_property
    def params(self) -> dict[str, str]:
        """The ``params`` of a WrappedKey: the id of the public key, where the token has it."""
        return {"pk": public_key_id(self.public_bytes)} if self.public else {}

    def __str__(self) -> str:
        return f"{self.type} label {self.label!r} id {self.version}"


@dataclass(frozen=True)
class Versions:
    """The versions of one key, from oldest to newest.

    Attributes:
        key: the key name.
        objects: the key object of each version.
        ordered: whether the config gives their order.
    """

    key: str
    objects: tuple[KeyObject, ...]
    ordered: bool = False

    @classmethod
    def of(cls, key: str, objects: Sequence[KeyObject], entry: KeyEntry) -> Versions:
        """In the order of the ids in the config; without these, by counter and then by CKA_ID."""
        if entry.ids:
            by_config = sorted(objects, key=lambda each: entry.ids.index(each.id))
            return cls(key, tuple(by_config), ordered=True)
        return cls(key, tuple(sorted(objects, key=lambda each: (each.counter, each.id))))

    @property
    def newest(self) -> KeyObject:
        """The version for new wraps and signatures.

        Raises:
            UnsupportedOperation: nothing in the token tells which version is the newest.
        """
        last = self.objects[-1]
        if not self.ordered and last.counter == 0 and len(self.objects) > 1:
            raise _ambiguous(self.key, self.objects)
        return last

    def get(self, version: str) -> KeyObject | None:
        """The object of a version, or None.

        Raises:
            UnsupportedOperation: several objects have this label and id.
        """
        matches = [key_object for key_object in self.objects if key_object.version == version]
        if len(matches) > 1:
            raise _ambiguous(self.key, matches)
        return matches[0] if matches else None

    def listed(self) -> tuple[KeyVersion, ...]:
        """The versions in the form that SupportsKeyManagement returns."""
        last = self.objects[-1]
        return tuple(
            KeyVersion(
                key_object.version,
                "retired" if key_object.retired else "active" if key_object is last else "old",
            )
            for key_object in self.objects
        )


def new_id(counter: int) -> bytes:
    """A new CKA_ID with this counter."""
    return _MARK + counter.to_bytes(4, "big") + os.urandom(6)


def find_versions(session: Session, key: str) -> Versions:
    """The versions of a key in the token, which the settings may name otherwise.

    Raises:
        KeyNotFound: there is no such key.
        UnsupportedOperation: two objects have the same label and id.
    """
    entry = session.settings.entry(key)
    label = {} if entry.label is None else {Attribute.LABEL: _encoded(entry.label)}
    objects, unreadable = _read(
        session, [{**label, Attribute.ID: each} for each in entry.ids] or [label]
    )
    if not objects:
        session.confirm()
        words = [] if entry.label is None else [f"label {entry.label!r}"]
        words += [f"id {each.hex()}" for each in entry.ids]
        raise KeyNotFound(
            f"the token {session.token.label!r} has no key {' '.join(words)}"
            + (f" that can be used: {'; '.join(unreadable)}" if unreadable else ""),
            hint="see its keys: keymgmt keys list PROVIDER; name others in the table keys of the "
            "config",
        )
    versions = Versions.of(key, objects, entry)
    for key_object in objects:
        versions.get(key_object.version)
    return versions


def all_keys(session: Session) -> tuple[list[KeyObject], list[str]]:
    """Every secret and private key of the token, and descriptions of those that cannot be read.

    The keys are in the order of label and version.
    """
    objects, unreadable = _read(session, [{}])
    if not objects:
        session.confirm()
    return objects, unreadable


def by_name(
    keys: Sequence[KeyObject], settings: Pkcs11Settings
) -> tuple[dict[str, Versions], list[KeyObject]]:
    """The keys that have a key name, and those that have none or a type that is not used here."""
    named: dict[str, list[KeyObject]] = {}
    others = []
    for key_object in keys:
        name = settings.name_of(key_object.label, key_object.id)
        if name is None or key_object.type not in _TYPES.values():
            others.append(key_object)
        else:
            named.setdefault(name, []).append(key_object)
    return {
        name: Versions.of(name, objects, settings.entry(name)) for name, objects in named.items()
    }, others


def session_object(session: Session, identifier: bytes) -> KeyObject:
    """A session object (not CKA_TOKEN) by its CKA_ID."""
    objects, unreadable = _read(session, [{Attribute.ID: identifier}], token=False)
    if not objects:
        raise UnsupportedOperation(f"the module does not show a new key: {'; '.join(unreadable)}")
    return objects[0]


def find_halves(session: Session, key_object: KeyObject) -> list[int]:
    """The handles of a key: that of a secret key, or those of the private and the public key."""
    name = {Attribute.LABEL: _encoded(key_object.label), Attribute.ID: key_object.id}
    return [
        handle
        for kind in (ObjectClass.SECRET_KEY, ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY)
        for handle in session.ck.find(
            session.handle, {Attribute.CLASS: int(kind), Attribute.TOKEN: True, **name}
        )
    ]


def switch_off(session: Session, key_object: KeyObject, keep: AbstractSet[Attribute]) -> None:
    """Set every usage of a key and of its public key to false, except those in ``keep``.

    Raises:
        CkError: the token does not permit the change.
    """
    for half in find_halves(session, key_object):
        usages = read_attributes(session, half, tuple(USAGES))
        for usage in (usage for usage, may in usages.items() if may and usage not in keep):
            session.ck.change(session.handle, half, {usage: False})
    session.cache.clear()


def _read(
    session: Session, templates: Sequence[Mapping[Any, Any]], *, token: bool = True
) -> tuple[list[KeyObject], list[str]]:
    """The keys that fit any of the templates, and descriptions of those that cannot be read.

    The keys are in the order of label and version.
    """
    public: dict[tuple[bytes, bytes], dict[Attribute, Any]] = {}
    secret: list[tuple[int, dict[Attribute, Any]]] = []
    unreadable: list[str] = []
    for kind, attributes in _READ.items():
        wanted = {Attribute.CLASS: int(kind), Attribute.TOKEN: token}
        handles = [session.ck.find(session.handle, {**wanted, **each}) for each in templates]
        for handle in itertools.chain(*handles):
            try:
                read = read_attributes(session, handle, attributes)
                read |= _public_parts(session, handle, read, kind)
            except ValueError as error:
                unreadable.append(f"object {handle} of class {kind.name}: {error}")
                continue
            if kind is ObjectClass.PUBLIC_KEY:
                name = (read.get(Attribute.LABEL, b""), read.get(Attribute.ID, b""))
                # Of several public keys with this label and id the first is taken; if it is the
                # wrong one, the round trip of the key fails.
                public.setdefault(name, read)
            else:
                secret.append((handle, read))
    objects = []
    for handle, read in secret:
        key_object = _object(handle, read, public)
        if is_version(key_object.version):
            objects.append(key_object)
        else:
            unreadable.append(
                f"{key_object.type} label {key_object.label[:80]!r}: its id is too long"
            )
    return sorted(
        objects, key=lambda key_object: (key_object.label, key_object.counter, key_object.id)
    ), unreadable


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
        ValueError: an attribute is larger than the largest of any supported key.
        CkError: the object or the session is gone.
    """
    # NSS writes a number or truth value only into a buffer of exactly its size.
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
    attributes: dict[Attribute, Any] = {}
    for each in wanted:
        if each in raw:
            value = raw[each]
            if each in _TRUTHS:
                attributes[each] = any(value)
            elif each in _NUMBERS:
                attributes[each] = int.from_bytes(value, sys.byteorder)
            else:
                attributes[each] = value
    return attributes


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
            # CKA_EC_POINT is the point in a DER OCTET STRING; some modules omit the DER header.
            return ec.EllipticCurvePublicKey.from_encoded_point(curve, point[-length:])
    except (KeyError, ValueError):
        return None
    return None


def _encoded(label: str) -> bytes:
    return label.encode("utf-8", "backslashreplace")


def _ambiguous(key: str, candidates: Sequence[KeyObject]) -> UnsupportedOperation:
    listed = "; ".join(str(key_object) for key_object in candidates[:8])
    same = len({key_object.id for key_object in candidates}) < len(candidates)
    return UnsupportedOperation(
        f"the key {key!r} is ambiguous in the token: {listed}",
        hint="give each object an id of its own with the vendor's tool, or: pkcs11-tool --module "
        "LIBRARY.so --token-label LABEL --login --type TYPE --id ID --set-id NEW"
        if same
        else f'say which one, in the table keys: {key} = {{ id = "{candidates[-1].version}" }}',
    )
