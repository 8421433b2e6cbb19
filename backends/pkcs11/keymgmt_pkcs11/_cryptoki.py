"""The calls that python-pkcs11 cannot make as we need them, straight from the module's own table.

Rules: secrets go in and come out in buffers that are wiped; the module's exact return code is kept;
initialisation asks for locking; the IV is read back, since some tokens make their own; lengths that
a module reports are not trusted (NSS softokn reports GCM's without the tag). Everything else is
python-pkcs11's. ctypes releases the GIL during each call.

The layout is that of PKCS#11 2.40, pkcs11t.h and pkcs11f.h, for Unix (natural alignment).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import wipe

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "MAX_OUTPUT",
    "ULONG_SIZE",
    "USER_NOT_LOGGED_IN",
    "CkError",
    "Cryptoki",
    "Parameters",
    "TokenCounts",
    "code_name",
]

_ULONG = ctypes.c_ulong
_PTR = ctypes.c_void_p
ULONG_SIZE: Final = ctypes.sizeof(_ULONG)
UNKNOWN: Final = _ULONG(-1).value  # CK_UNAVAILABLE_INFORMATION
_OS_LOCKING: Final = 2  # CKF_OS_LOCKING_OK
MAX_OUTPUT: Final = 1024  # bytes of an RSA key of 8192 bits, the largest that is used
USER_NOT_LOGGED_IN: Final = 0x101

# Name -> place in CK_FUNCTION_LIST and argument types.
_CALLS: Final[Mapping[str, tuple[int, tuple[Any, ...]]]] = {
    "C_Initialize": (0, (_PTR,)),
    "C_Finalize": (1, (_PTR,)),
    "C_GetTokenInfo": (6, (_ULONG, _PTR)),
    "C_GetSessionInfo": (15, (_ULONG, _PTR)),
    "C_Login": (18, (_ULONG, _ULONG, _PTR, _ULONG)),
    "C_CreateObject": (20, (_ULONG, _PTR, _ULONG, _PTR)),
    "C_DestroyObject": (22, (_ULONG, _ULONG)),
    "C_GetAttributeValue": (24, (_ULONG, _ULONG, _PTR, _ULONG)),
    "C_SetAttributeValue": (25, (_ULONG, _ULONG, _PTR, _ULONG)),
    "C_FindObjectsInit": (26, (_ULONG, _PTR, _ULONG)),
    "C_FindObjects": (27, (_ULONG, _PTR, _ULONG, _PTR)),
    "C_FindObjectsFinal": (28, (_ULONG,)),
    "C_EncryptInit": (29, (_ULONG, _PTR, _ULONG)),
    "C_Encrypt": (30, (_ULONG, _PTR, _ULONG, _PTR, _PTR)),
    "C_DecryptInit": (33, (_ULONG, _PTR, _ULONG)),
    "C_Decrypt": (34, (_ULONG, _PTR, _ULONG, _PTR, _PTR)),
    "C_SignInit": (42, (_ULONG, _PTR, _ULONG)),
    "C_Sign": (43, (_ULONG, _PTR, _ULONG, _PTR, _PTR)),
    "C_WrapKey": (60, (_ULONG, _PTR, _ULONG, _ULONG, _PTR, _PTR)),
    "C_UnwrapKey": (61, (_ULONG, _PTR, _ULONG, _PTR, _ULONG, _PTR, _ULONG, _PTR)),
    "C_DeriveKey": (62, (_ULONG, _PTR, _ULONG, _PTR, _ULONG, _PTR)),
}

# CKR_ codes under the names that python-pkcs11 gives to its exceptions.
_CODES: Final[Mapping[int, str]] = {
    0x02: "HostMemory",
    0x03: "SlotIDInvalid",
    0x05: "GeneralError",
    0x06: "FunctionFailed",
    0x07: "ArgumentsBad",
    0x0A: "CantLock",
    0x10: "AttributeReadOnly",
    0x11: "AttributeSensitive",
    0x12: "AttributeTypeInvalid",
    0x13: "AttributeValueInvalid",
    0x1B: "ActionProhibited",
    0x20: "DataInvalid",
    0x21: "DataLenRange",
    0x30: "DeviceError",
    0x31: "DeviceMemory",
    0x32: "DeviceRemoved",
    0x40: "EncryptedDataInvalid",
    0x41: "EncryptedDataLenRange",
    0x42: "AEADDecryptFailed",
    0x50: "FunctionCancelled",
    0x54: "FunctionNotSupported",
    0x60: "KeyHandleInvalid",
    0x62: "KeySizeRange",
    0x63: "KeyTypeInconsistent",
    0x68: "KeyFunctionNotPermitted",
    0x69: "KeyNotWrappable",
    0x6A: "KeyUnextractable",
    0x70: "MechanismInvalid",
    0x71: "MechanismParamInvalid",
    0x82: "ObjectHandleInvalid",
    0x90: "OperationActive",
    0x91: "OperationNotInitialized",
    0xA0: "PinIncorrect",
    0xA1: "PinInvalid",
    0xA2: "PinLenRange",
    0xA3: "PinExpired",
    0xA4: "PinLocked",
    0xB0: "SessionClosed",
    0xB1: "SessionCount",
    0xB3: "SessionHandleInvalid",
    0xB5: "SessionReadOnly",
    0xB7: "SessionReadOnlyExists",
    0xD0: "TemplateIncomplete",
    0xD1: "TemplateInconsistent",
    0xE0: "TokenNotPresent",
    0xE1: "TokenNotRecognised",
    0xE2: "TokenWriteProtected",
    0xF0: "UnwrappingKeyHandleInvalid",
    0xF1: "UnwrappingKeySizeRange",
    0xF2: "UnwrappingKeyTypeInconsistent",
    0x100: "UserAlreadyLoggedIn",
    0x101: "UserNotLoggedIn",
    0x102: "UserPinNotInitialized",
    0x103: "UserTypeInvalid",
    0x104: "AnotherUserAlreadyLoggedIn",
    0x105: "UserTooManyTypes",
    0x110: "WrappedKeyInvalid",
    0x112: "WrappedKeyLenRange",
    0x113: "WrappingKeyHandleInvalid",
    0x150: "BufferTooSmall",
    0x190: "CryptokiNotInitialized",
    0x191: "CryptokiAlreadyInitialized",
}


def code_name(code: int) -> str:
    """The name of a return code, or its number in hex."""
    return _CODES.get(code, f"0x{code:x}")


class CkError(RuntimeError):
    """A call answered something other than CKR_OK; ``reason`` is the code's name."""

    def __init__(self, call: str, code: int) -> None:
        self.call = call
        self.code = code
        self.reason = code_name(code)
        super().__init__(f"{call}: {self.reason}")


