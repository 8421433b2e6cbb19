"""The options of ``keys create``: from text to a policy."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keymgmt.backend import ConfigError, PublicKey, read_file
from keymgmt_tpm2.policy._policy import Approver, PcrState, Policy, parse_pcrs

__all__ = ["KeyOptions", "read_approver"]

MAX_PEM: Final = 65536
_OPTIONS: Final = ("pcr", "approver", "ref", "pin")
_YES_NO: Final = {"yes": True, "no": False}


def read_approver(path: Path, ref: str = "") -> Approver:
    """An approver from a PEM file of its public key; ConfigError where a TPM takes none such."""
    pem = read_file(path, label="approver", limit=MAX_PEM, access="trusted")
    try:
        return Approver(PublicKey.from_pem(bytes(pem)).der, ref)
    except (ConfigError, ValueError) as error:
        raise ConfigError(
            f"{path} is no approver: {error}",
            hint="make one with: keymgmt tpm policy approver FILE",
        ) from error


@dataclass(frozen=True)
class KeyOptions:
    """The policy of a new key as options; PCR values are read when the key is created."""

    pin: bool = False
    bank: str | None = None
    pcrs: tuple[int, ...] = ()
    approver: Approver | None = None

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> KeyOptions:
        """Read options; ConfigError for an unknown, malformed or contradictory one."""
        for name in options:
            if name not in _OPTIONS:
                near = difflib.get_close_matches(name, _OPTIONS, n=1)
                raise ConfigError(
                    f"the backend tpm2 knows no option {name!r}",
                    hint=f"did you mean {near[0]!r}?"
                    if near
                    else f"options: {', '.join(_OPTIONS)}",
                )
        pin = options.get("pin", "no")
        if pin not in _YES_NO:
            raise ConfigError("the option pin is yes or no; the PIN itself is named in the config")
        if "ref" in options and "approver" not in options:
            raise ConfigError("the option ref belongs to the option approver")
        try:
            bank, pcrs = parse_pcrs(options["pcr"]) if "pcr" in options else (None, ())
        except ValueError as error:
            raise ConfigError(f"the option pcr: {error}") from error
        approver = None
        if "approver" in options:
            approver = read_approver(Path(options["approver"]), options.get("ref", ""))
        return cls(_YES_NO[pin], bank, pcrs, approver)

    @classmethod
    def of(cls, policy: Policy) -> KeyOptions:
        """The options that a key with this policy was made with."""
        bank, indices = (policy.pcrs.bank, policy.pcrs.indices) if policy.pcrs else (None, ())
        return cls(policy.pin, bank, indices, policy.approver)

    def policy(self, read: Callable[[str, Iterable[int]], PcrState]) -> Policy:
        """The policy, with the PCR values that ``read(bank, indices)`` gives now."""
        state = read(self.bank, self.pcrs) if self.bank else None
        return Policy(self.pin, state, self.approver)
