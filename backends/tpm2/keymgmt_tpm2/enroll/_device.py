"""The device's side of enrolment: endorsement key, attestation key, credential, certification."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from keymgmt.backend import AccessDenied, FormatError, KeyNotFound, UnsupportedOperation, wipe
from keymgmt_tpm2._errors import HANDLE, NO_SUCH_KEYS, TpmError
from keymgmt_tpm2._structures import ALG_RSA, USER_WITH_AUTH, Public, sized
from keymgmt_tpm2._templates import EK_PROFILES, ak_template
from keymgmt_tpm2.enroll._certificates import certifies, is_like, load_certificate
from keymgmt_tpm2.enroll._exchange import Request, answer_value, read_challenge, write_response
from keymgmt_tpm2.enroll._nv import certificates, read_chain, read_nv

if TYPE_CHECKING:
    from typing import Any

    from keymgmt_tpm2._connection.tpm import Tpm
    from keymgmt_tpm2._keys import TpmKeyVersion
    from keymgmt_tpm2._provider import Tpm2Provider
    from keymgmt_tpm2._templates import EkProfile

__all__ = ["attestation_key", "make_request", "respond"]

_SECONDS: Final = 120.0
# "TCG EK Credential Profile", 2.2.1.4: persistent handles of EKs.
_EK_HANDLES: Final = range(0x81010001, 0x81010100)


def make_request(provider: Tpm2Provider, key: str, ek_certificate: bytes | None = None) -> Request:
    """State who this TPM is and what the newest version of ``key`` is.

    Args:
        provider: of this device's TPM.
        key: name of the key.
        ek_certificate: in DER, where the TPM's maker publishes it instead of putting it in the TPM.

    Raises:
        KeyNotFound: no such key, or the TPM carries no EK certificate.
        UnsupportedOperation: the key does not wrap, or no EK of this TPM is the certificate's.
        AccessDenied: the endorsement hierarchy has a password, and it was not or wrongly given.
    """
    recipient = provider.export_recipient(key)
    version = provider.keys.read(key).newest

    def operation(tpm: Tpm) -> Request:
        certificate, handle = _endorsement(tpm, ek_certificate)
        ek = tpm.public_of(handle)
        tpm.flush_all()
        ak, chain = tpm.public_of(attestation_key(tpm)), read_chain(tpm)
        return Request(certificate, chain, ek, ak, version.public, version.policy, recipient)

    return provider.service.run(
        "asking who it is",
        operation,
        seconds=_SECONDS,
        passwords={"endorsement": provider.settings.endorsement_auth},
    )


def respond(
    provider: Tpm2Provider, key: str, content: bytes, ek_certificate: bytes | None = None
) -> bytes:
    """The response to a challenge: the AK certifies the key with what the credential says.

    Args:
        provider: of this device's TPM.
        key: name of the key.
        content: the challenge file.
        ek_certificate: the same as for the request.

    Raises:
        FormatError: not a challenge, or not one for the present request of this key.
        AccessDenied: the TPM cannot open the credential: it is for another TPM or another AK; or
            the endorsement hierarchy has a password, and it was not or wrongly given.
    """
    digest, credential, seed = read_challenge(content)
    if make_request(provider, key, ek_certificate).digest != digest:
        raise FormatError(
            f"the challenge is not for this device's key {key!r} as it is now",
            hint="the key was rotated or made anew, or it is another device's: request again; "
            "where --ek-certificate was given for the request, give it here too",
        )
    version = provider.keys.read(key).newest

    def operation(tpm: Tpm) -> tuple[bytes, bytes]:
        secret = _activate(tpm, credential, seed, ek_certificate)
        try:
            value = answer_value(bytes(secret), digest)
        finally:
            wipe(secret)
        return _certify(tpm, version, value)

    attest, signature = provider.service.run(
        "responding",
        operation,
        seconds=_SECONDS,
        pin_of=key if version.policy.pin else None,
        passwords={"endorsement": provider.settings.endorsement_auth},
    )
    return write_response(attest, signature)


def _endorsement(tpm: Tpm, given: bytes | None) -> tuple[bytes, Any]:
    """The EK certificate, and the loaded EK that it is of.

    Raises:
        KeyNotFound: the TPM carries no certificate, and none was given.
        UnsupportedOperation: it cannot be read, or is of no EK of this TPM.
    """
    names = list(EK_PROFILES)
    if given is None:
        name, given = next(certificates(tpm), ("", b""))
        if not given:
            raise KeyNotFound(
                "the TPM carries no certificate of its endorsement key",
                hint="its maker may publish it: --ek-certificate FILE (tpm2_getekcertificate "
                "fetches some); an emulator gets one from swtpm_setup --create-ek-cert",
            )
        names.remove(name)
        names.insert(0, name)
    try:
        wanted = load_certificate(given)
        profiles = [
            EK_PROFILES[each] for each in names if is_like(wanted, EK_PROFILES[each].public)
        ]
        for handle in _candidates(tpm, profiles):
            # One that is not used here is none that anything was certified for.
            with contextlib.suppress(ValueError):
                if certifies(wanted, tpm.public_of(handle)):
                    return given, handle
            tpm.flush_all()
    except ValueError as error:
        raise UnsupportedOperation(f"the EK certificate is not readable: {error}") from error
    raise UnsupportedOperation(
        "the EK certificate is of no endorsement key of this TPM",
        hint="it is another device's, or the TPM makes its keys from a template of its maker",
    )


def _candidates(tpm: Tpm, profiles: Sequence[EkProfile]) -> Iterator[Any]:
    """Endorsement keys of this TPM: persistent ones, then such as it makes from templates."""
    for number in tpm.handles(_EK_HANDLES.start):
        if number in _EK_HANDLES and (handle := tpm.persistent(number)) is not None:
            yield handle
    for profile in profiles:
        template = read_nv(tpm, profile.template_at) or profile.template
        nonce = read_nv(tpm, profile.nonce_at) if profile.nonce_at else None
        if nonce:
            template = _with_nonce(Public.parse(template), nonce)
        try:
            made = _primary(tpm, template)
        except TpmError as error:
            if error.code not in NO_SUCH_KEYS:
                raise
        else:
            yield made


def _with_nonce(template: Public, nonce: bytes) -> bytes:
    """The template with the maker's nonce in the place of a number or point (2.2.1.4)."""
    if template.kind == ALG_RSA:
        return template.head + sized(nonce.ljust(256, b"\0"))
    return template.head + sized(nonce.ljust(32, b"\0")) + sized(bytes(32))


