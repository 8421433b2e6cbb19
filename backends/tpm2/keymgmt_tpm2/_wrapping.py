"""Using a key: its policy is satisfied, it is loaded, and the TPM does one thing with it."""

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
    """What a device exports of the newest version of a key."""
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
    """Refuse what this version did not wrap, without asking the TPM.

    Raises:
        UnsupportedOperation: the mechanism is not that of the key.
        UnwrapFailed: it is malformed.
        WrongKey: it was sealed to another key of that name.
    """
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


def unwrap_with(
    service: Service, key: TpmKey, version: TpmKeyVersion, wrapped: WrappedKey, context: bytes
) -> Dek:
    """Unwrap what ``check_wrapped`` let through."""
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
        raise UnwrapFailed("the wrapped key has not the length of its kind")

    def decrypt(tpm: Tpm, handle: Any, session: Any) -> bytearray:
        try:
            return tpm.rsa_decrypt(handle, blob, session)
        except TpmError as error:
            # Bad padding is a value on a chip and a failure on libtpms, which goes on working; a
            # TPM that really failed fails here again.
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
    """What its approver said of boot states: approvals, and signatures of the booted kernel."""
    if policy.approver is None:
        return []
    ours = [each for each in installed(service.keys.path) if each.approver == policy.approver]
    try:
        path = service.settings.pcr_signatures
        return [*ours, *(boot_signatures(path, policy.approver) if path else ())]
    except ProviderUnavailable as error:
        if not ours:
            raise
        log.warning("the signatures of the booted kernel are passed over: %s", error)
        return list(ours)


def use_key(
    service: Service, key: str, version: TpmKeyVersion, use: Callable[[Tpm, Any, Any], R]
) -> R:
    """Load a version of a key, satisfy its policy and call ``use(tpm, handle, session)``."""
    policy = version.policy
    said = statements(service, policy)

    def operation(tpm: Tpm, pin: bytearray | None) -> R:
        from keymgmt_tpm2.policy._authorize import authorize

        session = tpm.session(policy=bool(policy.digest), once=True)
        handle = tpm.load(version.public, version.private)
        if pin is not None:
            tpm.set_pin(handle, pin)
        # Last, because a PCR that moves between this and the use makes both in vain.
        authorize(tpm, session, policy, said, f"the key {key!r}")
        return use(tpm, handle, session)

    doing = f"{service.name}:{key}@{version.version}"
    with service.pin(key, wanted=version.policy.pin) as pin:
        return service.run(doing, lambda tpm: operation(tpm, pin), alone=pin is not None)