class _InitArgs(ctypes.Structure):
    _fields_ = (
        *((name, _PTR) for name in ("create", "destroy", "lock", "unlock")),
        ("flags", _ULONG),
        ("reserved", _PTR),
    )


class _Mechanism(ctypes.Structure):
    _fields_ = (("mechanism", _ULONG), ("parameter", _PTR), ("length", _ULONG))


class _Attribute(ctypes.Structure):
    _fields_ = (("type", _ULONG), ("value", _PTR), ("length", _ULONG))


class _Gcm(ctypes.Structure):
    _fields_ = (
        ("iv", _PTR),
        ("iv_length", _ULONG),
        ("iv_bits", _ULONG),
        ("aad", _PTR),
        ("aad_length", _ULONG),
        ("tag_bits", _ULONG),
    )


class _Oaep(ctypes.Structure):
    _fields_ = (
        ("hash", _ULONG),
        ("mgf", _ULONG),
        ("source", _ULONG),
        ("label", _PTR),
        ("label_length", _ULONG),
    )


class _Ecdh(ctypes.Structure):
    _fields_ = (
        ("kdf", _ULONG),
        ("shared_length", _ULONG),
        ("shared", _PTR),
        ("public_length", _ULONG),
        ("public", _PTR),
    )


class _Pss(ctypes.Structure):
    _fields_ = (("hash", _ULONG), ("mgf", _ULONG), ("salt", _ULONG))


