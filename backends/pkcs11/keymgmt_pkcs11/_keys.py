"""Key objects of a token, and how they make up the versions of a key.

All versions of a key share a CKA_LABEL and each has its own CKA_ID; a version is written as that
CKA_ID in hex, so what keymgmt says is what ``pkcs11-tool --id`` takes. The CKA_ID that we give is
``6b6d``, a counter (4 bytes, big-endian), 6 random bytes: the newest version is that of the highest
counter, and nobody else's CKA_ID is the same. A CKA_ID that others gave counts as older than ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11 import Attribute, KeyType, ObjectClass

from keymgmt.backend import ConfigError, KeyNotFound, KeyVersion, UnsupportedOperation
from keymgmt_pkcs11._cryptoki import MAX_OUTPUT, ULONG_SIZE, USER_NOT_LOGGED_IN, CkError
from keymgmt_pkcs11._errors import GONE, LOST
from keymgmt_pkcs11._sessions import Channel, Lost

if TYPE_CHECKING:
    from keymgmt_pkcs11._settings import KeyEntry

__all__ = [
    "CURVES",
    "NO_ID",
    "KeyObject",
    "Versions",
    "all_keys",
    "find_versions",
    "new_id",
    "session_object",
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
_READ: Final = (
    *(Attribute.CLASS, Attribute.KEY_TYPE, Attribute.LABEL, Attribute.ID),
    *USAGES,
    *STATES,
    *(Attribute.VALUE_LEN, Attribute.MODULUS, Attribute.PUBLIC_EXPONENT),
    *(Attribute.EC_PARAMS, Attribute.EC_POINT),
)
_NUMBERS: Final = frozenset({Attribute.CLASS, Attribute.KEY_TYPE, Attribute.VALUE_LEN})
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
    def spki(self) -> bytes:
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

    def __str__(self) -> str:
        return f"{self.type} label {self.label!r} id {self.version}"


@dataclass(frozen=True)
class Versions:
    """The versions of one key, from oldest to newest."""

    key: str
    objects: tuple[KeyObject, ...]

    @property
    def newest(self) -> KeyObject:
        """The version for new wraps and signatures.

        Raises:
            ConfigError: the token does not tell which one it is.
        """
        last = self.objects[-1]
        if last.counter == 0 and len(self.objects) > 1:
            raise _ambiguous(self.key, self.objects)
        return last

    def get(self, version: str) -> KeyObject | None:
        """The object of a version, or None.

        Raises:
            ConfigError: several objects have this label and id.
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


def find_versions(channel: Channel, key: str, entry: KeyEntry) -> Versions:
    """The versions of a key in the token.

    Raises:
        KeyNotFound: there is none.
        ConfigError: two objects have the same label and id.
    """
    template: dict[Any, Any] = {}
    if entry.label is not None:
        template[Attribute.LABEL] = entry.label.encode("utf-8", "backslashreplace")
    if entry.id is not None:
        template[Attribute.ID] = bytes.fromhex(entry.id)
    found = _read(channel, template)
    if not found:
        _confirm(channel)
        words = " ".join(f"{name} {value!r}" for name, value in entry if value is not None)
        raise KeyNotFound(
            f"the token {channel.token.label!r} has no key {words}",
            hint="see its keys: keymgmt keys list; name others in the table keys of the config",
        )
    versions = Versions(key, tuple(found))
    for item in found:
        versions.get(item.version)
    return versions


def all_keys(channel: Channel) -> list[KeyObject]:
    """Every secret and private key of the token, in the order of label and version."""
    return _read(channel, {})


def _confirm(channel: Channel) -> None:
    """Raise if token or login is gone: no key is seen then, and that must not be the news."""
    if channel.expects_login and not channel.ck.logged_in(channel.handle):
        raise CkError("C_GetSessionInfo", USER_NOT_LOGGED_IN)
    try:
        channel.ck.token_counts(channel.token.slot.slot_id)
    except CkError as error:
        raise Lost(error.reason) from error


def session_object(channel: Channel, identifier: bytes) -> KeyObject:
    """A key of this session only, by its CKA_ID."""
    return _read(channel, {Attribute.ID: identifier}, token=False)[0]


def _read(channel: Channel, template: dict[Any, Any], *, token: bool = True) -> list[KeyObject]:
    public: dict[tuple[str, bytes], list[dict[Any, Any]]] = {}
    found: list[dict[Any, Any]] = []
    handles: list[int] = []
    for kind in (ObjectClass.SECRET_KEY, ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY):
        wanted = {Attribute.CLASS: int(kind), Attribute.TOKEN: token, **template}
        for handle in channel.ck.find(channel.handle, wanted):
            read = read_attributes(channel, handle, _READ)
            if kind is ObjectClass.PUBLIC_KEY:
                place = (str(read.get(Attribute.LABEL, "")), read.get(Attribute.ID, b""))
                public.setdefault(place, []).append(read)
            else:
                found.append(read)
                handles.append(handle)
    made = [_object(handle, read, public) for handle, read in zip(handles, found, strict=True)]
    return sorted(made, key=lambda item: (item.label, item.counter, item.id))


def read_attributes(
    channel: Channel, handle: int, wanted: Sequence[Attribute]
) -> dict[Attribute, Any]:
    """Those of the wanted attributes that the object has and the token tells."""
    found: dict[Attribute, Any] = {}
    for attribute in wanted:
        # NSS takes a number into a buffer of its exact size only.
        size = ULONG_SIZE if attribute in _NUMBERS else MAX_OUTPUT
        try:
            value = bytes(channel.ck.read(channel.handle, handle, attribute, size))
        except CkError as error:
            if error.reason in LOST | GONE:
                raise
            continue
        if attribute in USAGES or attribute in STATES:
            found[attribute] = any(value)
        elif attribute in _NUMBERS:
            found[attribute] = int.from_bytes(value, sys.byteorder)
        elif attribute is Attribute.LABEL:
            found[attribute] = value.decode("utf-8", "backslashreplace")
        else:
            found[attribute] = value
    return found


def _object(
    handle: int, read: dict[Any, Any], public: Mapping[tuple[str, bytes], Sequence[dict[Any, Any]]]
) -> KeyObject:
    label, identifier = str(read.get(Attribute.LABEL, "")), read.get(Attribute.ID, b"")
    kind = read.get(Attribute.KEY_TYPE)
    names = {**USAGES, **STATES}
    # Where several public keys have this name, a round trip finds whether the first is the right.
    other = next(iter(public.get((label, identifier), ())), {})
    key = _public(kind, {**other, **{k: v for k, v in read.items() if v}})
    return KeyObject(
        handle,
        label,
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


def _ambiguous(key: str, candidates: Sequence[KeyObject]) -> ConfigError:
    listed = "; ".join(str(item) for item in candidates[:8])
    same = len({item.id for item in candidates}) < len(candidates)
    return ConfigError(
        f"the key {key!r} is ambiguous in the token: {listed}",
        hint="give each object an id of its own: pkcs11-tool --set-id"
        if same
        else f'say which one, in the table keys: {key} = {{ id = "{candidates[-1].version}" }}',
    )
