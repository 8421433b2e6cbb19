"""``[providers.NAME]`` with ``backend = "pkcs11"``: module, token, PIN, and the key map."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pkcs11 import Attribute
from pydantic import Field, field_validator, model_validator

from keymgmt.backend import ConfigPath, KeyName, SecretSource, Settings, is_key
from keymgmt_pkcs11._uri import parse_uri

__all__ = ["CreateSettings", "KeyEntry", "Pkcs11Settings"]

# Attributes that keymgmt sets itself: they make a key safe, or come from another setting.
_OURS: Final = frozenset(
    {
        *("CLASS", "KEY_TYPE", "TOKEN", "PRIVATE", "SENSITIVE", "EXTRACTABLE", "MODIFIABLE"),
        *("ALWAYS_SENSITIVE", "NEVER_EXTRACTABLE", "LOCAL", "ALLOWED_MECHANISMS", "LABEL", "ID"),
        *("ENCRYPT", "DECRYPT", "WRAP", "UNWRAP", "SIGN", "VERIFY", "DERIVE", "VALUE"),
        *("VALUE_LEN", "MODULUS_BITS", "EC_PARAMS"),
    }
)
Promise = Literal[
    "private",
    "sensitive",
    "always_sensitive",
    "extractable",
    "never_extractable",
    "modifiable",
    "usages",
]
"""A property that every wrapping key should have, and that ``allow`` may waive for one key."""

_Hex = Annotated[str, Field(pattern=r"^(?:[0-9a-fA-F]{2}){1,64}$")]


class KeyEntry(Settings):
    """The name of one key in the token, and the rules for that key.

    Attributes:
        label: CKA_LABEL of every version; the key name itself where it is left out.
        id: CKA_ID in hex, which pins the key to that one version; a new key gets it. Of several,
            each is a version, from oldest to newest; rotation makes the next one of the list.
        mechanism: the only mechanism that this key may be used with.
        allow: properties that this key need not have, although every wrapping key should.
    """

    label: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    id: _Hex | Annotated[tuple[_Hex, ...], Field(strict=False, min_length=1)] | None = None
    mechanism: str | None = None
    allow: tuple[Promise, ...] = Field(default=(), strict=False)

    @property
    def ids(self) -> tuple[bytes, ...]:
        """Each ``id``, from the oldest version to the newest."""
        listed = (self.id,) if isinstance(self.id, str) else self.id or ()
        return tuple(map(bytes.fromhex, listed))


class CreateSettings(Settings):
    """Attributes of the keys that this provider creates.

    Attributes:
        modifiable: CKA_MODIFIABLE; without it a version can be destroyed, but not retired.
        allowed_mechanisms: set CKA_ALLOWED_MECHANISMS to the mechanisms of the kind.
        attributes: more attributes for the template of the secret or private key, where the HSM's
            vendor requires them: a name without ``CKA_``, or a number such as ``0x80000101``, with
            a truth value, a number, or bytes in hex.
    """

    modifiable: bool = True
    allowed_mechanisms: bool = False
    attributes: dict[str, bool | int | str] = Field(default_factory=dict)

    @field_validator("attributes")
    @classmethod
    def _are_additions(cls, attributes: dict[str, Any]) -> dict[str, Any]:
        for name, value in attributes.items():
            if name in _OURS:
                raise ValueError(f"{name} is set by keymgmt and cannot be changed here")
            if name not in Attribute.__members__ and not re.fullmatch(r"0x[0-9a-f]{1,8}", name):
                raise ValueError(f"{name!r} is not an attribute, nor a number like 0x80000101")
            if isinstance(value, str) and not re.fullmatch(r"(?:[0-9a-fA-F]{2})*", value):
                raise ValueError(f"the value of {name} is not hex")
        return attributes

    @property
    def template(self) -> dict[int, bool | int | bytes]:
        """``attributes`` in the form of a PKCS#11 template."""
        return {
            Attribute[name] if name in Attribute.__members__ else int(name, 16): (
                bytes.fromhex(value) if isinstance(value, str) else value
            )
            for name, value in self.attributes.items()
        }


