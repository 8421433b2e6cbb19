"""Pkcs11Provider: wrap, unwrap, sign and look after keys in an HSM or token."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Final, Literal, TypeVar

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
    SupportsKeyDeletion,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    check_backend,
    check_key,
    check_kind,
    check_retirable,
    key_exists,
    no_version,
    not_held,
    version_retired,
)
from keymgmt_pkcs11._checks import examine
from keymgmt_pkcs11._choice import allowed, choose, require_promises, round_trip
from keymgmt_pkcs11._connection import Connection, Session
from keymgmt_pkcs11._create import destroy, generate
from keymgmt_pkcs11._errors import CkError, Ckr
from keymgmt_pkcs11._keys import (
    KeyObject,
    Versions,
    all_keys,
    by_name,
    find_halves,
    find_versions,
    new_id,
    switch_off,
)
from keymgmt_pkcs11._kinds import KINDS, Kind, bits_of, kind_of, purpose_of
from keymgmt_pkcs11._settings import Pkcs11Settings
from keymgmt_pkcs11._signing import require_signing, sign
from keymgmt_pkcs11._wrapping import KeyInUse

if TYPE_CHECKING:
    from keymgmt_pkcs11._wrapping import Wrapping

T = TypeVar("T")

__all__ = ["GENERATION_LIMIT", "Pkcs11Provider"]

GENERATION_LIMIT: Final = 120.0
"""Seconds that creating a key may take, also where ``timeout`` is shorter: RSA takes long."""


class Pkcs11Provider(
    KeyProvider[Pkcs11Settings],
    SupportsKeyManagement,
    SupportsKeyDeletion,
    SupportsOfflineRecipients,
    SupportsSigning,
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

    Keys are generated in the token, sensitive and never extractable; every use of them happens
    there. A key named ``K`` is the objects with CKA_LABEL ``K``, or with the label and id that the
    table ``keys`` gives; each of its versions has a CKA_ID, and the version is that CKA_ID in hex.

    Kinds: ``aes256`` (AES-GCM with the context as additional data, the best where the token has
    it), ``aes256-kw``, ``ecdh-p256``, ``ecdh-p384`` and ``rsa-oaep`` wrap; ``ecdsa-p256``,
    ``ecdsa-p384`` and ``rsa-pss`` sign. RSA kinds take the option ``bits``. EC and RSA keys that
    wrap export recipient files. Modules list mechanisms that they then refuse, so a mechanism wraps
    only after a round trip with it succeeded.

    Rotation adds a version. The usages of a retired version are switched off in the token, if the
    token permits that; whoever has the PIN can switch them on again. Deleting a key destroys the
    objects of all its versions, which is final.

    The PIN is read when it is needed and wiped; a PIN that was not accepted is sent only once.

    Attributes:
        connection: the sessions of this process, for the commands of this package.
    """

    backend: ClassVar[str] = "pkcs11"
    Settings: ClassVar[type[Pkcs11Settings]] = Pkcs11Settings
    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]] = {
        kind.name: kind.purpose for kind in KINDS.values()
    }

    def __init__(self, name: str, settings: Pkcs11Settings) -> None:
        super().__init__(name, settings)
        self.connection = Connection(settings)
        self._finalizer = weakref.finalize(self, self.connection.close)

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; wraps with the newest version and the first mechanism that works."""

        def call(session: Session, versions: Versions) -> WrappedKey:
            key_object = versions.newest
            mechanism = choose(session, key_object, key)
            blob = mechanism.wrap(KeyInUse(session, key_object), dek, context)
            return WrappedKey(
                self.backend, key, key_object.version, mechanism.name, blob, key_object.params
            )

        return self._with("wrapping with", key, call)

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider."""
        check_backend(wrapped, self.backend)

        def call(session: Session) -> Dek:
            key_object, fits = self._holding(session, wrapped)
            if wrapped.mechanism not in fits:
                sha1 = wrapped.mechanism == "RSA-OAEP" and key_object.type == "RSA"
                raise UnsupportedOperation(
                    f"{key_object} is not used with the mechanism {wrapped.mechanism!r}",
                    hint="allow it with allow_oaep_sha1 = true" if sha1 else None,
                )
            if wrapped.params != key_object.params:
                raise WrongKey(f"{wrapped} is for another key of this name and version")
            mechanism, use = fits[wrapped.mechanism], KeyInUse(session, key_object)
            try:
                return mechanism.unwrap(use, wrapped.blob, context)
            except CkError as error:
                return self._after_failure(use, mechanism, wrapped, context, error)

        return self.connection.run(f"unwrapping with {wrapped.key!r}", call)

    def _holding(
        self, session: Session, wrapped: WrappedKey
    ) -> tuple[KeyObject, dict[str, Wrapping]]:
        """The key object of a version and its mechanisms, remembered for this connection."""
        version = (wrapped.key, wrapped.version)
        held = session.cache.get(version)
        if held is None:
            try:
                key_object = find_versions(session, wrapped.key).get(wrapped.version)
            except KeyNotFound as error:
                raise WrongKey(str(error), hint=error.hint) from error
            if key_object is None:
                raise not_held(wrapped, self.name)
            if key_object.retired:
                raise _retired(wrapped.key, key_object)
            held = (key_object, allowed(session, key_object, wrapped.key))
            session.cache[version] = held
        return held

    def _after_failure(
        self,
        use: KeyInUse,
        mechanism: Wrapping,
        wrapped: WrappedKey,
        context: bytes,
        error: CkError,
    ) -> Dek:
        """Unwrap again after ``error``, or raise the error that it means.

        On most modules one return code has several meanings. So the same unwrap is tried in a new
        session, and then a round trip tells whether the key still works: if it does, the fault is
        in the blob.
        """
        if error.lost or error.code == Ckr.KEY_FUNCTION_NOT_PERMITTED:
            use.session.cache.pop((wrapped.key, wrapped.version), None)
        if error.lost:
            raise error
        if error.code == Ckr.KEY_FUNCTION_NOT_PERMITTED:
            raise _retired(wrapped.key, use.key) from error
        if not error.damaged:
            use.session.renew()
            try:
                return mechanism.unwrap(use, wrapped.blob, context)
            except CkError as second:
                error = second
            if not error.damaged:
                use.session.renew()
                if not mechanism.wraps(use.key):
                    raise error
                round_trip(use.session, use.key, mechanism)
        raise UnwrapFailed(
            f"{wrapped} of {self.name!r} does not authenticate",
            hint="it was damaged, bound to another model, or wrapped with another key of this name",
        ) from error

    def export_recipient(self, key: str) -> Recipient:
        """See SupportsOfflineRecipients; EC keys, and RSA keys that do OAEP with SHA-256."""

        def call(session: Session, versions: Versions) -> Recipient:
            key_object = versions.newest
            require_promises(session, key_object, key)
            fits = allowed(session, key_object, key)
            kind = next((name for name in fits if name in (*HPKE_KINDS, RSA_OAEP_256)), None)
            if kind is None:
                raise UnsupportedOperation(
                    f"{key_object} has no public key that others can wrap to",
                    hint="make one: keymgmt keys create PROVIDER:KEY --kind ecdh-p256",
                )
            round_trip(session, key_object, fits[kind])
            token = session.token
            attributes = {
                "kind": key_object.type.lower() + str(key_object.bits),
                "token": token.label,
                "serial": token.serial,
                "model": token.model,
                "manufacturer": token.manufacturer,
                "attributes": " ".join(sorted(key_object.flags)),
            }
            attributes = {
                name: text.encode("ascii", "replace").decode() for name, text in attributes.items()
            }
            return Recipient(
                kind, self.backend, key, key_object.version, key_object.public_bytes, attributes
            )

        return self._with("exporting", key, call)

    def public_key(self, key: str, version: str | None = None) -> bytes:
        """See SupportsSigning."""
        return self._with("reading", key, lambda _, versions: _signing(versions, version).der)

    def sign(self, key: str, message: bytes) -> Signature:
        """See SupportsSigning; the token signs a digest, and the signature is verified here."""

        def call(session: Session, versions: Versions) -> Signature:
            key_object = _signing(versions)
            return Signature(sign(session, key_object, message), key_object.der)

        return self._with("signing with", key, call)

    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """See SupportsKeyManagement; RSA kinds take ``bits``."""
        check_key(key)
        check_kind(kind, KINDS, "pkcs11")
        bits = bits_of(KINDS[kind], options)
        entry = self.settings.entry(key)

        def call(session: Session) -> KeyInfo:
            try:
                find_versions(session, key)
            except KeyNotFound:
                pass
            else:
                raise key_exists(key, f"the token {session.token.label!r}", self.name)
            identifier = entry.ids[0] if entry.ids else new_id(1)
            return self._generate(session, key, KINDS[kind], bits, identifier)

        return self._change(f"creating {key!r}", call)

    def _generate(
        self, session: Session, key: str, kind: Kind, bits: int, identifier: bytes
    ) -> KeyInfo:
        key_object = generate(session, kind, bits, identifier, key)
        try:
            if kind.purpose == "wrap":
                choose(session, key_object, key)
            else:
                sign(session, key_object, b"keymgmt check")
        except BaseException:
            destroy(session, tuple(find_halves(session, key_object)))
            raise
        return self._info(session, find_versions(session, key))

    def list_keys(self) -> list[KeyInfo]:
        """See SupportsKeyManagement; keys whose label is not a key name are left out."""

        def call(session: Session) -> list[KeyInfo]:
            keys, _ = by_name(all_keys(session)[0], self.settings)
            return [self._info(session, keys[name]) for name in sorted(keys)]

        return self.connection.run("listing the keys", call)

    def describe_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement."""
        return self._with("reading", key, self._info)

    def rotate_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement; the new version is of the kind and size of the newest."""

        def call(session: Session, versions: Versions) -> KeyInfo:
            newest = versions.newest
            kind = kind_of(newest)
            if kind is None:
                raise UnsupportedOperation(f"{newest} is of no kind that keymgmt can create")
            identifier = new_id(newest.counter + 1)
            if ids := self.settings.entry(key).ids:
                used = [key_object.id for key_object in versions.objects]
                identifier = next((each for each in ids if each not in used), b"")
                if not identifier:
                    listed = ", ".join(f'"{each.hex()}"' for each in ids)
                    raise ConfigError(
                        f"the key {key!r} is pinned by the config to ids that are all in use",
                        hint=f"add the id of the next version: id = [{listed}, ...], or name it "
                        "by its label alone",
                    )
            return self._generate(session, key, kind, newest.bits, identifier)

        return self._with("rotating", key, call, changes=True)

    def retire_version(self, key: str, version: str) -> KeyInfo:
        """See SupportsKeyManagement; switches the version's usages off in the token."""

        def call(session: Session, versions: Versions) -> KeyInfo:
            check_retirable(key, version, [v.version for v in versions.objects], self.name)
            key_object = versions.get(version)
            assert key_object is not None  # noqa: S101 - check_retirable saw it
            return self._restrict(session, key, key_object, None)

        return self._with("retiring", key, call, changes=True)

    def delete_key(self, key: str) -> None:
        """See SupportsKeyDeletion; the objects of every version are destroyed."""

        def call(session: Session, versions: Versions) -> None:
            for key_object in versions.objects:
                for handle in find_halves(session, key_object):
                    session.ck.destroy(session.handle, handle)
            session.cache.clear()

        self._with("deleting", key, call, changes=True)

    def restrict_key(self, key: str, kind: str | None = None) -> KeyInfo:
        """Switch off every usage of the newest version that its kind does not need.

        For keys of other tools, which often have every usage. keymgmt cannot undo this.

        Args:
            key: name of the key.
            kind: the kind that the key is to have; by its type and usages where it is left out.

        Raises:
            KeyNotFound: there is no such key.
            UnsupportedOperation: the key cannot be of this kind, or the token does not permit the
                change.
        """

        def call(session: Session, versions: Versions) -> KeyInfo:
            key_object = versions.newest
            wanted = KINDS.get(kind) if kind is not None else kind_of(key_object)
            if wanted is None or (wanted.type.name, wanted.bits) != (
                key_object.type,
                wanted.bits if key_object.type == "RSA" else key_object.bits,
            ):
                raise UnsupportedOperation(
                    f"{key_object} is not of the kind {kind}"
                    if kind
                    else f"{key_object} is of no kind that keymgmt knows"
                )
            return self._restrict(session, key, key_object, wanted)

        return self._with("restricting", key, call, changes=True)

    def _restrict(
        self, session: Session, key: str, key_object: KeyObject, kind: Kind | None
    ) -> KeyInfo:
        switch_off(session, key_object, kind.secret | kind.public if kind else frozenset())
        again = find_versions(session, key)
        left = again.get(key_object.version)
        if left is not None and (kind_of(left) is not kind if kind else not left.retired):
            raise UnsupportedOperation(
                f"the token does not permit to switch off usages of {key_object}",
                hint="destroy it with the vendor's tool when nothing needs it any more",
            )
        return self._info(session, again)

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider; without ``key``, the attributes of every key are examined."""
        return examine(self.name, self.connection, key)

    def close(self) -> None:
        """Close every session of this process; the next call opens a new session."""
        self.connection.close()

    def _with(
        self,
        doing: str,
        key: str,
        call: Callable[[Session, Versions], T],
        *,
        changes: bool = False,
    ) -> T:
        """Run ``call`` with a session and the versions of a key, which exists."""
        check_key(key)
        run = self._change if changes else self.connection.run
        return run(f"{doing} {key!r}", lambda session: call(session, find_versions(session, key)))

    def _change(self, operation: str, call: Callable[[Session], T]) -> T:
        if self.settings.read_only:
            raise UnsupportedOperation(
                f"{operation}: this provider is read-only", hint="set read_only = false"
            )
        limit = max(self.settings.timeout, GENERATION_LIMIT)
        return self.connection.run(operation, call, changes=True, limit=limit)

    def _info(self, session: Session, versions: Versions) -> KeyInfo:
        last = versions.objects[-1]
        kind = kind_of(last)
        detail = {
            "label": last.label,
            "token": session.token.label,
            "mechanisms": " ".join(allowed(session, last, versions.key)),
            "attributes": " ".join(sorted(last.flags)),
        }
        return KeyInfo(
            versions.key,
            purpose_of(last),
            kind.name if kind else f"{last.type.lower()}{last.bits or ''}",
            versions.listed(),
            {name: value for name, value in detail.items() if value},
        )


def _signing(versions: Versions, version: str | None = None) -> KeyObject:
    key_object = versions.newest if version is None else versions.get(version)
    if key_object is None:
        known = [each.version for each in versions.objects]
        raise no_version(versions.key, str(version), known)
    return require_signing(key_object)


def _retired(key: str, key_object: KeyObject) -> KeyRetired:
    return version_retired(key, key_object.version, "its attributes permit no use")
