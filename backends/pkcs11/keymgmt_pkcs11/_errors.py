"""What a return code means to an operator: one table, from reasons to errors and hints.

A reason is the name of a CKR_ code, whether python-pkcs11 or our own calls met it. One code means
several things on several modules (GeneralError most of all), so the caller of ``translate`` has
ruled out first what only it can know: a tampered blob, a retired key.
"""

from __future__ import annotations

import re
from typing import Final

import pkcs11

from keymgmt.backend import (
    AccessDenied,
    KeymgmtError,
    KeyNotFound,
    LockedOut,
    ProviderError,
    ProviderUnavailable,
    UnsupportedOperation,
)
from keymgmt_pkcs11._cryptoki import CkError, code_name

__all__ = ["GONE", "LOST", "TAMPERED", "reason", "translate"]

LOST: Final = frozenset(
    {
        "SessionHandleInvalid",
        "SessionClosed",
        "DeviceRemoved",
        "TokenNotPresent",
        "TokenNotRecognised",
        "SlotIDInvalid",
        "CryptokiNotInitialized",
        "UserNotLoggedIn",
        "OperationActive",
        "BufferTooSmall",
    }
)
"""The session is of no more use; a new one may be."""

GONE: Final = frozenset(
    {
        "ObjectHandleInvalid",
        "KeyHandleInvalid",
        "UnwrappingKeyHandleInvalid",
        "WrappingKeyHandleInvalid",
    }
)
"""The object behind a handle is not there any more."""

TAMPERED: Final = frozenset(
    {
        "EncryptedDataInvalid",
        "EncryptedDataLenRange",
        "AEADDecryptFailed",
        "WrappedKeyInvalid",
        "WrappedKeyLenRange",
    }
)
"""The ciphertext is not what this key made."""

_PIN: Final = "check the PIN's source; it is not tried again in this process"
_ASK: Final = "ask whoever runs the HSM: the user PIN is unlocked with the SO PIN"
_KINDS: Final[dict[str, tuple[type[ProviderError], str, str | None]]] = {
    "PinIncorrect": (AccessDenied, "the PIN is wrong", _PIN),
    "PinInvalid": (AccessDenied, "the PIN has characters that the token does not take", _PIN),
    "PinLenRange": (AccessDenied, "the PIN is too short or too long", _PIN),
    "PinExpired": (AccessDenied, "the PIN has expired", "set a new one with the vendor's tool"),
    "PinLocked": (LockedOut, "the PIN is locked", _ASK),
    "UserPinNotInitialized": (
        AccessDenied,
        "the token has no user PIN yet",
        "set one: pkcs11-tool --init-pin, or the vendor's tool",
    ),
    "UserNotLoggedIn": (AccessDenied, "the token wants a login", "set login and pin"),
    "AnotherUserAlreadyLoggedIn": (
        AccessDenied,
        "another user of the token is logged in from this process",
        "log the security officer out",
    ),
    "SessionReadOnly": (
        UnsupportedOperation,
        "the session may not change the token",
        "set read_only = false",
    ),
    "TokenWriteProtected": (UnsupportedOperation, "the token is write-protected", None),
    "KeyFunctionNotPermitted": (
        UnsupportedOperation,
        "the key's attributes do not permit this",
        "see the key's attributes: keymgmt doctor",
    ),
    "ActionProhibited": (UnsupportedOperation, "the token does not let this object change", None),
    "AttributeReadOnly": (UnsupportedOperation, "the token does not let this object change", None),
    "SessionCount": (
        ProviderUnavailable,
        "the token has no free session",
        "close other applications' sessions, or set sessions lower here and there",
    ),
    "DeviceMemory": (ProviderUnavailable, "the token is full", "destroy objects that nobody uses"),
    **dict.fromkeys(
        (
            "MechanismInvalid",
            "MechanismParamInvalid",
            "FunctionNotSupported",
            "ArgumentsBad",
            "KeyTypeInconsistent",
            "KeySizeRange",
            "TemplateInconsistent",
            "TemplateIncomplete",
            "AttributeTypeInvalid",
            "AttributeValueInvalid",
        ),
        (UnsupportedOperation, "the module refuses this mechanism or its parameters", None),
    ),
    **dict.fromkeys(GONE, (KeyNotFound, "the key is not there any more", None)),
}
_UNMAPPED: Final = re.compile(r"Unmapped error code 0x([0-9a-f]+)")


def reason(error: BaseException) -> str:
    """The name of the return code behind an exception; empty where there is none."""
    if isinstance(error, CkError):
        return error.reason
    if isinstance(error, pkcs11.PKCS11Error):
        if found := _UNMAPPED.search(str(error)):
            return code_name(int(found[1], 16))
        return type(error).__name__
    return ""


def translate(error: BaseException, doing: str) -> KeymgmtError:
    """The error of ours for what a call raised, with ``doing`` in front; ours pass unchanged."""
    if isinstance(error, KeymgmtError):
        return error
    name = reason(error)
    if name in _KINDS:
        kind, text, hint = _KINDS[name]
        made: ProviderError = kind(f"{doing}: {text} ({name})", hint=hint)
    else:
        made = ProviderUnavailable(
            f"{doing}: the module answered {name or type(error).__name__}",
            hint="see whether the token is there: keymgmt doctor",
        )
    made.__cause__ = error
    return made
