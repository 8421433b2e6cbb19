"""Pkcs11Provider: wrap, unwrap, sign and look after keys in an HSM or token."""

from __future__ import annotations

import difflib
import os
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeVar

from pkcs11 import Attribute, ObjectClass
from pkcs11.exceptions import PKCS11Error

from keymgmt.backend import (
    HPKE_KINDS,
    RSA_OAEP_256,
    ConfigError,
    Dek,
    Health,
    KeyInfo,
    KeyNotFound,
    KeyProvider,
    KeyRetired,
    Recipient,
    Signature,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    check_key,
    public_key_id,
)
from keymgmt_pkcs11._create import KINDS, bits_of, destroy, generate, kind_of
from keymgmt_pkcs11._cryptoki import CkError
from keymgmt_pkcs11._doctor import examine
from keymgmt_pkcs11._errors import GONE, LOST, TAMPERED, reason
from keymgmt_pkcs11._keys import (
    KeyObject,
    Versions,
    all_keys,
    find_versions,
    new_id,
    read_attributes,
)
from keymgmt_pkcs11._mechanisms import Use
from keymgmt_pkcs11._sessions import Channel, Lost, Pool
from keymgmt_pkcs11._settings import Pkcs11Settings
from keymgmt_pkcs11._signing import can_sign, sign
from keymgmt_pkcs11._use import allowed, choose, purpose_of, round_trip

if TYPE_CHECKING:
    from keymgmt_pkcs11._mechanisms import Wrapping

__all__ = ["Pkcs11Provider"]

R = TypeVar("R")
GENERATION_LIMIT: Final = 120.0
"""Seconds that making a key may take where the time limit is shorter: RSA takes long."""


