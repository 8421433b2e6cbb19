"""The device's side of enrolment: endorsement key, attestation key, credential, certification."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    FormatError,
    KeyNotFound,
    UnsupportedOperation,
    replace_file,
    wipe,
)
from keymgmt_tpm2._attest import AttestationError, check_ak
from keymgmt_tpm2._enroll import Request, answer_value, read_challenge, write_response
from keymgmt_tpm2._errors import HANDLE, TpmError
from keymgmt_tpm2._keys import read_json
from keymgmt_tpm2._structures import Public, sized
from keymgmt_tpm2._templates import ak_template, ek_template

if TYPE_CHECKING:
    from typing import Any

    from keymgmt_tpm2._keys import TpmKeyVersion
    from keymgmt_tpm2._provider import Tpm2Provider
    from keymgmt_tpm2._tpm import Tpm

__all__ = ["make_request", "respond"]

_FORMAT: Final = "keymgmt.tpm2-attestation-key/1"
_FILE: Final = ".attestation.json"
_SECONDS: Final = 120.0
# "TCG EK Credential Profile", 2.2.1.4: NV indices of certificates, and persistent handles of EKs.
_CERTIFICATES: Final = {"rsa": 0x01C00002, "ecc": 0x01C0000A}
_EK_HANDLES: Final = range(0x81010001, 0x81010010)
_CHUNK: Final = 512


def make_request(provider: Tpm2Provider, key: str) -> Request:
    """State who this TPM is and what the newest version of ``key`` is.

    Raises:
        KeyNotFound: no such key, or the TPM carries no EK certificate.
        UnsupportedOperation: the key does not wrap.
    """
    recipient = provider.export_recipient(key)
    version = provider.keys.read(key).newest

    def operation(tpm: Tpm) -> tuple[bytes, Public, Public]:
        kind, certificate = _certificate(tpm)
        ek = tpm.public_of(_ek(tpm, kind, certificate))
        ak, _ = _attestation_key(provider, tpm)
        return certificate, ek, ak

    certificate, ek, ak = provider.service.run("asking who it is", operation, seconds=_SECONDS)
    return Request(certificate, ek, ak, version.public, version.policy, recipient)


def respond(provider: Tpm2Provider, key: str, content: bytes) -> bytes:
    """The response to a challenge: the AK certifies the key with what the credential says.

    Raises:
        FormatError: not a challenge, or not one for the present request of this key.
        AccessDenied: the TPM cannot open the credential: it is for another TPM or another AK.
    """
    digest, credential, seed = read_challenge(content)
    if make_request(provider, key).digest != digest:
        raise FormatError(
            f"the challenge is not for this device's key {key!r} as it is now",
            hint="the key was rotated or made anew, or it is another device's: request again",
        )
    version = provider.keys.read(key).newest

    def operation(tpm: Tpm, pin: bytearray | None) -> tuple[bytes, tuple[int, int]]:
        secret = _activate(provider, tpm, credential, seed)
        try:
            value = answer_value(bytes(secret), digest)
        finally:
            wipe(secret)
        return _certify(provider, tpm, version, pin, value)

    run = provider.service.run
    if version.policy.pin:
        with provider.service.pin(key) as pin:
            attest, (r, s) = run("responding", lambda tpm: operation(tpm, pin), seconds=_SECONDS)
    else:
        attest, (r, s) = run("responding", lambda tpm: operation(tpm, None), seconds=_SECONDS)
    return write_response(attest, encode_dss_signature(r, s))


def _certificate(tpm: Tpm) -> tuple[str, bytes]:
    for kind, index in _CERTIFICATES.items():
        if (content := _nv(tpm, index)) is not None:
            return kind, content
    raise KeyNotFound(
        "the TPM carries no certificate of its endorsement key",
        hint="its maker may publish it; an emulator gets one from swtpm_setup --create-ek-cert",
    )


def _nv(tpm: Tpm, index: int) -> bytes | None:
    handle = tpm.persistent(index)
    if handle is None:
        return None
    answer = tpm.call("nv_read_public", handle)
    public = answer[0]
    area = public.nvPublic
    size, content = int(area.dataSize), b""
    while len(content) < size:
        part = tpm.call(
            "nv_read", handle, min(_CHUNK, size - len(content)), len(content), auth_handle=handle
        )
        content += bytes(part)
    return content


def _ek(tpm: Tpm, kind: str, certificate: bytes) -> Any:
    """The EK that the certificate is of: a persistent one, or made from the profile's template."""
    from tpm2_pytss import constants as c
    from tpm2_pytss import types as t

    wanted = _certified_key(certificate)
    for number in tpm.handles(_EK_HANDLES.start):
        if number in _EK_HANDLES and (handle := tpm.persistent(number)) is not None:
            with contextlib.suppress(ValueError):
                if tpm.public_of(handle).der() == wanted:
                    return handle
    # A template of the maker's, where there is one, follows the certificate and a nonce.
    template = _nv(tpm, _CERTIFICATES[kind] + 2) or ek_template(kind)
    answer = tpm.call(
        "create_primary",
        t.TPM2B_SENSITIVE_CREATE(),
        t.TPM2B_PUBLIC.unmarshal(sized(template))[0],
        c.ESYS_TR.ENDORSEMENT,
    )
    return tpm.opened(answer[0])


