"""Using a key: load it, satisfy its policy, and run one operation of the TPM with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from keymgmt.backend import (
    RSA_OAEP_256,
    Dek,
    ProviderUnavailable,
    Recipient,
    UnsupportedOperation,
    UnwrapFailed,
    WrappedKey,
    WrongKey,
    hpke_split,
    inner_unwrap,
    open_with_ecdh,
    public_key_id,
    wipe,
)
from keymgmt_tpm2._errors import FAILURE, SIZE, VALUE, TpmError
from keymgmt_tpm2._structures import describe_attributes
from keymgmt_tpm2.policy._approval import Statement, boot_signatures, installed

if TYPE_CHECKING:
    from keymgmt_tpm2._connection.service import Service
    from keymgmt_tpm2._connection.tpm import Tpm
    from keymgmt_tpm2._keys import TpmKey, TpmKeyVersion
    from keymgmt_tpm2.policy._policy import Policy

__all__ = ["check_wrapped", "recipient_of", "statements", "unwrap_with", "use_key"]

R = TypeVar("R")
log: Final = logging.getLogger("keymgmt.tpm2")
_MECHANISMS: Final = {"ecc-p256": "hpke-p256", "rsa-2048": RSA_OAEP_256}
_RSA_BYTES: Final = 256


def recipient_of(backend: str, key: TpmKey) -> Recipient:
    """The recipient of the newest version of a key, which a device exports."""
    version = key.newest
    return Recipient(
        _MECHANISMS[key.kind],
        backend,
        key.key,
        version.version,
        version.public_key(),
        {
            "tpm_name": version.public.name.hex(),
            "tpm_attributes": describe_attributes(version.public.attributes),
            "policy": str(version.policy),
        },
    )


def check_wrapped(wrapped: WrappedKey, key: TpmKey, version: TpmKeyVersion) -> None:
    """Refuse a wrapped key that is not for this version, without asking the TPM.

    Raises:
        UnsupportedOperation: the mechanism is not that of the key.
        UnwrapFailed: the wrapped key is malformed.
        WrongKey: the wrapped key is for another key of that name.
    """
    if wrapped.mechanism != _MECHANISMS[key.kind]:
        raise UnsupportedOperation(
            f"the key {wrapped.key!r} is {key.kind} and does not unwrap {wrapped.mechanism}"
        )
    if set(wrapped.params) != {"pk"}:
        raise UnwrapFailed(f"{wrapped} is malformed")
    if wrapped.params["pk"] != public_key_id(version.public_key()):
        raise WrongKey(
            f"{wrapped} is for another key of that name",
            hint="each device has its own key; seal to the recipient file of this device too",
        )


def unwrap_with(
    service: Service, key: TpmKey, version: TpmKeyVersion, wrapped: WrappedKey, context: bytes
) -> Dek:
    """Unwrap a wrapped key that ``check_wrapped`` accepted."""
    if key.kind == "rsa-2048":
        return inner_unwrap(
            wrapped.blob, context, lambda blob: _unwrap_rsa(service, key, version, blob)
        )
    enc, ciphertext = hpke_split(wrapped.mechanism, wrapped.blob)
    z = use_key(service, key.key, version, lambda tpm, h, session: tpm.ecdh(h, enc, session))
    try:
        return open_with_ecdh(wrapped.mechanism, z, enc, version.public_key(), ciphertext, context)
    finally:
        wipe(z)


def _unwrap_rsa(service: Service, key: TpmKey, version: TpmKeyVersion, blob: bytes) -> Dek:
    if len(blob) != _RSA_BYTES:
        raise UnwrapFailed(f"the wrapped key has {len(blob)} bytes, not {_RSA_BYTES}")

    def decrypt(tpm: Tpm, handle: Any, session: Any) -> bytearray:
        try:
            return tpm.rsa_decrypt(handle, blob, session)
        except TpmError as error:
            # For bad padding a chip answers TPM_RC_VALUE, and libtpms (swtpm) TPM_RC_FAILURE,
            # although it goes on working. A TPM that has really failed also fails at get_random.
            if error.code == FAILURE:
                tpm.call("get_random", 1)
            elif error.code not in (VALUE, SIZE):
                raise
            return bytearray()

    plain = use_key(service, key.key, version, decrypt)
    try:
        return Dek(plain)
    except ValueError as error:
        raise UnwrapFailed("the wrapped key does not authenticate") from error
    finally:
        wipe(plain)


def statements(service: Service, policy: Policy) -> list[Statement]:
    """The statements of its approver: installed approvals, and signatures of the booted kernel."""
    if policy.approver is None:
        return []
    ours = [each for each in installed(service.keys.path) if each.approver == policy.approver]
    try:
        path = service.settings.pcr_signatures
        return [*ours, *(boot_signatures(path, policy.approver) if path else ())]
    except ProviderUnavailable as error:
        if not ours:
            raise
        log.warning("the signatures of the booted kernel cannot be used: %s", error)
        return list(ours)


def use_key(
    service: Service, key: str, version: TpmKeyVersion, use: Callable[[Tpm, Any, Any], R]
) -> R:
    """Load a version of a key, satisfy its policy and call ``use(tpm, handle, session)``."""
    policy = version.policy
    approvals = statements(service, policy)

    def operation(tpm: Tpm, pin: bytearray | None) -> R:
        from keymgmt_tpm2.policy._authorize import authorize

        session = tpm.session(policy=bool(policy.digest), once=True)
        handle = tpm.load(version.public, version.private)
        if pin is not None:
            tpm.set_pin(handle, pin)
        # The last step before the use: if a PCR changes between the two, both must be repeated.
        authorize(tpm, session, policy, approvals, f"the key {key!r}")
        return use(tpm, handle, session)

    doing = f"{service.name}:{key}@{version.version}"
    with service.pin(key, wanted=version.policy.pin) as pin:
        return service.run(doing, lambda tpm: operation(tpm, pin), alone=pin is not None)