class Pkcs11Provider(
    KeyProvider[Pkcs11Settings], SupportsKeyManagement, SupportsOfflineRecipients, SupportsSigning
):
    """Keys in an HSM or token that has a PKCS#11 module.

    Example::

        [providers.hsm]
        backend = "pkcs11"
        module = "/usr/lib/softhsm/libsofthsm2.so"
        token = "Model Keys"
        pin = { file = "hsm.pin" }

        [providers.hsm.keys]
        resnet50 = { label = "Model KEK 2026" }

    Keys are made in the token, sensitive and never extractable; every use of them happens there.
    A key named ``K`` is the objects with CKA_LABEL ``K``, or what the table ``keys`` says; each of
    its versions has a CKA_ID, and the version is that CKA_ID in hex.

    Kinds: ``aes256`` (AES-GCM with the context as additional data, the best where it is there),
    ``aes256-kw``, ``ecdh-p256``, ``ecdh-p384`` and ``rsa-oaep`` wrap; ``ecdsa-p256``,
    ``ecdsa-p384`` and ``rsa-pss`` sign. RSA kinds take the option ``bits``. EC and RSA keys that
    wrap export recipient files. What a module lists is not what it does, so a mechanism is used to
    wrap after it survived a round trip.

    Rotation adds a version. A retired version has its usages switched off in the token, where the
    token lets them; whoever has the PIN can switch them on again. Destroying the object is final,
    and is done with the vendor's tool.

    The PIN is read when it is needed and wiped; a wrong one is tried once.
    """

    backend: ClassVar[str] = "pkcs11"
    Settings: ClassVar[type[Pkcs11Settings]] = Pkcs11Settings
    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]] = {
        kind.name: kind.purpose for kind in KINDS.values()
    }

    def __init__(self, name: str, settings: Pkcs11Settings) -> None:
        super().__init__(name, settings)
        # By process: a forked child makes its own, and never touches its parent's.
        self._pools: dict[int, Pool] = {}
        self._finalizer = weakref.finalize(self, _close_pools, self._pools)

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; the newest version, by the first mechanism that works with it."""
        check_key(key)

        def call(channel: Channel) -> WrappedKey:
            item = self.versions(channel, key).newest
            mechanism, code = choose(channel, item, self.settings, key)
            blob = mechanism.wrap(Use(channel, item, code), dek, context)
            params = {"pk": public_key_id(_public_bytes(item))} if item.public else {}
            return WrappedKey(self.backend, key, item.version, mechanism.name, blob, params)

        return self.run(f"wrapping with {key!r}", call)

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider."""
        if wrapped.backend != self.backend:
            raise WrongKey(f"{wrapped} is of another backend")
        check_key(wrapped.key)

        def call(channel: Channel) -> Dek:
            item, fits = self._holding(channel, wrapped)
            if wrapped.mechanism not in fits:
                raise self._refused(wrapped, item)
            if wrapped.params != (
                {"pk": public_key_id(_public_bytes(item))} if item.public else {}
            ):
                raise WrongKey(f"{wrapped} was made for another key of this name and version")
            mechanism, code = fits[wrapped.mechanism]
            try:
                return mechanism.unwrap(Use(channel, item, code), wrapped.blob, context)
            except (PKCS11Error, CkError) as error:
                raise self._explain(channel, wrapped, item, mechanism, code, error) from error

        return self.run(f"unwrapping with {wrapped.key!r}", call)

    def _holding(
        self, channel: Channel, wrapped: WrappedKey
    ) -> tuple[KeyObject, dict[str, tuple[Wrapping, int]]]:
        """The key object of a version and its mechanisms, remembered for this connection."""
        place = (wrapped.key, wrapped.version)
        found = channel.cache.get(place)
        if found is None:
            try:
                item = self.versions(channel, wrapped.key).get(wrapped.version)
            except KeyNotFound as error:
                raise WrongKey(str(error), hint=error.hint) from error
            if item is None:
                raise WrongKey(
                    f"the key {wrapped.key!r} of {self.name!r} has no version {wrapped.version}",
                    hint="see its versions: keymgmt keys show",
                )
            if item.retired:
                raise _retired(wrapped.key, item)
            found = (item, allowed(channel, item, self.settings, wrapped.key))
            channel.cache[place] = found
        return found

    def _refused(self, wrapped: WrappedKey, item: KeyObject) -> UnsupportedOperation:
        sha1 = wrapped.mechanism == "RSA-OAEP" and item.type == "RSA"
        return UnsupportedOperation(
            f"{item} is not used with the mechanism {wrapped.mechanism!r}",
            hint="allow it with allow_oaep_sha1 = true" if sha1 else None,
        )

    def _explain(
        self,
        channel: Channel,
        wrapped: WrappedKey,
        item: KeyObject,
        mechanism: Wrapping,
        code: int,
        error: BaseException,
    ) -> BaseException:
        """What a failed unwrap means; one return code has several meanings on most modules."""
        name = reason(error)
        if name in LOST:
            return error
        place = (wrapped.key, wrapped.version)
        if name in GONE:
            # Gone from under us: destroyed, or the whole token is. Look from the ground up.
            channel.cache.pop(place, None)
            return Lost(name)
        failed = UnwrapFailed(
            f"{wrapped} of {self.name!r} does not authenticate",
            hint="it was damaged, bound to another model, or made by another key of this name",
        )
        if name in TAMPERED:
            return failed
        if name == "KeyFunctionNotPermitted":
            channel.cache.pop(place, None)
            return _retired(wrapped.key, item)
        # A fresh wrap of our own tells a tampered blob from a token in trouble.
        try:
            round_trip(channel, item, mechanism, code)
        except UnwrapFailed:
            return error
        except (PKCS11Error, CkError) as other:
            if reason(other) in LOST | GONE or name in ("GeneralError", "DeviceError"):
                channel.cache.pop(place, None)
                return Lost(name)
            return error
        return failed

    def export_recipient(self, key: str) -> Recipient:
        """See SupportsOfflineRecipients; EC keys, and RSA keys that do OAEP with SHA-256."""
        check_key(key)

        def call(channel: Channel) -> Recipient:
            item = self.versions(channel, key).newest
            fits = allowed(channel, item, self.settings, key)
            kind = next((name for name in fits if name in (*HPKE_KINDS, RSA_OAEP_256)), None)
            if kind is None:
                raise UnsupportedOperation(
                    f"{item} is no key that others can wrap to with its public part",
                    hint="make one: keymgmt keys create --kind ecdh-p256",
                )
            mechanism, code = fits[kind]
            round_trip(channel, item, mechanism, code)
            attributes = {
                "kind": item.type.lower() + str(item.bits),
                "token": _ascii(channel.token.label),
                "serial": _ascii(channel.token.serial.decode("ascii", "replace")),
                "model": _ascii(channel.token.model),
                "manufacturer": _ascii(channel.token.manufacturer_id),
                "attributes": " ".join(sorted(item.flags)),
            }
            return Recipient(kind, self.backend, key, item.version, _public_bytes(item), attributes)

        return self.run(f"exporting {key!r}", call)

    def public_key(self, key: str) -> bytes:
        """See SupportsSigning."""
        check_key(key)
        return self.run(f"reading {key!r}", lambda channel: self._signing(channel, key).spki)

    def sign(self, key: str, message: bytes) -> Signature:
        """See SupportsSigning; the token is given a digest, the signature is verified here."""
        check_key(key)

        def call(channel: Channel) -> Signature:
            item = self._signing(channel, key)
            return Signature(sign(channel, item, message), item.spki)

        return self.run(f"signing with {key!r}", call)

    def _signing(self, channel: Channel, key: str) -> KeyObject:
        item = self.versions(channel, key).newest
        if not can_sign(item):
            raise UnsupportedOperation(
                f"the key {key!r} ({item}) does not sign",
                hint="make one: keymgmt keys create --kind ecdsa-p256",
            )
        return item

    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """See SupportsKeyManagement; RSA kinds take ``bits``."""
        check_key(key)
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            raise ConfigError(
                f"the backend pkcs11 makes no key of kind {kind!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(KINDS)}",
            )
        bits = bits_of(KINDS[kind], options)
        entry = self._unpinned(key)

        def call(channel: Channel) -> KeyInfo:
            try:
                find_versions(channel, key, entry)
            except KeyNotFound:
                pass
            else:
                raise ConfigError(
                    f"there is a key {key!r} already in the token {channel.token.label!r}",
                    hint=f"a new version of it: keymgmt keys rotate {self.name}:{key}",
                )
            self._generate(channel, key, KINDS[kind], bits, 1)
            return self._info(channel, self.versions(channel, key))

        return self.run(f"creating {key!r}", call, changes=True)

    def _generate(self, channel: Channel, key: str, kind: Any, bits: int, counter: int) -> None:
        made = generate(channel, kind, bits, self._unpinned(key), new_id(counter), key)
        try:
            if kind.purpose == "wrap":
                choose(channel, made, self.settings, key)
            else:
                sign(channel, made, b"keymgmt check")
        except BaseException:
            destroy(channel, tuple(self._halves(channel, made)))
            raise

    def list_keys(self) -> list[KeyInfo]:
        """See SupportsKeyManagement; keys whose label is no name of ours are left out."""

        def call(channel: Channel) -> list[KeyInfo]:
            found: dict[str, list[KeyObject]] = {}
            for item in all_keys(channel):
                name = self.settings.name_of(item.label, item.id)
                if name is not None and item.type in ("AES", "RSA", "EC"):
                    found.setdefault(name, []).append(item)
            return [
                self._info(channel, Versions(name, tuple(found[name]))) for name in sorted(found)
            ]

        return self.run("listing the keys", call)

    def describe_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        check_key(key)
        return self.run(
            f"reading {key!r}",
            lambda channel: self._info(channel, self.versions(channel, key)),
        )

    def rotate_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement; the new version is of the kind and size of the newest."""
        check_key(key)

        def call(channel: Channel) -> KeyInfo:
            newest = self.versions(channel, key).newest
            kind = kind_of(newest)
            if kind is None:
                raise UnsupportedOperation(f"{newest} is of no kind that is made here")
            self._unpinned(key)
            self._generate(channel, key, kind, newest.bits, newest.counter + 1)
            return self._info(channel, self.versions(channel, key))

        return self.run(f"rotating {key!r}", call, changes=True)

    def retire_version(self, key: str, version: str) -> KeyInfo:
        """See SupportsKeyManagement; its usages are switched off in the token."""
        check_key(key)

        def call(channel: Channel) -> KeyInfo:
            versions = self.versions(channel, key)
            item = versions.get(version)
            if item is None:
                raise KeyNotFound(
                    f"the key {key!r} has no version {version[:80]!r}",
                    hint=f"versions: {', '.join(v.version for v in versions.objects)}",
                )
            if item.version == versions.newest.version:
                raise ConfigError(
                    f"version {version} of the key {key!r} is its newest and in use",
                    hint=f"first: keymgmt keys rotate {self.name}:{key}",
                )
            for half in self._halves(channel, item):
                usages = read_attributes(channel, half, _SWITCHED_OFF)
                for usage in (usage for usage, may in usages.items() if may):
                    channel.ck.change(channel.handle, half, {usage: False})
            channel.cache.pop((key, version), None)
            again = self.versions(channel, key)
            left = again.get(version)
            if left is not None and not left.retired:
                raise UnsupportedOperation(
                    f"the token does not let {item} be switched off",
                    hint="destroy it with the vendor's tool when nothing needs it any more",
                )
            return self._info(channel, again)

        return self.run(f"retiring {key!r}", call, changes=True)

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider; without ``key``, every key of the token is looked at."""
        return examine(self, key)

    def close(self) -> None:
        """Close every session of this process; the next call opens new ones."""
        _close_pools(self._pools)

    def run(self, doing: str, call: Callable[[Channel], R], *, changes: bool = False) -> R:
        """Run ``call`` with a session of this process; for this package only."""
        if changes and self.settings.read_only:
            raise UnsupportedOperation(
                f"{doing}: this provider is read-only", hint="set read_only = false"
            )
        limit = max(self.settings.timeout, GENERATION_LIMIT) if changes else None
        return self._pool().run(doing, call, retry=not changes, limit=limit)

    @property
    def sessions(self) -> tuple[int, int]:
        """How many sessions this process has open here, and how many it may."""
        return self._pool().sessions

    def _pool(self) -> Pool:
        pid = os.getpid()
        pool = self._pools.get(pid)
        if pool is None:
            # setdefault is atomic: of two threads that come first, one pool is used.
            pool = self._pools.setdefault(pid, Pool(self.settings))
        return pool

    def versions(self, channel: Channel, key: str) -> Versions:
        """The versions of a key; for this package only."""
        return find_versions(channel, key, self.settings.entry(key))

    def _unpinned(self, key: str) -> Any:
        entry = self.settings.entry(key)
        if entry.id is not None:
            raise ConfigError(
                f"the key {key!r} is pinned to the id {entry.id} by the config",
                hint="name it by its label to give it versions",
            )
        return entry

    def _info(self, channel: Channel, versions: Versions) -> KeyInfo:
        last = versions.objects[-1]
        kind = kind_of(last)
        detail = {
            "label": last.label,
            "token": channel.token.label,
            "mechanisms": " ".join(allowed(channel, last, self.settings, versions.key)),
            "attributes": " ".join(sorted(last.flags)),
        }
        return KeyInfo(
            versions.key,
            purpose_of(last),
            kind.name if kind else f"{last.type.lower()}{last.bits or ''}",
            versions.listed(),
            {name: value for name, value in detail.items() if value},
        )

    def _halves(self, channel: Channel, item: KeyObject) -> list[int]:
        """The key and, beside a private one, its public one."""
        name: dict[int, bool | bytes] = {
            Attribute.TOKEN: True,
            Attribute.LABEL: item.label.encode(),
            Attribute.ID: item.id,
        }
        classes = (ObjectClass.SECRET_KEY, ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY)
        return [
            handle
            for kind in classes
            for handle in channel.ck.find(channel.handle, {Attribute.CLASS: int(kind), **name})
        ]


_SWITCHED_OFF: Final = (
    *(Attribute.ENCRYPT, Attribute.DECRYPT, Attribute.WRAP, Attribute.UNWRAP),
    *(Attribute.SIGN, Attribute.VERIFY, Attribute.DERIVE),
)


def _public_bytes(item: KeyObject) -> bytes:
    """As recipients of its kind have it: the point of an EC key, SubjectPublicKeyInfo of RSA."""
    return item.point or item.spki


def _retired(key: str, item: KeyObject) -> KeyRetired:
    return KeyRetired(
        f"version {item.version} of the key {key!r} was retired: its attributes permit no use",
        hint="rewrap the model where another group opens it",
    )


def _ascii(text: str | bytes) -> str:
    words = text.decode("ascii", "replace") if isinstance(text, bytes) else text
    return words.strip("\0 ").encode("ascii", "replace").decode()


def _close_pools(pools: dict[int, Pool]) -> None:
    # Only what is there now: a thread that calls meanwhile makes a new one.
    for pid in list(pools):
        pool = pools.pop(pid, None)
        # A parent's is only forgotten: its locks may be held by threads that are not here.
        if pool is not None and pid == os.getpid():
            pool.close()
