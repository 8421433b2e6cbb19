"""Tpm2Provider: wraps with the public part of a key; the TPM that holds it unwraps and signs."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from keymgmt.backend import (
    Dek,
    Health,
    KeyInfo,
    KeyNotFound,
    KeyProvider,
    ProviderError,
    ProviderUnavailable,
    Recipient,
    Signature,
    SupportsAnchor,
    SupportsKeyDeletion,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
    UnsupportedOperation,
    WrappedKey,
    WrongKey,
    check_key,
    check_kind,
    check_retirable,
    key_exists,
    no_version,
    not_held,
    try_key,
    version_retired,
    wrap_for,
)
from keymgmt_tpm2._checks import examine
from keymgmt_tpm2._connection.service import CREATE_SECONDS, Service
from keymgmt_tpm2._keys import KeyDirectory, TpmKey
from keymgmt_tpm2._settings import Tpm2Settings
from keymgmt_tpm2._structures import Public, sha256
from keymgmt_tpm2._templates import KINDS, key_template, problem_with
from keymgmt_tpm2._wrapping import check_wrapped, recipient_of, unwrap_with, use_key
from keymgmt_tpm2.policy._anchor import move_anchor, read_anchor
from keymgmt_tpm2.policy._policy import PcrState, Policy
from keymgmt_tpm2.policy._stated import read_policy

if TYPE_CHECKING:
    from keymgmt_tpm2._connection.tpm import Tpm

__all__ = ["Tpm2Provider"]

log: Final = logging.getLogger("keymgmt.tpm2")


class Tpm2Provider(
    KeyProvider[Tpm2Settings],
    SupportsKeyManagement,
    SupportsKeyDeletion,
    SupportsSigning,
    SupportsOfflineRecipients,
    SupportsAnchor,
):
    """Keys of this machine's TPM 2.0, which open only here, in the boot state that they require.

    Example::

        [providers.tpm]
        backend = "tpm2"
        keys = "tpm-keys"
        tcti = "device:/dev/tpmrm0"
        srk_name = "000b..."              # keymgmt tpm setup tpm
        pins = { dev = { credential = "tpm-pin" } }

    A key is created in the TPM under its storage root key and cannot leave it (fixedTPM,
    fixedParent). The key directory holds public parts and encrypted private parts, which no other
    machine can use. Kinds: ``ecc-p256`` and, for chips without ECDH, ``rsa-2048`` wrap;
    ``ecdsa-p256`` signs.

    Wrapping is HPKE with DHKEM(P-256) (``hpke-p256``), or RSA-OAEP with SHA-256 around an InnerKey:
    it needs the public part only, so a build machine without a TPM seals to a recipient file.
    Unwrapping loads the key and makes the TPM compute one ECDH (or one RSA decryption) in a session
    that is salted to the storage root key and encrypts parameters; with ``hpke-p256`` the data key
    itself never goes over the bus. Each operation has its own connection, so nothing stays loaded
    in the TPM between operations.

    Options of ``keys create``, which together are the key's policy:

    ``pcr=[BANK:]0,2,7``  opens only while these PCRs have their present values;
    ``approver=PEM``      opens in every boot state that this ECDSA P-256 key approved, see
                          ``keymgmt tpm policy``, or whose kernel this RSA key signed, see
                          ``pcr_signatures``; ``ref=TEXT`` narrows it to approvals of that ref;
                          ``pcr`` beside it holds in every approved state;
    ``pin=yes``           also requires the PIN of the config; wrong PINs count towards a lockout.

    A key without a policy opens for whoever may use this TPM. Whoever can use the machine as the
    user that opens models can open them too: a TPM binds to a device and a state, not to a person.
    """

    backend: ClassVar[str] = "tpm2"
    Settings: ClassVar[type[Tpm2Settings]] = Tpm2Settings
    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]] = KINDS

    def __init__(self, name: str, settings: Tpm2Settings) -> None:
        super().__init__(name, settings)
        self.keys = KeyDirectory(settings.keys, name)
        self.service = Service(name, settings, self.keys)

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; needs no TPM."""
        return wrap_for(self.export_recipient(key), dek, context)

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider."""
        if wrapped.backend != self.backend:
            raise WrongKey(f"{wrapped} is of another backend")
        try:
            key = self._find(wrapped.key, "wrap")
        except KeyNotFound as error:
            self.keys.check_there()
            raise WrongKey(str(error), hint=error.hint) from error
        version = key.find(wrapped.version)
        if version is None:
            raise not_held(wrapped, self.name)
        if version.retired:
            raise version_retired(wrapped.key, wrapped.version)
        check_wrapped(wrapped, key, version)
        return unwrap_with(self.service, key, version, wrapped, context)

    def public_key(self, key: str, version: str | None = None) -> bytes:
        """See SupportsSigning; needs no TPM."""
        tpm_key = self._find(key, "sign")
        key_version = tpm_key.newest if version is None else tpm_key.find(version)
        if key_version is None:
            raise no_version(key, str(version), [each.version for each in tpm_key.versions])
        return key_version.public.der()

    def sign(self, key: str, message: bytes) -> Signature:
        """See SupportsSigning; ECDSA P-256 with SHA-256."""
        version, digest = self._find(key, "sign").newest, sha256(message)
        signature = use_key(
            self.service, key, version, lambda tpm, h, session: tpm.sign(h, digest, session)
        )
        return Signature(signature, version.public.der())

    def export_recipient(self, key: str) -> Recipient:
        """See SupportsOfflineRecipients; needs no TPM."""
        return recipient_of(self.backend, self._find(key, "wrap"))

    def holds(self, wrapped: WrappedKey) -> bool:
        """See SupportsOfflineRecipients; needs no TPM."""
        try:
            key = self._find(wrapped.key, "wrap")
            version = key.find(wrapped.version)
            if version is not None:
                check_wrapped(wrapped, key, version)
        except ProviderError:
            return False
        return version is not None

    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """See SupportsKeyManagement; the options are those of the class."""
        check_key(key)
        check_kind(kind, KINDS, "tpm2")
        self._refuse_existing(key)
        policy = read_policy(options, self.pcrs)
        private, public = self._make(key, kind, policy)
        with self.keys.changing(self.settings.timeout):
            self._refuse_existing(key)
            created = TpmKey(key, kind, ()).with_version(private, public, policy)
            self.keys.write(created)
        return created.info()

    def _refuse_existing(self, key: str) -> None:
        if key in self.keys.names():
            raise key_exists(key, self.keys.path, self.name)

    def _make(self, key: str, kind: str, policy: Policy) -> tuple[bytes, Public]:
        """The private part and the public area of a new key."""
        if weak := policy.weakness:
            log.warning("%s:%s: %s", self.name, key, weak)

        def operation(tpm: Tpm) -> tuple[bytes, Public]:
            private, public = tpm.create(key_template(kind, policy))
            if problem := problem_with(public, kind, policy):
                raise ProviderUnavailable(f"the TPM created another key than requested: {problem}")
            tpm.load(public, private)  # see that the key can be loaded again
            return private, public

        return self.service.run(
            f"making {self.name}:{key}",
            operation,
            seconds=max(self.settings.timeout, CREATE_SECONDS),
            pin_of=key if policy.pin else None,
        )

    def list_keys(self) -> list[KeyInfo]:
        """See SupportsKeyManagement."""
        return [self.keys.read(key).info() for key in self.keys.names()]

    def describe_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement; the policy is described in words."""
        return self._find(key).info()

    def rotate_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement; keeps the policy, with the present PCR values."""
        old = self._find(key)
        policy = old.newest.policy
        if policy.pcrs:
            policy = replace(policy, pcrs=self.pcrs(policy.pcrs.bank, policy.pcrs.indices))
        private, public = self._make(key, old.kind, policy)
        with self.keys.changing(self.settings.timeout):
            rotated = self._find(key).with_version(private, public, policy)
            self.keys.write(rotated)
        return rotated.info()

    def retire_version(self, key: str, version: str) -> KeyInfo:
        """See SupportsKeyManagement; retiring a retired version changes nothing."""
        self._find(key)
        with self.keys.changing(self.settings.timeout):
            tpm_key = self._find(key)
            check_retirable(key, version, [v.version for v in tpm_key.versions], self.name)
            tpm_key = tpm_key.with_retired(version)
            self.keys.write(tpm_key)
        return tpm_key.info()

    def delete_key(self, key: str) -> None:
        """See SupportsKeyDeletion; with a copy of the key directory this TPM still has the key."""
        self._find(key)
        with self.keys.changing(self.settings.timeout):
            self._find(key)
            self.keys.remove(key)

    def anchor(self) -> bytes:
        """See SupportsAnchor."""
        return read_anchor(self.service)

    def move_anchor(self, value: bytes, step: bytes) -> None:
        """See SupportsAnchor; only in the machine state that the anchor was created for."""
        move_anchor(self.service, value, step)

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider: the TPM, root key, lockout, slots, and whether each key can be used."""
        return examine(
            self.service, key, lambda name: try_key(self, name, self._find(name).purpose)
        )

    def close(self) -> None:
        """See KeyProvider; no connection is held."""
        self.service.forget()

    def pcrs(self, bank: str, indices: Collection[int]) -> PcrState:
        """Present PCR values; KeyNotFound where the TPM has no such bank."""
        return self.service.run("reading PCRs", lambda tpm: tpm.pcrs(bank, indices))

    def _find(self, key: str, purpose: str | None = None) -> TpmKey:
        try:
            tpm_key = self.keys.read(check_key(key))
        except KeyNotFound as error:
            near = difflib.get_close_matches(key, self.keys.names(), n=1)
            if near:
                error.hint = f"did you mean {self.name}:{near[0]}?"
            raise
        if purpose not in (None, tpm_key.purpose):
            raise UnsupportedOperation(
                f"the key {key!r} is {tpm_key.kind}, which does not {purpose}",
                hint="a key has one purpose; create another key for this",
            )
        return tpm_key
