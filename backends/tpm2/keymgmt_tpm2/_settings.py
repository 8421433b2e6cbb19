"""The config table of a TPM."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import Field, field_validator

from keymgmt.backend import ConfigPath, SecretSource, Settings, is_key

__all__ = ["Tpm2Settings"]

_TCTI: Final = re.compile(r"device:/[!-~]{1,200}|(swtpm|tabrmd|mssim)(:[!-~]{1,200})?")
_NAME: Final = re.compile(r"000b[0-9a-f]{64}")


class Tpm2Settings(Settings):
    """``[providers.NAME]`` with ``backend = "tpm2"``.

    Attributes:
        keys: the key directory; relative to the config file.
        tcti: how the TPM is reached, as tpm2-tools write it: ``device:/dev/tpmrm0`` (the kernel's
            resource manager), ``tabrmd``, ``swtpm:host=...,port=...``, ``mssim:...``.
        srk: persistent handle of the storage root key.
        srk_name: its name in hex; ``keymgmt tpm setup`` shows it. Pin it: with another one
            nothing is opened.
        pin: where the PIN of every key with a PIN is.
        pins: the same for single keys.
        owner_auth: where the owner hierarchy's password is, if it has one; for set-up only.
        timeout: seconds within which every call ends.
    """

    keys: ConfigPath
    tcti: str = "device:/dev/tpmrm0"
    srk: str = "0x81000001"
    srk_name: str | None = None
    pin: SecretSource | None = None
    pins: dict[str, SecretSource] = Field(default_factory=dict)
    owner_auth: SecretSource | None = None
    timeout: Annotated[float, Field(ge=0.1, le=600, strict=False)] = 20.0

    @field_validator("tcti")
    @classmethod
    def _known_tcti(cls, value: str) -> str:
        if not _TCTI.fullmatch(value):
            raise ValueError("write device:PATH, tabrmd, swtpm:host=HOST,port=PORT or mssim:...")
        return value

    @field_validator("srk")
    @classmethod
    def _persistent_handle(cls, value: str) -> str:
        if not re.fullmatch(r"0x81[0-9a-fA-F]{6}", value):
            raise ValueError('write the handle as hex, such as "0x81000001"')
        return value

    @field_validator("srk_name")
    @classmethod
    def _object_name(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError("a name is 000b and 64 hex digits; keymgmt tpm setup shows it")
        return value

    @field_validator("pins")
    @classmethod
    def _key_names(cls, value: dict[str, SecretSource]) -> dict[str, SecretSource]:
        for name in value:
            if not is_key(name):
                raise ValueError(f"{name[:64]!r} is no key name")
        return value

    @property
    def srk_handle(self) -> int:
        """``srk`` as a number."""
        return int(self.srk, 16)
