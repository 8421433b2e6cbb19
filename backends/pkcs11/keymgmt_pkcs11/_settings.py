"""``[providers.NAME]`` with ``backend = "pkcs11"``: module, token, PIN, and the key map."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator, model_validator

from keymgmt.backend import ConfigError, ConfigPath, SecretSource, Settings, is_key
from keymgmt_pkcs11._uri import Pkcs11Uri

__all__ = ["KeyEntry", "Pkcs11Settings"]

_SELECTORS: Final = frozenset(
    {
        "token",
        "manufacturer",
        "serial",
        "model",
        "library-manufacturer",
        "library-description",
        "library-version",
        "slot-manufacturer",
        "slot-description",
        "slot-id",
    }
)


class KeyEntry(Settings):
    """What one of our key names is called in the token.

    Attributes:
        label: CKA_LABEL of every version; the key name itself where it is left out.
        id: CKA_ID in hex, which pins the key to that one version.
        mechanism: the only mechanism that this key may be used with.
    """

    label: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    id: Annotated[str, Field(pattern=r"^(?:[0-9a-fA-F]{2}){1,64}$")] | None = None
    mechanism: str | None = None


class Pkcs11Settings(Settings):
    """The operator's words for one token; a sealed model never names any of them.

    Attributes:
        module: path of the PKCS#11 library (``.so``) that the HSM's vendor gives.
        uri: an RFC 7512 URI that names the token, in place of ``token``, ``serial`` and ``slot``.
        token: CKA label of the token.
        serial: its serial number.
        slot: its slot's number. Some modules number slots anew; prefer the serial.
        pin: where the PIN comes from.
        login: ``user``; ``protected`` for a PIN pad or card reader; ``none`` for no login.
        read_only: open sessions that cannot change the token.
        timeout: seconds that any call may take, 0.1 to 600.
        sessions: how many sessions are open at most, 1 to 256.
        allow_oaep_sha1: let RSA keys unwrap by OAEP with SHA-1 where the module has nothing else.
        keys: our key name -> label and id in the token.
        init_args: string for C_Initialize (pReserved), which only NSS softokn takes.
    """

    module: ConfigPath | None = None
    uri: str | None = None
    token: Annotated[str, Field(min_length=1, max_length=32)] | None = None
    serial: Annotated[str, Field(min_length=1, max_length=16)] | None = None
    slot: Annotated[int, Field(ge=0, lt=1 << 64)] | None = None
    pin: SecretSource | None = None
    login: Literal["user", "protected", "none"] = "user"
    read_only: bool = False
    timeout: Annotated[float, Field(ge=0.1, le=600)] = 10.0
    sessions: Annotated[int, Field(ge=1, le=256)] = 8
    allow_oaep_sha1: bool = False
    keys: dict[str, KeyEntry] = Field(default_factory=dict)
    init_args: Annotated[str, Field(max_length=4096)] | None = None

    @field_validator("uri")
    @classmethod
    def _uri_names_a_token(cls, text: str | None) -> str | None:
        if text is None:
            return None
        try:
            uri = Pkcs11Uri.parse(text)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if "pin-value" in uri.query or "pin-source" in uri.query:
            raise ValueError('a PIN is not written in the URI; set pin = { file = "PATH" }')
        if "module-name" in uri.query:
            raise ValueError("module-name says no path; use module-path, or the setting module")
        if uri.id is not None or not set(uri.path) <= _SELECTORS:
            raise ValueError("this URI names the token; keys are named in the table keys")
        if uri.vendor:
            raise ValueError(f"the attribute {next(iter(uri.vendor))!r} is not known")
        return text

    @field_validator("keys")
    @classmethod
    def _key_names(cls, keys: dict[str, KeyEntry]) -> dict[str, KeyEntry]:
        for name in keys:
            if not is_key(name):
                raise ValueError(f"{name[:80]!r} is no key name")
        return keys

    @model_validator(mode="after")
    def _one_of_each(self) -> Pkcs11Settings:
        uri = self.selector_uri
        if self.uri is not None and any(
            part is not None for part in (self.token, self.serial, self.slot)
        ):
            raise ValueError("name the token by uri, or by token, serial and slot, not by both")
        if (self.module is None) == ("module-path" not in uri.query):
            raise ValueError("name the library once: module, or module-path in the uri")
        if "module-path" in uri.query and not uri.query["module-path"].startswith("/"):
            raise ValueError("module-path in the uri is an absolute path")
        if (self.login == "user") != (self.pin is not None):
            raise ValueError("a pin goes with login = 'user', and login = 'user' needs a pin")
        return self

    @property
    def selector_uri(self) -> Pkcs11Uri:
        """The parsed ``uri``, empty where there is none."""
        return Pkcs11Uri.parse(self.uri or "pkcs11:")

    @property
    def library(self) -> Path:
        """The path of the module."""
        return self.module or Path(self.selector_uri.query["module-path"])

    @property
    def selector(self) -> dict[str, str]:
        """What the token must be: RFC 7512 attribute -> value; empty for the only token."""
        if self.uri is not None:
            return dict(self.selector_uri.path)
        parts = {"token": self.token, "serial": self.serial}
        if self.slot is not None:
            parts["slot-id"] = str(self.slot)
        return {name: value for name, value in parts.items() if value is not None}

    def entry(self, key: str) -> KeyEntry:
        """What ``key`` is called in the token."""
        entry = self.keys.get(key, KeyEntry())
        if entry.label is None and entry.id is None:
            return entry.model_copy(update={"label": key})
        return entry

    def name_of(self, label: str, identifier: bytes) -> str | None:
        """Our name for an object of the token, or None where we have none for it."""
        for name, entry in self.keys.items():
            if (entry.id is None or bytes.fromhex(entry.id) == identifier) and (
                (entry.label or (name if entry.id is None else label)) == label
            ):
                return name
        plain = re.sub(r"\s+", "", label) == label and is_key(label)
        return label if plain and label not in self.keys else None