class _TokenInfo(ctypes.Structure):
    _fields_ = (
        ("text", ctypes.c_char * 96),
        ("flags", _ULONG),
        ("max_sessions", _ULONG),
        ("sessions", _ULONG),
        ("max_rw_sessions", _ULONG),
        ("rw_sessions", _ULONG),
        ("rest", _ULONG * 6),
        ("versions", ctypes.c_ubyte * 4),
        ("time", ctypes.c_char * 16),
    )


class _SessionInfo(ctypes.Structure):
    _fields_ = (("slot", _ULONG), ("state", _ULONG), ("flags", _ULONG), ("device_error", _ULONG))


@dataclass(frozen=True)
class TokenCounts:
    """Flags and session numbers of CK_TOKEN_INFO; None where the token does not say."""

    flags: int
    sessions: int | None
    max_sessions: int | None


class Parameters:
    """A CK_MECHANISM with its parameter, which lives as long as this object does."""

    def __init__(self, mechanism: int, parameter: ctypes.Structure | None = None, *keep: Any):
        self._keep = (parameter, *keep)
        self._struct = _Mechanism(
            mechanism,
            ctypes.cast(ctypes.pointer(parameter), _PTR) if parameter is not None else None,
            ctypes.sizeof(parameter) if parameter is not None else 0,
        )
        self.pointer = ctypes.byref(self._struct)

    @classmethod
    def gcm(cls, mechanism: int, iv: bytearray, aad: bytes) -> Parameters:
        """AES-GCM with a tag of 128 bits; the token may write its own ``iv`` back."""
        place = (ctypes.c_char * len(iv)).from_buffer(iv)
        extra = ctypes.create_string_buffer(aad, len(aad)) if aad else None
        parameter = _Gcm(_at(place), len(iv), 8 * len(iv), _at(extra), len(aad), 128)
        return cls(mechanism, parameter, place, extra)

    @classmethod
    def oaep(cls, mechanism: int, digest: int, mgf: int, label: bytes) -> Parameters:
        """RSA-OAEP (RFC 8017, section 7.1)."""
        place = ctypes.create_string_buffer(label, len(label)) if label else None
        # CKZ_DATA_SPECIFIED is the only source there is.
        return cls(mechanism, _Oaep(digest, mgf, 1, _at(place), len(label)), place)

    @classmethod
    def ecdh(cls, mechanism: int, point: bytes) -> Parameters:
        """ECDH without a key derivation function (CKD_NULL)."""
        place = ctypes.create_string_buffer(point, len(point))
        return cls(mechanism, _Ecdh(1, 0, None, len(point), _at(place)), place)

    @classmethod
    def pss(cls, mechanism: int, digest: int, mgf: int, salt: int) -> Parameters:
        """RSA-PSS (RFC 8017, section 8.1)."""
        return cls(mechanism, _Pss(digest, mgf, salt))


def _at(place: Any) -> int | None:
    return None if place is None else ctypes.addressof(place)


class _Template:
    """A CK_ATTRIBUTE array; values are bool, int (CK_ULONG) or bytes-like."""

    def __init__(self, attributes: Mapping[int, bool | int | Buffer]) -> None:
        self._values = [bytearray(_pack(value)) for value in attributes.values()]
        self._places = [(ctypes.c_char * len(value)).from_buffer(value) for value in self._values]
        self.count = len(self._values)
        self.array = (_Attribute * self.count)(
            *(
                _Attribute(kind, _at(place), len(value))
                for kind, place, value in zip(attributes, self._places, self._values, strict=True)
            )
        )

    def wipe(self) -> None:
        for value in self._values:
            wipe(value)


