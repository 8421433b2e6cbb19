"""The meaning of a module's return codes for an operator, in one table.

Modules use the same code for different faults (CKR_GENERAL_ERROR most of all). So a caller first
rules out the faults that only the caller can know, such as a tampered blob or a retired key.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from keymgmt.backend import (
    AccessDenied,
    Fault,
    FaultTable,
    KeymgmtError,
    KeyNotFound,
    LockedOut,
    ProviderUnavailable,
    UnsupportedOperation,
)

__all__ = ["FAULTS", "REFUSED_MECHANISM", "REFUSED_TEMPLATE", "CkError", "Ckr", "translate"]


class Ckr(IntEnum):
    """The return codes that keymgmt tells apart (PKCS#11 2.40, pkcs11t.h), without ``CKR_``."""

    HOST_MEMORY = 0x02
    SLOT_ID_INVALID = 0x03
    GENERAL_ERROR = 0x05
    FUNCTION_FAILED = 0x06
    ARGUMENTS_BAD = 0x07
    CANT_LOCK = 0x0A
    ATTRIBUTE_READ_ONLY = 0x10
    ATTRIBUTE_SENSITIVE = 0x11
    ATTRIBUTE_TYPE_INVALID = 0x12
    ATTRIBUTE_VALUE_INVALID = 0x13
    ACTION_PROHIBITED = 0x1B
    DATA_INVALID = 0x20
    DATA_LEN_RANGE = 0x21
    DEVICE_ERROR = 0x30
    DEVICE_MEMORY = 0x31
    DEVICE_REMOVED = 0x32
    ENCRYPTED_DATA_INVALID = 0x40
    ENCRYPTED_DATA_LEN_RANGE = 0x41
    AEAD_DECRYPT_FAILED = 0x42
    FUNCTION_CANCELED = 0x50
    FUNCTION_NOT_SUPPORTED = 0x54
    KEY_HANDLE_INVALID = 0x60
    KEY_SIZE_RANGE = 0x62
    KEY_TYPE_INCONSISTENT = 0x63
    KEY_FUNCTION_NOT_PERMITTED = 0x68
    KEY_NOT_WRAPPABLE = 0x69
    KEY_UNEXTRACTABLE = 0x6A
    MECHANISM_INVALID = 0x70
    MECHANISM_PARAM_INVALID = 0x71
    OBJECT_HANDLE_INVALID = 0x82
    OPERATION_ACTIVE = 0x90
    OPERATION_NOT_INITIALIZED = 0x91
    PIN_INCORRECT = 0xA0
    PIN_INVALID = 0xA1
    PIN_LEN_RANGE = 0xA2
    PIN_EXPIRED = 0xA3
    PIN_LOCKED = 0xA4
    SESSION_CLOSED = 0xB0
    SESSION_COUNT = 0xB1
    SESSION_HANDLE_INVALID = 0xB3
    SESSION_READ_ONLY = 0xB5
    TEMPLATE_INCOMPLETE = 0xD0
    TEMPLATE_INCONSISTENT = 0xD1
    TOKEN_NOT_PRESENT = 0xE0
    TOKEN_NOT_RECOGNIZED = 0xE1
    TOKEN_WRITE_PROTECTED = 0xE2
    UNWRAPPING_KEY_HANDLE_INVALID = 0xF0
    UNWRAPPING_KEY_SIZE_RANGE = 0xF1
    UNWRAPPING_KEY_TYPE_INCONSISTENT = 0xF2
    USER_ALREADY_LOGGED_IN = 0x100
    USER_NOT_LOGGED_IN = 0x101
    USER_PIN_NOT_INITIALIZED = 0x102
    USER_TYPE_INVALID = 0x103
    USER_ANOTHER_ALREADY_LOGGED_IN = 0x104
    WRAPPED_KEY_INVALID = 0x110
    WRAPPED_KEY_LEN_RANGE = 0x112
    WRAPPING_KEY_HANDLE_INVALID = 0x113
    CURVE_NOT_SUPPORTED = 0x140
    BUFFER_TOO_SMALL = 0x150
    CRYPTOKI_NOT_INITIALIZED = 0x190
    CRYPTOKI_ALREADY_INITIALIZED = 0x191


class CkError(RuntimeError):
    """A call returned another code than CKR_OK.

    Attributes:
        call: the function, such as ``C_Decrypt``.
        code: the return code.
    """

    def __init__(self, call: str, code: int) -> None:
        self.call = call
        self.code = code
        super().__init__(f"{call}: {self.name}")

    @property
    def name(self) -> str:
        """The code as the standard and vendors' manuals write it."""
        known = self.code in Ckr._value2member_map_
        return f"CKR_{Ckr(self.code).name}" if known else f"0x{self.code:08x}"

    @property
    def passing(self) -> bool:
        """Whether the same call may succeed with another session, login or C_Initialize."""
        return FAULTS.find(self.code, self.call).passing

    @property
    def lost(self) -> bool:
        """Whether the session, the login or the object handle was lost."""
        return FAULTS.find(self.code) in (_LOST, _GONE) or self.code == Ckr.USER_NOT_LOGGED_IN

    @property
    def damaged(self) -> bool:
        """Whether the module says that the ciphertext is damaged."""
        return FAULTS.find(self.code) is _DAMAGED


REFUSED_MECHANISM: Final = frozenset(
    {
        *(Ckr.MECHANISM_INVALID, Ckr.MECHANISM_PARAM_INVALID, Ckr.FUNCTION_NOT_SUPPORTED),
        *(Ckr.ARGUMENTS_BAD, Ckr.KEY_TYPE_INCONSISTENT, Ckr.KEY_SIZE_RANGE, Ckr.DATA_LEN_RANGE),
        *(Ckr.UNWRAPPING_KEY_SIZE_RANGE, Ckr.UNWRAPPING_KEY_TYPE_INCONSISTENT, Ckr.DATA_INVALID),
        *(Ckr.KEY_NOT_WRAPPABLE, Ckr.KEY_UNEXTRACTABLE, Ckr.CURVE_NOT_SUPPORTED),
    }
)
"""The module does not have this mechanism, or does not accept these parameters."""

REFUSED_TEMPLATE: Final = frozenset(
    {
        *(Ckr.TEMPLATE_INCONSISTENT, Ckr.TEMPLATE_INCOMPLETE, Ckr.ATTRIBUTE_TYPE_INVALID),
        *(Ckr.ATTRIBUTE_VALUE_INVALID, Ckr.ATTRIBUTE_READ_ONLY),
    }
)
"""The module does not create an object with these attributes."""

_PIN: Final = "correct the PIN at its source; it is not sent again in this process"
_LOST: Final = Fault(ProviderUnavailable, "the session with the token was lost", None, passing=True)
_TROUBLE: Final = Fault(
    ProviderUnavailable,
    "the module answered",
    "see whether the token is there: keymgmt doctor PROVIDER",
    passing=True,
)
_REFUSED: Final = Fault(
    UnsupportedOperation,
    "the module refuses this mechanism or its parameters",
    "see what it can do: keymgmt pkcs11 mechanisms PROVIDER",
)
_FIXED: Final = Fault(UnsupportedOperation, "the token does not permit changes of this object")
_GONE: Final = Fault(KeyNotFound, "the key is not in the token any more", passing=True)
_DAMAGED: Final = Fault(UnsupportedOperation, "the module does not accept this ciphertext")

FAULTS: Final = FaultTable[int](
    {
        **dict.fromkeys((*REFUSED_MECHANISM, *REFUSED_TEMPLATE), _REFUSED),
        **dict.fromkeys(
            (
                *(Ckr.SESSION_HANDLE_INVALID, Ckr.SESSION_CLOSED, Ckr.CRYPTOKI_NOT_INITIALIZED),
                *(Ckr.DEVICE_REMOVED, Ckr.TOKEN_NOT_PRESENT, Ckr.TOKEN_NOT_RECOGNIZED),
                *(Ckr.SLOT_ID_INVALID, Ckr.OPERATION_ACTIVE, Ckr.OPERATION_NOT_INITIALIZED),
            ),
            _LOST,
        ),
        **dict.fromkeys(
            (
                *(Ckr.OBJECT_HANDLE_INVALID, Ckr.KEY_HANDLE_INVALID),
                *(Ckr.UNWRAPPING_KEY_HANDLE_INVALID, Ckr.WRAPPING_KEY_HANDLE_INVALID),
            ),
            _GONE,
        ),
        **dict.fromkeys(
            (
                *(Ckr.ENCRYPTED_DATA_INVALID, Ckr.ENCRYPTED_DATA_LEN_RANGE),
                *(Ckr.AEAD_DECRYPT_FAILED, Ckr.WRAPPED_KEY_INVALID, Ckr.WRAPPED_KEY_LEN_RANGE),
            ),
            _DAMAGED,
        ),
        **dict.fromkeys((Ckr.ACTION_PROHIBITED, Ckr.ATTRIBUTE_READ_ONLY), _FIXED),
        Ckr.PIN_INCORRECT: Fault(AccessDenied, "the PIN is wrong", _PIN),
        Ckr.PIN_INVALID: Fault(AccessDenied, "the PIN has characters that no PIN may have", _PIN),
        Ckr.PIN_LEN_RANGE: Fault(AccessDenied, "the PIN is too short or too long", _PIN),
        Ckr.PIN_EXPIRED: Fault(
            AccessDenied, "the PIN has expired", "set a new one with the vendor's tool"
        ),
        Ckr.PIN_LOCKED: Fault(
            LockedOut,
            "the PIN is locked",
            "ask whoever runs the HSM: the user PIN is unlocked with the SO PIN",
        ),
        Ckr.USER_PIN_NOT_INITIALIZED: Fault(
            AccessDenied,
            "the token has no user PIN yet",
            "set one with the vendor's tool, or: pkcs11-tool --module LIBRARY.so "
            "--token-label LABEL --login --login-type so --init-pin",
            passing=True,
        ),
        Ckr.USER_NOT_LOGGED_IN: Fault(
            AccessDenied, "the token requires a login", "set login and pin", passing=True
        ),
        Ckr.USER_TYPE_INVALID: Fault(
            AccessDenied, "the token has no such kind of user", "set user_type as its vendor says"
        ),
        Ckr.USER_ANOTHER_ALREADY_LOGGED_IN: Fault(
            AccessDenied,
            "another user of the token is logged in from this process",
            "log the security officer out",
        ),
        Ckr.SESSION_READ_ONLY: Fault(UnsupportedOperation, "the session may not change the token"),
        Ckr.TOKEN_WRITE_PROTECTED: Fault(
            UnsupportedOperation,
            "the token is write-protected",
            "create, rotate and retire keys where the token may be written; wrapping and unwrapping"
            " work as it is",
        ),
        Ckr.KEY_FUNCTION_NOT_PERMITTED: Fault(
            UnsupportedOperation,
            "the key's attributes do not permit this",
            "see them: keymgmt pkcs11 keys PROVIDER",
        ),
        Ckr.SESSION_COUNT: Fault(
            ProviderUnavailable,
            "the token has no free session",
            "close other applications' sessions, or set sessions lower here and in their configs",
        ),
        Ckr.DEVICE_MEMORY: Fault(
            ProviderUnavailable, "the token is full", "destroy objects that nobody uses"
        ),
    },
    # An unknown code, such as a vendor's own, may mean a lost HSM, so another try may help.
    unknown=_TROUBLE,
)


def translate(error: CkError, operation: str) -> KeymgmtError:
    """The KeymgmtError for the return code of a call; its message begins with ``operation``."""
    translated = FAULTS.error(error.code, operation, error.call, shown=error.name)
    translated.__cause__ = error
    return translated
