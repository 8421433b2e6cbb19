"""The functions of a PKCS#11 module, called through its own function table.

Rules: secrets go in and come out in buffers that are wiped; the module's exact return code is kept;
initialisation asks for locking; the IV is read back, since some tokens make their own; lengths and
counts that a module reports are not trusted (NSS softokn reports the length of a GCM ciphertext
without its tag). No second binding calls the module: p11-kit gives each caller of
C_GetFunctionList a table with sessions of its own. ctypes releases the GIL during each call.

The layout is that of PKCS#11 2.40, pkcs11t.h and pkcs11f.h, for Unix (natural alignment).
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from keymgmt.backend import wipe
from keymgmt_pkcs11._errors import CkError, Ckr

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Template = Mapping[Any, bool | int | Buffer]

__all__ = [
    "MAX_OUTPUT",
    "ULONG_SIZE",
    "CkMechanism",
    "Cryptoki",
    "LibraryInfo",
    "TokenInfo",
    "Verb",
]

Verb = Literal["Encrypt", "Decrypt", "Sign"]
_ULONG = ctypes.c_ulong
_PTR = ctypes.c_void_p
_char = ctypes.c_char
ULONG_SIZE: Final = ctypes.sizeof(_ULONG)
UNKNOWN: Final = _ULONG(-1).value  # CK_UNAVAILABLE_INFORMATION
_NO_NUMBER: Final = UNKNOWN - 1  # openCryptoki answers this in place of UNKNOWN
_OS_LOCKING: Final = 2  # CKF_OS_LOCKING_OK
_RW_SESSION: Final = 2  # CKF_RW_SESSION
_SERIAL_SESSION: Final = 4  # CKF_SERIAL_SESSION
MAX_OUTPUT: Final = 1024  # bytes: the modulus of an RSA key of 8192 bits, the largest output
_Output = _char * MAX_OUTPUT
_ZEROS: Final = bytes(MAX_OUTPUT)
# The longest lists that are accepted from a module.
MAX_NUMBERS: Final = 4096
MAX_OBJECTS: Final = 65536

# Name -> index in CK_FUNCTION_LIST and argument types.
_CALLS: Final[Mapping[str, tuple[int, tuple[Any, ...]]]] = {
    "C_Initialize": (0, (_PTR,)),
    "C_Finalize": (1, (_PTR,)),
    "C_GetInfo": (2, (_PTR,)),
    "C_GetSlotList": (4, (ctypes.c_ubyte, _PTR, _PTR)),
    "C_GetSlotInfo": (5, (_ULONG, _PTR)),
    "C_GetTokenInfo": (6, (_ULONG, _PTR)),
    "C_GetMechanismList": (7, (_ULONG, _PTR, _PTR)),
    "C_OpenSession": (12, (_ULONG, _ULONG, _PTR, _PTR, _PTR)),
    "C_CloseSession": (13, (_ULONG,)),
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
    "C_GenerateKey": (58, (_ULONG, _PTR, _PTR, _ULONG, _PTR)),
    "C_GenerateKeyPair": (59, (_ULONG, _PTR, _PTR, _ULONG, _PTR, _ULONG, _PTR, _PTR)),
    "C_WrapKey": (60, (_ULONG, _PTR, _ULONG, _ULONG, _PTR, _PTR)),
    "C_UnwrapKey": (61, (_ULONG, _PTR, _ULONG, _PTR, _ULONG, _PTR, _ULONG, _PTR)),
    "C_DeriveKey": (62, (_ULONG, _PTR, _ULONG, _PTR, _ULONG, _PTR)),
}


def _structure(**fields: Any) -> Any:
    return type("CK_", (ctypes.Structure,), {"_fields_": tuple(fields.items())})


_InitArgs: Final = _structure(
    create=_PTR, destroy=_PTR, lock=_PTR, unlock=_PTR, flags=_ULONG, reserved=_PTR
)
_Attribute: Final = _structure(type=_ULONG, value=_PTR, length=_ULONG)
_Version: Final = _structure(major=ctypes.c_ubyte, minor=ctypes.c_ubyte)
_Info: Final = _structure(
    cryptoki=_Version,
    manufacturer=_char * 32,
    flags=_ULONG,
    description=_char * 32,
    library=_Version,
)
_SlotInfo: Final = _structure(
    description=_char * 64, manufacturer=_char * 32, flags=_ULONG, versions=_Version * 2
)
_TokenInfo: Final = _structure(
    label=_char * 32,
    manufacturer=_char * 32,
    model=_char * 16,
    serial=_char * 16,
    flags=_ULONG,
    max_sessions=_ULONG,
    sessions=_ULONG,
    rest=_ULONG * 8,
    versions=_Version * 2,
    time=_char * 16,
)
_SessionInfo: Final = _structure(slot=_ULONG, state=_ULONG, flags=_ULONG, device_error=_ULONG)


@dataclass(frozen=True)
class LibraryInfo:
    """CK_INFO: the module's own description."""

    manufacturer: str
    description: str
    version: tuple[int, int]
    speaks: tuple[int, int]


