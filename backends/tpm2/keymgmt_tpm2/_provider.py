"""Tpm2Provider: wrap with the public part of a key, unwrap and sign with the TPM that holds it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from keymgmt.backend import (
    RSA_OAEP_256,
    ConfigError,
    Dek,
    Health,
    KeyInfo,
    KeyNotFound,
    KeyProvider,
    KeyRetired,
    ProviderUnavailable,
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
    hpke_split,
    inner_unwrap,
    open_with_ecdh,
    public_key_id,
    wipe,
    wrap_for,
)
from keymgmt_tpm2 import _approval
from keymgmt_tpm2._errors import FAILURE, VALUE, TpmError
from keymgmt_tpm2._keys import KeyDirectory, TpmKey, TpmKeyVersion
from keymgmt_tpm2._options import KeyOptions
from keymgmt_tpm2._policy import PcrState, Policy
from keymgmt_tpm2._service import CREATE_SECONDS, Service
from keymgmt_tpm2._settings import Tpm2Settings
from keymgmt_tpm2._structures import describe_attributes, sha256
from keymgmt_tpm2._templates import KINDS, key_template, problem_with

if TYPE_CHECKING:
    from typing import Any

    from keymgmt_tpm2._tpm import Tpm

__all__ = ["Tpm2Provider"]

_MECHANISMS: Final = {"ecc-p256": "hpke-p256", "rsa-2048": RSA_OAEP_256}
_RSA_BYTES: Final = 256
_SIZE: Final = 0x095


class Tpm2Provider(
    KeyProvider[Tpm2Settings],
    SupportsKeyManagement,
    SupportsSigning,
    SupportsOfflineRecipients,
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
                          ``keymgmt tpm policy``; ``ref=TEXT`` narrows it to approvals of that ref;
    ``pin=yes``           also asks for the PIN of the config; wrong ones count towards a lockout.

    A key without a policy opens for whoever may use this TPM. Whoever can use the machine as the
    user that opens models can open them too: a TPM binds to a device and a state, not to a person.
    """

    backend: ClassVar[str] = "tpm2"
    Settings: ClassVar[type[Tpm2Settings]] = Tpm2Settings
    key_kinds: ClassVar[Mapping[str, Literal["wrap", "sign"]]] = KINDS

    def __init__(self, name: str, settings: Tpm2Settings) -> None:
        super().__init__(name, settings)
        self._keys = KeyDirectory(settings.keys, name)
        self.service = Service(name, settings, self._keys)

    def wrap(self, key: str, dek: Dek, context: bytes) -> WrappedKey:
        """See KeyProvider; it needs no TPM."""
        return wrap_for(self._recipient(self._find(key, "wrap")), dek, context)

    def unwrap(self, wrapped: WrappedKey, context: bytes) -> Dek:
        """See KeyProvider."""
        key, version = self._holding(wrapped)
        if key.kind == "rsa-2048":
            return inner_unwrap(
                wrapped.blob, context, lambda blob: self._unwrap_rsa(key, version, blob)
            )
        enc, ciphertext = hpke_split(wrapped.mechanism, wrapped.blob)
        z: bytearray = self._use(key, version, lambda tpm, h, s: tpm.ecdh(h, enc, s))
        try:
            return open_with_ecdh(
                wrapped.mechanism, z, enc, version.public_key(), ciphertext, context
            )
        finally:
            wipe(z)

    def _unwrap_rsa(self, key: TpmKey, version: TpmKeyVersion, blob: bytes) -> Dek:
        if len(blob) != _RSA_BYTES:
            raise UnwrapFailed("the wrapped key has not the length of its kind")

        def decrypt(tpm: Tpm, handle: Any, session: Any) -> bytearray | None:
            try:
                return tpm.rsa_decrypt(handle, blob, session)
            except TpmError as error:
                # Bad padding is a value on a chip and a failure on libtpms, which goes on working.
                if error.code in (FAILURE, VALUE, _SIZE):
                    return None
                raise

        plain: bytearray | None = self._use(key, version, decrypt)
        try:
            return Dek(plain or b"")
        except ValueError as error:
            raise UnwrapFailed("the wrapped key does not authenticate") from error
        finally:
            wipe(plain or bytearray())

    def public_key(self, key: str) -> bytes:
        """See SupportsSigning; it needs no TPM."""
        return self._find(key, "sign").newest.public.der()

    def sign(self, key: str, message: bytes) -> Signature:
        """See SupportsSigning; ECDSA P-256 with SHA-256."""
        found = self._find(key, "sign")
        version, digest = found.newest, sha256(message)
        r, s = self._use(found, version, lambda tpm, h, session: tpm.sign(h, digest, session))
        return Signature(encode_dss_signature(r, s), version.public.der())

    def _use(self, key: TpmKey, version: TpmKeyVersion, use: Any) -> Any:
        """Load a version, satisfy its policy and call ``use(tpm, handle, session)``."""
        what = f"the key {key.key!r}"
        approvals = _approval.installed(self._keys.path) if version.policy.approver else []

        def operation(tpm: Tpm, pin: bytearray | None) -> Any:
            from keymgmt_tpm2._authorize import authorize

            session = authorize(tpm, version.policy, approvals, what)
            handle = tpm.load(version.public, version.private)
            if pin is not None:
                tpm.set_auth(handle, pin)
            return use(tpm, handle, session)

        doing = f"{self.name}:{key.key}@{version.version}"
        if not version.policy.pin:
            return self.service.run(doing, lambda tpm: operation(tpm, None))
        with self.service.pin(key.key) as pin:
            return self.service.run(doing, lambda tpm: operation(tpm, pin))

    def export_recipient(self, key: str) -> Recipient:
        """See SupportsOfflineRecipients; it needs no TPM."""
        return self._recipient(self._find(key, "wrap"))

    def _recipient(self, key: TpmKey) -> Recipient:
        version = key.newest
        return Recipient(
            _MECHANISMS[key.kind],
            self.backend,
            key.key,
            version.version,
            version.public_key(),
            {
                "tpm_name": version.public.name.hex(),
                "tpm_attributes": describe_attributes(version.public.attributes),
                "policy": str(version.policy),
            },
        )

    def create_key(self, key: str, kind: str, options: Mapping[str, str]) -> KeyInfo:
        """See SupportsKeyManagement; the options are those of the class."""
        check_key(key)
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            raise ConfigError(
                f"the backend tpm2 makes no key of kind {kind!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(KINDS)}",
            )
        wanted = KeyOptions.parse(options)
        self._refuse_existing(key)
        private, public, policy = self._make(key, kind, wanted)
        with self._keys.changing(self.settings.timeout):
            self._refuse_existing(key)
            made = TpmKey(key, kind, ()).with_version(private, public, policy)
            self._keys.write(made)
        return made.info()

    def _refuse_existing(self, key: str) -> None:
        if key in self._keys.names():
            raise ConfigError(
                f"there is a key {key!r} already in {self._keys.path}",
                hint=f"a new version of it: keymgmt keys rotate {self.name}:{key}",
            )

    def _make(self, key: str, kind: str, wanted: KeyOptions) -> tuple[bytes, Any, Policy]:
        def operation(tpm: Tpm, pin: bytearray) -> tuple[bytes, Any, Policy]:
            policy = wanted.policy(tpm.pcrs)
            private, public = tpm.create(key_template(kind, policy), pin)
            if problem := problem_with(public, kind, policy):
                raise ProviderUnavailable(f"the TPM made another key than was asked for: {problem}")
            tpm.load(public, private)  # a key that cannot be loaded again is not kept
            return private, public, policy

        doing = f"making {self.name}:{key}"
        seconds = max(self.settings.timeout, CREATE_SECONDS)
        if not wanted.pin:
            return self.service.run(doing, lambda tpm: operation(tpm, bytearray()), seconds=seconds)
        with self.service.pin(key) as pin:
            return self.service.run(doing, lambda tpm: operation(tpm, pin), seconds=seconds)

    def list_keys(self) -> list[KeyInfo]:
        """See SupportsKeyManagement."""
        return [self._keys.read(key).info() for key in self._keys.names()]

    def describe_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement; the policy is in words."""
        return self._find(key).info()

    def rotate_key(self, key: str) -> KeyInfo:
        """See SupportsKeyManagement; the same policy, PCR values as they are now."""
        old = self._find(key)
        wanted = KeyOptions.of(old.newest.policy)
        private, public, policy = self._make(key, old.kind, wanted)
        with self._keys.changing(self.settings.timeout):
            rotated = self._find(key).with_version(private, public, policy)
            self._keys.write(rotated)
        return rotated.info()

    def retire_version(self, key: str, version: str) -> KeyInfo:
        """See SupportsKeyManagement; retiring a retired version changes nothing."""
        self._find(key)
        with self._keys.changing(self.settings.timeout):
            found = self._find(key)
            if found.find(version) is None:
                raise KeyNotFound(
                    f"the key {key!r} has no version {version!r}",
                    hint=f"versions: {', '.join(v.version for v in found.versions)}",
                )
            if version == found.newest.version:
                raise ConfigError(
                    f"version {version} of the key {key!r} is its newest and in use",
                    hint=f"first: keymgmt keys rotate {self.name}:{key}",
                )
            found = found.with_retired(version)
            self._keys.write(found)
        return found.info()

    def check(self, key: str | None = None) -> Health:
        """See KeyProvider: the TPM, its root key, its lockout, its slots, and what opens now."""
        from keymgmt_tpm2._doctor import examine

        return examine(self, key)

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
        return self._keys.path

    @property
    def keys(self) -> KeyDirectory:
        """The key directory, for the commands."""
        return self._keys

    def _find(self, key: str, purpose: str | None = None) -> TpmKey:
        try:
            found = self._keys.read(check_key(key))
        except KeyNotFound as error:
            near = difflib.get_close_matches(key, self._keys.names(), n=1)
            if near:
                error.hint = f"did you mean {self.name}:{near[0]}?"
            raise
        if purpose not in (None, found.purpose):
            raise UnsupportedOperation(
                f"the key {key!r} is {found.kind}, which does not {purpose}",
                hint="a key has one purpose; make another one for this",
            )
        return found

    def _holding(self, wrapped: WrappedKey) -> tuple[TpmKey, TpmKeyVersion]:
        if wrapped.backend != self.backend:
            raise WrongKey(f"{wrapped} is of another backend")
        try:
            key = self._find(wrapped.key, "wrap")
        except KeyNotFound as error:
            raise WrongKey(str(error), hint=error.hint) from error
        version = key.find(wrapped.version)
        if version is None:
            raise WrongKey(
                f"the key {wrapped.key!r} of {self.name!r} has no version {wrapped.version}"
            )
        if version.retired:
            raise KeyRetired(
                f"version {wrapped.version} of the key {wrapped.key!r} was retired",
                hint="rewrap the model where another group opens it",
            )
        if wrapped.mechanism != _MECHANISMS[key.kind]:
            raise UnsupportedOperation(
                f"the key {wrapped.key!r} is {key.kind} and unwraps no {wrapped.mechanism}"
            )
        if set(wrapped.params) != {"pk"}:
            raise UnwrapFailed(f"what was wrapped by {wrapped} is malformed")
        if wrapped.params["pk"] != public_key_id(version.public_key()):
            raise WrongKey(
                f"{wrapped} was sealed to another key of that name",
                hint="each device has its own; seal to the recipient file of this one too",
            )
        return key, version