def _primary(tpm: Tpm, template: bytes) -> Any:
    session = tpm.session()
    handle = tpm.create_primary("endorsement", template, session)
    tpm.flush(session)
    return handle


def attestation_key(tpm: Tpm) -> Any:
    """The AK: a primary key, so that the TPM makes the same one each time."""
    return _primary(tpm, ak_template())


def _activate(tpm: Tpm, credential: bytes, seed: bytes, given: bytes | None) -> bytearray:
    _, ek = _endorsement(tpm, given)
    ak = attestation_key(tpm)
    # Encrypted, or the secret would be on the bus in clear.
    by_auth_value = tpm.public_of(ek).attributes & USER_WITH_AUTH
    session = tpm.session() if by_auth_value else tpm.endorsement_session()
    try:
        return tpm.activate(ak, ek, credential, seed, session)
    except TpmError as error:
        if error.lost or error.code == HANDLE:
            raise
        raise AccessDenied(
            "the TPM cannot open the credential: it is for another TPM or attestation key",
            hint="request again on this device, and let that request be challenged",
        ) from error
    finally:
        tpm.flush_all()


def _certify(tpm: Tpm, version: TpmKeyVersion, value: bytes) -> tuple[bytes, bytes]:
    # Certify takes the key's auth value (its ADMIN role), which its policy need not allow.
    session = tpm.session()
    ak, key = attestation_key(tpm), tpm.load(version.public, version.private)
    tpm.set_pin(key)
    return tpm.certify(key, ak, value, session)
