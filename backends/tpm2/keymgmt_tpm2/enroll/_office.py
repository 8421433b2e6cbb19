"""The decision of the office: the devices, their keys, and the policy of the keys.

A request is a device's own words. The office states what it wants in its own: values of PCRs or an
approver's key, and the endorsement keys that it bought. Digests are compared, never descriptions.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from keymgmt.backend import ConfigError, is_key, is_version, read_file
from keymgmt_tpm2._structures import Public
from keymgmt_tpm2.enroll._certificates import AttestationError
from keymgmt_tpm2.policy._policy import Approver, PcrState, Policy

__all__ = ["Decision", "Device", "ek_id", "parse_ek", "read_inventory"]

MAX_INVENTORY: Final = 64 << 20
_EK: Final = re.compile(r"[0-9a-f]{64}")
_TEXT: Final = re.compile(r"[\x20-\x7e]{1,200}")
_COLUMNS: Final = ("ek", "key", "name", "site", "serial")


def ek_id(ek: Public) -> str:
    """SHA-256 of an endorsement key, DER SubjectPublicKeyInfo, in hex; ValueError for no key."""
    return hashlib.sha256(ek.der()).hexdigest()


@dataclass(frozen=True)
class Device:
    """A device as the office knows it.

    Attributes:
        ek: ``ek_id`` of its TPM.
        key: the key to enrol as ``NAME`` or ``NAME@VERSION``; None leaves it to the command.
        known: name, site and serial, as far as the inventory has them; they are signed.
    """

    ek: str
    key: str | None = None
    known: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """The requirements for a key to be enrolled.

    Attributes:
        policy: values of exactly the PCRs that it is bound to, or who approves its boot states;
            None if any policy will do. A PIN may come on top, and the other of the two: that only
            asks for more.
        devices: by ``ek``; None if any TPM of a trusted maker will do.
        key: ``NAME`` or ``NAME@VERSION`` of the key; a name alone is its version 1.
    """

    policy: PcrState | Approver | None
    devices: Mapping[str, Device] | None
    key: str | None = None

    def check(self, ek: Public, key: Public, policy: Policy) -> Device:
        """The device in the office's inventory.

        Raises:
            AttestationError: the device is not in the inventory, or the key has another policy.
            ConfigError: neither the inventory nor the command says which key is enrolled.
        """
        ek_hash = ek_id(ek)
        device = Device(ek_hash) if self.devices is None else self.devices.get(ek_hash)
        if device is None:
            raise AttestationError(
                "the TPM is not of a device that is enrolled here: "
                f"its endorsement key is {ek_hash}",
                hint="compare it with what the maker or the device's label says, and add it",
            )
        if self.policy is not None and self._wanted(policy).digest != key.policy:
            raise AttestationError(
                "the key has another policy than is wanted",
                hint=f"wanted: {'; '.join(self._wanted(policy).lines())}. "
                f"It has: {'; '.join(policy.lines())}",
            )
        return device

    def _wanted(self, policy: Policy) -> Policy:
        if isinstance(self.policy, PcrState):
            return replace(policy, pcrs=self.policy)
        return replace(policy, approver=self.policy)

    def key_of(self, device: Device) -> tuple[str, str]:
        """Name and version of the key to enrol."""
        text = device.key or self.key
        if text is None:
            raise ConfigError(
                "which key of the device is enrolled?",
                hint="--key NAME or NAME@VERSION, or the column key of the inventory",
            )
        return _parse_key(text)


def _parse_key(text: str) -> tuple[str, str]:
    name, _, version = text.partition("@")
    version = version or "1"
    if not is_key(name) or not is_version(version):
        raise ConfigError(f"{text[:80]!r} is no key: write NAME or NAME@VERSION")
    return name, version


def parse_ek(text: str) -> str:
    """A hash of an endorsement key as a person writes it; ConfigError."""
    digits = re.sub(r"[\s:-]", "", text).lower()
    if not _EK.fullmatch(digits):
        raise ConfigError(
            f"{text[:80]!r} is no hash of an endorsement key",
            hint="64 hex digits, as `tpm enroll challenge` prints them",
        )
    return digits


def read_inventory(path: Path) -> dict[str, Device]:
    """Devices by ``ek``, from CSV with the columns ek and any of key, name, site and serial.

    Raises:
        ConfigError: it cannot be read, others can write it, or a line of it is wrong.
    """
    content = read_file(path, label="inventory", limit=MAX_INVENTORY, access="trusted")
    devices: dict[str, Device] = {}
    try:
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        columns = list(rows.fieldnames or ())
        if "ek" not in columns or len(set(columns)) != len(columns) or set(columns) - {*_COLUMNS}:
            raise ConfigError(
                f"the inventory {path} has the columns {', '.join(map(str, columns))[:200]}",
                hint=f"known: {', '.join(_COLUMNS)}; ek is required",
            )
        for row in rows:
            where = f"line {rows.line_num} of the inventory {path}"
            if None in row or None in row.values():
                raise ConfigError(f"{where} has not {len(columns)} fields")
            known = {name: text.strip() for name, text in row.items() if text.strip()}
            ek = parse_ek(known.pop("ek", ""))
            key = known.pop("key", None)
            if key is not None:
                _parse_key(key)
            if not all(_TEXT.fullmatch(text) for text in known.values()):
                raise ConfigError(f"{where} has a text that is too long, or not printable ASCII")
            if ek in devices:
                raise ConfigError(f"{where} names an endorsement key for the second time: {ek}")
            devices[ek] = Device(ek, key, known)
    except (UnicodeError, csv.Error) as error:
        raise ConfigError(f"the inventory {path} is no CSV in UTF-8: {error}") from error
    return devices