class Pkcs11Settings(Settings):
    """The settings of one token; nothing in a sealed model changes them.

    Attributes:
        module: path of the PKCS#11 library (``.so``) of the HSM's vendor.
        uri: an RFC 7512 URI that names the token, in place of ``token``, ``serial`` and ``slot``.
        token: CKA label of the token.
        serial: its serial number.
        slot: its slot's number. Some modules number slots anew; prefer the serial.
        pin: the source of the PIN.
        login: ``user``; ``protected`` for a PIN pad or card reader; ``none`` for no login.
        user_type: the CKU_ number of the user who logs in: 1 for the normal user, or a number of
            the vendor.
        read_only: refuse to create, rotate, restrict, retire and delete keys.
        timeout: seconds that any call may take, 0.1 to 600.
        sessions: how many sessions are open at most, 1 to 256.
        allow_oaep_sha1: let RSA keys unwrap by OAEP with SHA-1 where the module has nothing else.
        create: attributes of the keys that this provider creates.
        keys: key name -> label and id in the token.
        init_args: string for C_Initialize (pReserved), which only NSS softokn reads.
    """

    module: ConfigPath | None = None
    uri: str | None = None
    token: Annotated[str, Field(min_length=1, max_length=32)] | None = None
    serial: Annotated[str, Field(min_length=1, max_length=16)] | None = None
    slot: Annotated[int, Field(ge=0, lt=1 << 64)] | None = None
    pin: SecretSource | None = None
    login: Literal["user", "protected", "none"] = "user"
    user_type: Annotated[int, Field(ge=1, lt=1 << 32)] = 1
    read_only: bool = False
    timeout: Annotated[float, Field(ge=0.1, le=600)] = 10.0
    sessions: Annotated[int, Field(ge=1, le=256)] = 8
    allow_oaep_sha1: bool = False
    create: CreateSettings = Field(default_factory=CreateSettings)
    keys: dict[KeyName, KeyEntry] = Field(default_factory=dict)
    init_args: Annotated[str, Field(max_length=4096)] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Pkcs11Settings:
        uri = self._from_uri
        if self.uri is not None and any(
            part is not None for part in (self.token, self.serial, self.slot)
        ):
            raise ValueError("name the token by uri, or by token, serial and slot, not by both")
        if (self.module is None) == ("module-path" not in uri):
            raise ValueError("name the library once: module, or module-path in the uri")
        if (self.login == "user") != (self.pin is not None):
            raise ValueError("login = 'user' needs a pin, and any other login has no pin")
        return self

    @property
    def _from_uri(self) -> dict[str, str]:
        return parse_uri(self.uri) if self.uri is not None else {}

    @property
    def library(self) -> Path:
        """The path of the module."""
        return self.module or Path(self._from_uri["module-path"])

    @property
    def selector(self) -> dict[str, str]:
        """Attributes that select the token: RFC 7512 name -> value; empty for the only token."""
        if self.uri is not None:
            return {name: text for name, text in self._from_uri.items() if name != "module-path"}
        parts = {"token": self.token, "serial": self.serial}
        if self.slot is not None:
            parts["slot-id"] = str(self.slot)
        return {name: value for name, value in parts.items() if value is not None}

    def entry(self, key: str) -> KeyEntry:
        """The entry of ``key`` in the table ``keys``; without one, its label is the key name."""
        entry = self.keys.get(key, KeyEntry())
        if entry.label is None and entry.id is None:
            return entry.model_copy(update={"label": key})
        return entry

    def name_of(self, label: str, identifier: bytes) -> str | None:
        """The key name of an object in the token, or None where it has no key name."""
        for name, entry in self.keys.items():
            if (entry.id is None or identifier in entry.ids) and (
                (entry.label or (name if entry.id is None else label)) == label
            ):
                return name
        plain = re.sub(r"\s+", "", label) == label and is_key(label)
        return label if plain and label not in self.keys else None
