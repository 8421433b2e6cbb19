"""The config table of a TPM."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import Field, field_validator

from keymgmt.backend import ConfigError, ConfigPath, KeyName, SecretSource, Settings
from keymgmt_tpm2.policy._index import parse_index

__all__ = ["Tpm2Settings"]

_TCTI: Final = re.compile(r"device:/[!-~]{1,200}|(swtpm|tabrmd|mssim)(:[!-~]{1,200})?")
_NAME: Final = re.compile(
    "0004[0-9a-f]{40}|00(0b|12|27)[0-9a-f]{64}|00(0c|28)[0-9a-f]{96}|00(0d|29)[0-9a-f]{128}"
)
"""TPM_ALG_ID of each hash (TCG Algorithm Registry, 4) and a digest of its length, in hex."""


class Tpm2Settings(Settings):
    """``[providers.NAME]`` with ``backend = "tpm2"``.

    Attributes:
        keys: the key directory; relative to the config file.
        tcti: the path to the TPM, as tpm2-tools write it: ``device:/dev/tpmrm0`` (the kernel's
            resource manager), ``tabrmd``, ``swtpm:host=...,port=...``, ``mssim:...``.
        srk: persistent handle of the storage root key.
        srk_name: name of the storage root key in hex; ``keymgmt tpm setup`` shows it. It must be
            set: if the key at ``srk`` has another name, nothing is opened.
        pin: the source of the PIN, for every key with a PIN.
        pins: key -> the source of its PIN, where it is another.
        use_last_try: whether a PIN is sent although a wrong PIN would lock the TPM.
        owner_auth: the source of the owner hierarchy's password, if it has one; for set-up only.
        endorsement_auth: the source of the endorsement hierarchy's password, if it has one; for
            enrolment only.
        lockout_auth: the source of the lockout hierarchy's password, if it has one; for set-up
            only.
        anchor: the name in hex of the NV index that is the anchor of ``remember_releases``;
            ``keymgmt tpm anchor create`` shows it.
        anchor_index: the number of that index.
        pcr_signatures: the signed PCR policies of a unified kernel image, such as
            ``/run/systemd/tpm2-pcr-signature.json``: approvals that come with each kernel.
        timeout: seconds within which every call ends, without the time that it waits for others.
    """

    keys: ConfigPath
    tcti: str = "device:/dev/tpmrm0"
    srk: str = "0x81000001"
    srk_name: str | None = None
    pin: SecretSource | None = None
    pins: dict[KeyName, SecretSource] = Field(default_factory=dict)
    use_last_try: bool = False
    owner_auth: SecretSource | None = None
    endorsement_auth: SecretSource | None = None
    lockout_auth: SecretSource | None = None
    anchor: str | None = None
    anchor_index: str = "0x01800102"
    pcr_signatures: ConfigPath | None = None
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
            raise ValueError(
                "a name is 000b and the 64 hex digits of a SHA-256 digest, or the number and "
                "digest of another hash; see it with: keymgmt tpm setup PROVIDER"
            )
        return value

    @field_validator("anchor")
    @classmethod
    def _index_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"000b[0-9a-f]{64}", value):
            raise ValueError(
                "the name of an anchor is 000b and 64 hex digits; see it with: "
                "keymgmt tpm anchor create PROVIDER:KEY"
            )
        return value

    @field_validator("anchor_index")
    @classmethod
    def _index(cls, value: str) -> str:
        try:
            return f"{parse_index(value):#010x}"
        except ConfigError as error:
            raise ValueError(f"{error}: {error.hint}") from error

    @property
    def anchor_number(self) -> int:
        """``anchor_index`` as a number."""
        return int(self.anchor_index, 16)

    @property
    def resource_managed(self) -> bool:
        """Whether a resource manager behind ``tcti`` frees the objects of a client that ended."""
        return self.tcti.startswith(("device:/dev/tpmrm", "tabrmd"))

    @property
    def srk_handle(self) -> int:
        """``srk`` as a number."""
        return int(self.srk, 16)