@dataclass(frozen=True)
class TokenInfo:
    """CK_TOKEN_INFO; a number that the token does not tell is None."""

    slot: int
    label: str
    manufacturer: str
    model: str
    serial: str
    flags: int
    sessions: int | None
    max_sessions: int | None

    def __str__(self) -> str:
        return f"{self.label or '(no label)'!r} serial {self.serial} in slot {self.slot}"


def _text(structure: ctypes.Structure, name: str) -> str:
    """A padded text of fixed length; a space stands for each character that is not printable."""
    field = getattr(type(structure), name)
    raw = ctypes.string_at(ctypes.addressof(structure) + field.offset, field.size)
    text = raw.decode("utf-8", "replace").strip("\0 ")
    return "".join(char if char.isprintable() else " " for char in text)


class CkMechanism:
    """A CK_MECHANISM with its parameter, in one buffer that lives as long as this object does.

    Every member of a parameter is as long as a CK_ULONG: a number, or a pointer to bytes, which
    stand behind the structures.
    """

    def __init__(self, code: int, *members: int | bytes) -> None:
        texts = [each for each in members if isinstance(each, bytes)]
        self._head = ULONG_SIZE * (3 + len(members))
        self._buffer = array("B", b"".join((bytes(self._head), *texts)))
        self.pointer = start = self._buffer.buffer_info()[0]
        parameter = start + 3 * ULONG_SIZE if members else 0
        words = [code, parameter, ULONG_SIZE * len(members)]
        address = start + self._head
        for each in members:
            if isinstance(each, bytes):
                words.append(address if each else 0)
                address += len(each)
            else:
                words.append(each)
        struct.pack_into(f"{len(words)}N", self._buffer, 0, *words)

    @classmethod
    def gcm(cls, code: int, iv: bytes, aad: bytes) -> CkMechanism:
        """AES-GCM with a tag of 128 bits; the token may write another IV over ``iv``."""
        return cls(code, iv, len(iv), 8 * len(iv), aad, len(aad), 128)

    @classmethod
    def oaep(cls, code: int, digest: int, mgf: int) -> CkMechanism:
        """RSA-OAEP (RFC 8017, section 7.1) with an empty label."""
        # 1 is CKZ_DATA_SPECIFIED, the only source of a label that the standard has.
        return cls(code, digest, mgf, 1, b"", 0)

    @classmethod
    def ecdh(cls, code: int, point: bytes) -> CkMechanism:
        """ECDH without a key derivation function (CKD_NULL)."""
        return cls(code, 1, 0, 0, len(point), point)

    def first(self, length: int) -> bytes:
        """``length`` bytes from the address in the first pointer of the parameter: GCM's IV."""
        return self._buffer[self._head : self._head + length].tobytes()


def _at(buffer: Any) -> int | None:
    return None if buffer is None else ctypes.addressof(buffer)


def _argument(data: bytes | bytearray) -> Any:
    """The ctypes argument for a buffer, which is not copied."""
    return data if isinstance(data, bytes) else (_char * len(data)).from_buffer(data)


