"""Tpm2Provider: wrap with the public part of a key, unwrap and sign with the TPM that holds it."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

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
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    check_key,
    check_kind,
    check_retirable,
    key_exists,
    no_version,
    not_held,
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
from keymgmt_tpm2.policy._options import KeyOptions
from keymgmt_tpm2.policy._policy import PcrState, Policy, weakness

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
    """Keys that live in this machine's TPM 2.0 and open only here, in the boot state they ask for.

    Example::

        [providers.tpm]
        backend = "tpm2"
        keys = "tpm-keys"
        tcti = "device:/dev/tpmrm0"
        srk_name = "000b..."              # keymgmt tpm setup tpm
        pins = { dev = { credential = "tpm-pin" } }

    A key is made in the TPM under its storage root key and cannot leave it (fixedTPM, fixedParent).
    The key directory holds public parts and encrypted private parts, useless on any other machine.
    Kinds: ``ecc-p256`` and, for chips without ECDH, ``rsa-2048`` wrap; ``ecdsa-p256`` signs.

    Wrapping is HPKE with DHKEM(P-256) (``hpke-p256``), or RSA-OAEP with SHA-256 around an InnerKey:
    it takes the public part only, so a build machine without a TPM seals to a recipient file.
    Unwrapping loads the key and asks the TPM for one ECDH (or one RSA decryption) in a session that
    is salted to the storage root key and encrypts parameters; the data key itself is never on the
    bus with ``hpke-p256``. Each operation has its own connection, so nothing is held in the TPM
    between operations.

    Options of ``keys create``, which together are the key's policy:

    ``pcr=[BANK:]0,2,7``  opens only while these PCRs are as they are now;
    ``approver=PEM``      opens in every boot state that this ECDSA P-256 key approved, see
                          ``keymgmt tpm policy``, or whose kernel this RSA key signed, see
                          ``pcr_signatures``; ``ref=TEXT`` narrows it to approvals of that ref;
                          PCRs beside it hold whatever is approved;
    ``pin=yes``           also asks for the PIN of the config; wrong ones count towards a lockout.

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
        """See KeyProvider; it needs no TPM."""
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
        """See SupportsSigning; it needs no TPM."""
        found = self._find(key, "sign")
        wanted = found.newest if version is None else found.find(version)
        if wanted is None:
            raise no_version(key, str(version), [each.version for each in found.versions])
        return wanted.public.der()

    def sign(self, key: str, message: bytes) -> Signature:
        """See SupportsSigning; ECDSA P-256 with SHA-256."""
        found = self._find(key, "sign")
        version, digest = found.newest, sha256(message)
        r, s = use_key(
            self.service, key, version, lambda tpm, h, session: tpm.sign(h, digest, session)
        )
        return Signature(encode_dss_signature(r, s), version.public.der())

    def export_recipient(self, key: str) -> Recipient:
        """See SupportsOfflineRecipients; it needs no TPM."""
        return recipient_of(self.backend, self._find(key, "wrap"))

    def holds(self, wrapped: WrappedKey) -> bool:
        """See SupportsOfflineRecipients; it needs no TPM."""
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
        wanted = KeyOptions.parse(options)
        self._refuse_existing(key)
        private, public, policy = self._make(key, kind, wanted)
        with self.keys.changing(self.settings.timeout):
            self._refuse_existing(key)
            made = TpmKey(key, kind, ()).with_version(private, public, policy)
            self.keys.write(made)
        return made.info()

    def _refuse_existing(self, key: str) -> None:
        if key in self.keys.names():
            raise key_exists(key, self.keys.path, self.name)

    def _make(self, key: str, kind: str, wanted: KeyOptions) -> tuple[bytes, Public, Policy]:
        def operation(tpm: Tpm, pin: bytearray | None) -> tuple[bytes, Public, Policy]:
            policy = wanted.policy(tpm.pcrs)
            if policy.pcrs and (weak := weakness(policy.pcrs)):
                log.warning("%s:%s: %s", self.name, key, weak)
            private, public = tpm.create(key_template(kind, policy), pin or bytearray())
            if problem := problem_with(public, kind, policy):
                raise ProviderUnavailable(f"the TPM made another key than was asked for: {problem}")
            tpm.load(public, private)  # a key that cannot be loaded again is not kept
            return private, public, policy

        seconds = max(self.settings.timeout, CREATE_SECONDS)
        with self.service.pin(key, wanted=wanted.pin) as pin:
            return self.service.run(
                f"making {self.name}:{key}", lambda tpm: operation(tpm, pin), seconds=seconds
            )

    def list_keys(self) -> list[KeyInfo]:
        """See SupportsKeyManagement."""
        return [self.keys.read(key).info() for key in self.keys.names()]

    def describe_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement; the policy is in words."""
        return self._find(key).info()

    def rotate_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement; the same policy, PCR values as they are now."""
        old = self._find(key)
        wanted = KeyOptions.of(old.newest.policy)
        private, public, policy = self._make(key, old.kind, wanted)
        with self.keys.changing(self.settings.timeout):
            rotated = self._find(key).with_version(private, public, policy)
            self.keys.write(rotated)
        return rotated.info()

    def retire_version(self, key: str, version: str) -> KeyInfo:
        """See SupportsKeyManagement; retiring a retired version changes nothing."""
        self._find(key)
        with self.keys.changing(self.settings.timeout):
            found = self._find(key)
            check_retirable(key, version, [v.version for v in found.versions], self.name)
            found = found.with_retired(version)
            self.keys.write(found)
        return found.info()

    def delete_key(self, key: str) -> None:
        """See SupportsKeyDeletion; a copy of the key directory still has it, for this TPM."""
        self._find(key)
        with self.keys.changing(self.settings.timeout):
            self._find(key)
            self.keys.remove(key)

    def anchor(self) -> bytes:
        """See SupportsAnchor."""
        return read_anchor(self.service)

    def move_anchor(self, value: bytes, step: bytes) -> None:
        """See SupportsAnchor; in the machine state that the anchor was made for."""
        move_anchor(self.service, value, step)

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider: the TPM, its root key, its lockout, its slots, and what opens now."""
        return examine(self.service, key, self._round_trip)

    def _round_trip(self, key: str) -> None:
        if self._find(key).purpose == "sign":
            self.sign(key, b"keymgmt check")
            return
        with Dek.generate() as dek, self.unwrap(self.wrap(key, dek, b""), b"") as again:
            if dek != again:
                raise UnwrapFailed(f"the key {key!r} does not give back what it wrapped")

    def close(self) -> None:
        """See KeyProvider; no connection is held."""
        self.service.forget()

    def pcrs(self, bank: str, indices: Iterable[int]) -> PcrState:
        """Present PCR values; KeyNotFound where the TPM has no such bank."""
        wanted = tuple(indices)
        return self.service.run("reading PCRs", lambda tpm: tpm.pcrs(bank, wanted))

    @property
    def key_directory(self) -> Path:
        """Where the key files and approvals are."""
        return self.keys.path

    def _find(self, key: str, purpose: str | None = None) -> TpmKey:
        try:
            found = self.keys.read(check_key(key))
        except KeyNotFound as error:
            near = difflib.get_close_matches(key, self.keys.names(), n=1)
            if near:
                error.hint = f"did you mean {self.name}:{near[0]}?"
            raise
        if purpose not in (None, found.purpose):
            raise UnsupportedOperation(
                f"the key {key!r} is {found.kind}, which does not {purpose}",
                hint="a key has one purpose; make another one for this",
            )
        return found