def _certified_key(certificate: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    length = 4 + int.from_bytes(certificate[2:4], "big")
    try:
        key = x509.load_der_x509_certificate(certificate[:length]).public_key()
    except ValueError as error:
        raise UnsupportedOperation("the TPM's EK certificate is not readable") from error
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _attestation_key(provider: Tpm2Provider, tpm: Tpm) -> tuple[Public, bytes]:
    """The AK of this TPM, made when it is first asked for."""
    path = provider.key_directory / _FILE
    data = read_json(path)
    if data is None:
        private, public = tpm.create(ak_template(), bytearray())
        content = {
            "format": _FORMAT,
            "public": base64.b64encode(public.raw).decode(),
            "private": base64.b64encode(private).decode(),
        }
        replace_file(path, json.dumps(content, indent=2).encode() + b"\n", mode=0o600)
        return public, private
    try:
        if data["format"] != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")  # noqa: TRY301
        public = Public.parse(base64.b64decode(data["public"], validate=True))
        check_ak(public)
        return public, base64.b64decode(data["private"], validate=True)
    except (ValueError, KeyError, TypeError, AttestationError) as error:
        raise ConfigError(
            f"the attestation key {path} is refused: {error}", hint="remove it and request again"
        ) from error


def _activate(provider: Tpm2Provider, tpm: Tpm, credential: bytes, seed: bytes) -> bytearray:
    from tpm2_pytss import constants as c

    kind, certificate = _certificate(tpm)
    # Encrypted, or the secret would be on the bus in clear.
    session = tpm.session(policy=True)
    endorsement = c.ESYS_TR.ENDORSEMENT
    tpm.call("policy_secret", endorsement, session, b"", b"", b"", 0)
    public, private = _attestation_key(provider, tpm)
    ak, ek = tpm.load(public, private), _ek(tpm, kind, certificate)
    try:
        answer = tpm.call("activate_credential", ak, ek, credential, seed, session2=session)
        return tpm.take(answer)
    except TpmError as error:
        if error.lost or error.code == HANDLE:
            raise
        raise AccessDenied(
            "the TPM cannot open the credential: it is for another TPM or attestation key",
            hint="request again on this device, and let that request be challenged",
        ) from error
    finally:
        tpm.flush_all()


def _certify(
    provider: Tpm2Provider,
    tpm: Tpm,
    version: TpmKeyVersion,
    pin: bytearray | None,
    value: bytes,
) -> tuple[bytes, tuple[int, int]]:
    # Certify takes the key's auth value (its ADMIN role), which its policy need not allow.
    session = tpm.session()
    public, private = _attestation_key(provider, tpm)
    ak, key = tpm.load(public, private), tpm.load(version.public, version.private)
    if pin is not None:
        tpm.set_auth(key, pin)
    return tpm.certify(key, ak, value, session)