class _Template:
    """A CK_ATTRIBUTE array; values are bool, int (CK_ULONG) or bytes-like."""

    def __init__(self, attributes: Template) -> None:
        self._values = [bytearray(_pack(value)) for value in attributes.values()]
        self._buffers = [(_char * len(value)).from_buffer(value) for value in self._values]
        self.count = len(self._values)
        self.array = (_Attribute * self.count)(
            *(
                _Attribute(kind, _at(buffer), len(value))
                for kind, buffer, value in zip(attributes, self._buffers, self._values, strict=True)
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
        AttributeError: the file is not a PKCS#11 module.
    """

    def __init__(self, path: str) -> None:
        get_list = ctypes.CDLL(path).C_GetFunctionList
        get_list.restype = _ULONG
        table = _PTR()
        if code := get_list(ctypes.byref(table)):
            raise CkError("C_GetFunctionList", code)
        if not table.value:
            raise AttributeError("C_GetFunctionList")
        # The version is followed by padding to the size of a pointer.
        entries = (_PTR * 68).from_address(table.value + ctypes.sizeof(_PTR))
        self._calls = {
            name: ctypes.CFUNCTYPE(_ULONG, *arguments)(entries[index] or 0)
            for name, (index, arguments) in _CALLS.items()
        }

    def _call(self, name: str, *arguments: Any) -> None:
        code = self._calls[name](*arguments)
        if code:
            raise CkError(name, code)

    def initialize(self, init_args: str | None, *, locking: bool) -> None:
        """C_Initialize, with CKF_OS_LOCKING_OK where ``locking`` is true."""
        arguments = _InitArgs(flags=_OS_LOCKING if locking else 0)
        if init_args is not None:
            # Some versions of NSS keep pointers into this string, so it is never freed.
            self._init_args = ctypes.create_string_buffer(init_args.encode())
            arguments.reserved = ctypes.addressof(self._init_args)
        plain = init_args is None and not locking
        self._call("C_Initialize", None if plain else ctypes.byref(arguments))

    def finalize(self) -> None:
        """C_Finalize: every session of this process with this module ends."""
        self._call("C_Finalize", None)

    def info(self) -> LibraryInfo:
        """C_GetInfo."""
        info = _Info()
        self._call("C_GetInfo", ctypes.byref(info))
        return LibraryInfo(
            _text(info, "manufacturer"),
            _text(info, "description"),
            (info.library.major, info.library.minor),
            (info.cryptoki.major, info.cryptoki.minor),
        )

    def slots(self) -> list[int]:
        """C_GetSlotList of the slots with a token in them, at most 4096."""
        return self._numbers("C_GetSlotList", 1)

    def mechanisms(self, slot: int) -> list[int]:
        """C_GetMechanismList, at most 4096; the token may still refuse a listed mechanism."""
        return self._numbers("C_GetMechanismList", slot)

    def _numbers(self, name: str, argument: int) -> list[int]:
        count = _ULONG()
        # A module looks for new tokens only in a call without a buffer (PKCS#11 2.40,
        # C_GetSlotList).
        self._call(name, argument, None, ctypes.byref(count))
        room = min(count.value + 16, MAX_NUMBERS)
        numbers, count = (_ULONG * room)(), _ULONG(room)
        self._call(name, argument, numbers, ctypes.byref(count))
        return list(numbers[: min(count.value, room)])

    def slot_texts(self, slot: int) -> tuple[str, str]:
        """Description and manufacturer of C_GetSlotInfo."""
        info = _SlotInfo()
        self._call("C_GetSlotInfo", slot, ctypes.byref(info))
        return _text(info, "description"), _text(info, "manufacturer")

    def token_info(self, slot: int) -> TokenInfo:
        """C_GetTokenInfo."""
        info = _TokenInfo()
        self._call("C_GetTokenInfo", slot, ctypes.byref(info))
        return TokenInfo(
            slot,
            _text(info, "label"),
            _text(info, "manufacturer"),
            _text(info, "model"),
            _text(info, "serial"),
            info.flags,
            None if info.sessions >= _NO_NUMBER else info.sessions,
            # 0 is CK_EFFECTIVELY_INFINITE.
            None if not 0 < info.max_sessions < _NO_NUMBER else info.max_sessions,
        )

    def open_session(self, slot: int, *, writing: bool) -> int:
        """C_OpenSession."""
        handle = _ULONG()
        flags = _SERIAL_SESSION | (_RW_SESSION if writing else 0)
        self._call("C_OpenSession", slot, flags, None, None, ctypes.byref(handle))
        return handle.value

    def close_session(self, session: int) -> None:
        """C_CloseSession."""
        self._call("C_CloseSession", session)

    def logged_in(self, session: int) -> bool:
        """Whether the state of this session says that a user is logged in, of whatever kind."""
        info = _SessionInfo()
        self._call("C_GetSessionInfo", session, ctypes.byref(info))
        return info.state not in (0, 2)  # CKS_RO_PUBLIC_SESSION, CKS_RW_PUBLIC_SESSION

    def login(self, session: int, user: int, pin: bytearray | None) -> None:
        """C_Login; without a PIN, the user types it at the PIN pad of the token."""
        buffer = (_char * len(pin)).from_buffer(pin) if pin else None
        self._call("C_Login", session, user, _at(buffer), len(pin or b""))

    def apply(
        self,
        verb: Verb,
        session: int,
        mechanism: CkMechanism,
        key: int,
        data: Buffer,
        approve: Callable[[], None] | None = None,
    ) -> bytearray:
        """C_Encrypt, C_Decrypt or C_Sign in one part; the caller wipes the result.

        Args:
            verb: the operation.
            session: handle of the session.
            mechanism: the mechanism.
            key: handle of the key.
            data: the input; anything but ``bytes`` is a secret, of which no copy stays.
            approve: called between C_*Init and the operation itself, where a key with
                CKA_ALWAYS_AUTHENTICATE requires the login.
        """
        source = data if isinstance(data, bytes) else bytearray(data)
        output, length = _Output(), _ULONG(MAX_OUTPUT)
        try:
            self._call(f"C_{verb}Init", session, mechanism.pointer, key)
            if approve is not None:
                approve()
            self._call(
                f"C_{verb}", session, _argument(source), len(source), output, ctypes.byref(length)
            )
            return bytearray(memoryview(output)[: length.value])
        finally:
            output.raw = _ZEROS
            if isinstance(source, bytearray):
                wipe(source)

    def create(self, session: int, attributes: Template) -> int:
        """C_CreateObject: the handle of a new object."""
        return self._new_handle("C_CreateObject", attributes, session)

    def generate(self, session: int, mechanism: CkMechanism, attributes: Template) -> int:
        """C_GenerateKey: the handle of a new secret key."""
        return self._new_handle("C_GenerateKey", attributes, session, mechanism.pointer)

    def generate_pair(
        self, session: int, mechanism: CkMechanism, public: Template, private: Template
    ) -> tuple[int, int]:
        """C_GenerateKeyPair: the handles of the public and the private key."""
        halves, first, second = [_Template(public), _Template(private)], _ULONG(), _ULONG()
        self._call(
            "C_GenerateKeyPair",
            *(session, mechanism.pointer),
            *(part for half in halves for part in (half.array, half.count)),
            *(ctypes.byref(first), ctypes.byref(second)),
        )
        return first.value, second.value

    def unwrap_key(
        self, session: int, mechanism: CkMechanism, key: int, blob: bytes, attributes: Template
    ) -> int:
        """C_UnwrapKey: the handle of the unwrapped key."""
        arguments = (session, mechanism.pointer, key, blob, len(blob))
        return self._new_handle("C_UnwrapKey", attributes, *arguments)

    def derive(self, session: int, mechanism: CkMechanism, key: int, attributes: Template) -> int:
        """C_DeriveKey: the handle of the derived secret."""
        return self._new_handle("C_DeriveKey", attributes, session, mechanism.pointer, key)

    def _new_handle(self, name: str, attributes: Template, *arguments: Any) -> int:
        template, handle = _Template(attributes), _ULONG()
        try:
            self._call(name, *arguments, template.array, template.count, ctypes.byref(handle))
            return handle.value
        finally:
            template.wipe()

    def destroy(self, session: int, handle: int) -> None:
        """C_DestroyObject."""
        self._call("C_DestroyObject", session, handle)

    def find(self, session: int, attributes: Template) -> list[int]:
        """The handles of all objects with these attributes, at most 65536."""
        template = _Template(attributes)
        handles: list[int] = []
        batch, count = (_ULONG * 64)(), _ULONG()
        self._call("C_FindObjectsInit", session, template.array, template.count)
        try:
            while len(handles) < MAX_OBJECTS:
                self._call("C_FindObjects", session, batch, len(batch), ctypes.byref(count))
                if not count.value:
                    break
                handles += batch[: min(count.value, len(batch))]
            return handles
        finally:
            # Not by _call: an error here would hide that of the search.
            self._calls["C_FindObjectsFinal"](session)

    def change(self, session: int, handle: int, attributes: Template) -> None:
        """C_SetAttributeValue."""
        template = _Template(attributes)
        self._call("C_SetAttributeValue", session, handle, template.array, template.count)

    def read(self, session: int, handle: int, attribute: int, size: int) -> bytearray:
        """One attribute of at most ``size`` bytes; the caller wipes it where it is secret."""
        value = bytearray(size)
        buffer = (_char * size).from_buffer(value)
        entry = _Attribute(attribute, _at(buffer), size)
        self._call("C_GetAttributeValue", session, handle, ctypes.byref(entry), 1)
        if entry.length > size:
            # Some tokens answer CK_UNAVAILABLE_INFORMATION together with CKR_OK.
            unavailable = entry.length == UNKNOWN
            code = Ckr.ATTRIBUTE_TYPE_INVALID if unavailable else Ckr.BUFFER_TOO_SMALL
            raise CkError("C_GetAttributeValue", code)
        try:
            return value[: entry.length]
        finally:
            wipe(value)

    def read_many(self, session: int, handle: int, sizes: Mapping[int, int]) -> dict[int, bytes]:
        """Read several public attributes in one call.

        Args:
            session: handle of the session.
            handle: handle of the object.
            sizes: attribute -> largest length of its value, bytes.

        Returns:
            The values by attribute. An attribute that the module did not write is missing; ``read``
            may still give it.
        """
        buffers = [ctypes.create_string_buffer(_UNTOUCHED * size, size) for size in sizes.values()]
        entries = (_Attribute * len(sizes))(
            *(
                _Attribute(kind, _at(buffer), size)
                for (kind, size), buffer in zip(sizes.items(), buffers, strict=True)
            )
        )
        code = self._calls["C_GetAttributeValue"](session, handle, entries, len(entries))
        if code and code not in _PARTIAL:
            raise CkError("C_GetAttributeValue", code)
        values = {}
        for entry, buffer, (kind, size) in zip(entries, buffers, sizes.items(), strict=True):
            # Some modules stop at the first attribute that an object does not have, and leave the
            # buffers of the others untouched.
            if not entry.length or (entry.length <= size and buffer.raw != _UNTOUCHED * size):
                values[kind] = buffer.raw[: entry.length]
        return values

    def wrap_key(self, session: int, mechanism: CkMechanism, key: int, target: int) -> bytes:
        """C_WrapKey."""
        output, length = (_char * MAX_OUTPUT)(), _ULONG(MAX_OUTPUT)
        self._call(
            "C_WrapKey", session, mechanism.pointer, key, target, output, ctypes.byref(length)
        )
        return output.raw[: length.value]


_UNTOUCHED: Final = b"\xa5"
# With these return codes C_GetAttributeValue has still read the other attributes (PKCS#11 2.40,
# section 5.7.5).
_PARTIAL: Final = frozenset(
    {
        Ckr.ATTRIBUTE_SENSITIVE,
        Ckr.ATTRIBUTE_TYPE_INVALID,
        Ckr.BUFFER_TOO_SMALL,
    }
)