def _pack(value: bool | int | Buffer) -> Buffer:
    if isinstance(value, bool):
        return bytes([value])
    if isinstance(value, int):
        return bytes(_ULONG(value))
    return value


class Cryptoki:
    """The function table of one module file.

    Raises:
        OSError: the file cannot be loaded.
        AttributeError: it is no PKCS#11 module.
    """

    def __init__(self, path: str) -> None:
        get_list = ctypes.CDLL(path).C_GetFunctionList
        get_list.restype = _ULONG
        table = _PTR()
        _check("C_GetFunctionList", get_list(ctypes.byref(table)))
        if not table.value:
            raise AttributeError("C_GetFunctionList")
        # The version is followed by padding to the size of a pointer.
        entries = (_PTR * 68).from_address(table.value + ctypes.sizeof(_PTR))
        self._calls = {
            name: ctypes.CFUNCTYPE(_ULONG, *arguments)(entries[index] or 0)
            for name, (index, arguments) in _CALLS.items()
        }

    def _call(self, name: str, *arguments: Any) -> None:
        _check(name, self._calls[name](*arguments))

    def initialize(self, init_args: str | None, *, locking: bool) -> None:
        """C_Initialize, with OS locking unless the module cannot."""
        arguments = _InitArgs(flags=_OS_LOCKING if locking else 0)
        if init_args is not None:
            # NSS keeps pointers into it in some versions, so it stays.
            self._init_args = ctypes.create_string_buffer(init_args.encode())
            arguments.reserved = ctypes.addressof(self._init_args)
        plain = init_args is None and not locking
        self._call("C_Initialize", None if plain else ctypes.byref(arguments))

    def finalize(self) -> None:
        """C_Finalize: every session of this process with this module ends."""
        self._call("C_Finalize", None)

    def token_counts(self, slot: int) -> TokenCounts:
        """C_GetTokenInfo, of which python-pkcs11 leaves the session numbers out."""
        info = _TokenInfo()
        self._call("C_GetTokenInfo", slot, ctypes.byref(info))
        # 0 is CK_EFFECTIVELY_INFINITE for the maximum.
        return TokenCounts(
            info.flags,
            None if info.sessions == UNKNOWN else info.sessions,
            None if info.max_sessions in (UNKNOWN, 0) else info.max_sessions,
        )

    def logged_in(self, session: int) -> bool:
        """Whether the normal user is logged in, as this session sees it."""
        info = _SessionInfo()
        self._call("C_GetSessionInfo", session, ctypes.byref(info))
        return info.state in (1, 3)  # CKS_RO_USER_FUNCTIONS, CKS_RW_USER_FUNCTIONS

    def login(self, session: int, pin: bytearray | None) -> None:
        """C_Login as the normal user; without a PIN, at the reader's own pad."""
        place = (ctypes.c_char * len(pin)).from_buffer(pin) if pin else None
        self._call("C_Login", session, 1, _at(place), len(pin or b""))

    def encrypt(self, session: int, how: Parameters, key: int, data: Buffer) -> bytes:
        """C_Encrypt in one part."""
        return bytes(self._transform("Encrypt", session, how, key, data))

    def decrypt(self, session: int, how: Parameters, key: int, data: bytes) -> bytearray:
        """C_Decrypt in one part; the caller wipes what it gets."""
        return self._transform("Decrypt", session, how, key, data)

    def sign(self, session: int, how: Parameters, key: int, data: bytes) -> bytes:
        """C_Sign in one part."""
        return bytes(self._transform("Sign", session, how, key, data))

    def _transform(
        self, verb: str, session: int, how: Parameters, key: int, data: Buffer
    ) -> bytearray:
        source = bytearray(data)
        room = max(MAX_OUTPUT, len(source) + 64)
        output, length = bytearray(room), _ULONG(room)
        given = (ctypes.c_char * len(source)).from_buffer(source)
        place = (ctypes.c_char * room).from_buffer(output)
        try:
            self._call(f"C_{verb}Init", session, how.pointer, key)
            self._call(
                f"C_{verb}", session, _at(given), len(source), _at(place), ctypes.byref(length)
            )
            return output[: length.value]
        finally:
            wipe(source)
            wipe(output)

    def create(self, session: int, attributes: Mapping[int, bool | int | Buffer]) -> int:
        """C_CreateObject: the handle of a new object."""
        template, handle = _Template(attributes), _ULONG()
        try:
            self._call(
                "C_CreateObject", session, template.array, template.count, ctypes.byref(handle)
            )
            return handle.value
        finally:
            template.wipe()

    def destroy(self, session: int, handle: int) -> None:
        """C_DestroyObject."""
        self._call("C_DestroyObject", session, handle)

    def find(self, session: int, attributes: Mapping[int, bool | int | Buffer]) -> list[int]:
        """The handles of all objects with these attributes."""
        template = _Template(attributes)
        found: list[int] = []
        batch, count = (_ULONG * 64)(), _ULONG()
        self._call("C_FindObjectsInit", session, template.array, template.count)
        try:
            while True:
                self._call("C_FindObjects", session, batch, len(batch), ctypes.byref(count))
                if not count.value:
                    return found
                found += batch[: count.value]
        finally:
            # A failure of the search itself is the one to tell.
            self._calls["C_FindObjectsFinal"](session)

    def change(
        self, session: int, handle: int, attributes: Mapping[int, bool | int | Buffer]
    ) -> None:
        """C_SetAttributeValue."""
        template = _Template(attributes)
        self._call("C_SetAttributeValue", session, handle, template.array, template.count)

    def read(self, session: int, handle: int, attribute: int, size: int) -> bytearray:
        """One attribute of at most ``size`` bytes; the caller wipes it where it is secret."""
        value = bytearray(size)
        place = (ctypes.c_char * size).from_buffer(value)
        entry = _Attribute(attribute, _at(place), size)
        self._call("C_GetAttributeValue", session, handle, ctypes.byref(entry), 1)
        if entry.length > size:
            # Some tokens say "unavailable" together with CKR_OK.
            unavailable = entry.length == UNKNOWN
            raise CkError("C_GetAttributeValue", 0x12 if unavailable else 0x150)
        try:
            return value[: entry.length]
        finally:
            wipe(value)

    def wrap_key(self, session: int, how: Parameters, key: int, target: int) -> bytes:
        """C_WrapKey."""
        output, length = (ctypes.c_char * MAX_OUTPUT)(), _ULONG(MAX_OUTPUT)
        self._call("C_WrapKey", session, how.pointer, key, target, output, ctypes.byref(length))
        return output.raw[: length.value]

    def unwrap_key(
        self,
        session: int,
        how: Parameters,
        key: int,
        blob: bytes,
        attributes: Mapping[int, bool | int | Buffer],
    ) -> int:
        """C_UnwrapKey: the handle of the key that came out."""
        template, handle = _Template(attributes), _ULONG()
        given = ctypes.create_string_buffer(blob, len(blob))
        self._call(
            "C_UnwrapKey",
            *(session, how.pointer, key, given, len(blob)),
            *(template.array, template.count, ctypes.byref(handle)),
        )
        return handle.value

    def derive(
        self,
        session: int,
        how: Parameters,
        key: int,
        attributes: Mapping[int, bool | int | Buffer],
    ) -> int:
        """C_DeriveKey: the handle of the derived secret."""
        template, handle = _Template(attributes), _ULONG()
        self._call(
            "C_DeriveKey",
            *(session, how.pointer, key),
            *(template.array, template.count, ctypes.byref(handle)),
        )
        return handle.value


def _check(call: str, code: int) -> None:
    if code:
        raise CkError(call, code)
