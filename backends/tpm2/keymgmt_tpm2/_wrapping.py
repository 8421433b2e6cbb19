"""Using a key: load it, satisfy its policy, and run one operation of the TPM with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from keymgmt.backend import (
    Dek,
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
from keymgmt_tpm2._templates import MECHANISMS
from keymgmt_tpm2.policy._authorize import authorize

if TYPE_CHECKING:
    from keymgmt_tpm2._connection.service import Service
    from keymgmt_tpm2._connection.tpm import Tpm
    from keymgmt_tpm2._keys import TpmKey, TpmKeyVersion

__all__ = ["check_wrapped", "recipient_of", "unwrap_with", "use_key"]

R = TypeVar("R")
_RSA_BYTES: Final = 256


def recipient_of(backend: str, key: TpmKey) -> Recipient:
    """The recipient of the newest version of a key, which a device exports."""
    version = key.newest
    return Recipient(
        MECHANISMS[key.kind],
        backend,
        key.key,
        version.version,
        version.public.encoded(),
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
    if wrapped.mechanism != MECHANISMS[key.kind]:
        raise UnsupportedOperation(
            f"the key {wrapped.key!r} is {key.kind} and does not unwrap {wrapped.mechanism}"
        )
    if set(wrapped.params) != {"pk"}:
        raise UnwrapFailed(f"{wrapped} is malformed")
    if wrapped.params["pk"] != public_key_id(version.public.encoded()):
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
        return open_with_ecdh(
            wrapped.mechanism, z, enc, version.public.encoded(), ciphertext, context
        )
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


def use_key(
    service: Service, key: str, version: TpmKeyVersion, use: Callable[[Tpm, Any, Any], R]
) -> R:
    """Load a version of a key, satisfy its policy and call ``use(tpm, handle, session)``."""
    policy = version.policy

    def operation(tpm: Tpm) -> R:
        session = tpm.session(policy=bool(policy.digest), once=True)
        handle = tpm.load(version.public, version.private)
        tpm.set_pin(handle)
        # The last step before the use: if a PCR changes between the two, both must be repeated.
        authorize(tpm, session, service, policy, f"the key {key!r}")
        return use(tpm, handle, session)

    doing = f"{service.name}:{key}@{version.version}"
    return service.run(doing, operation, pin_of=key if policy.pin else None)
