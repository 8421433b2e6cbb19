"""Wrong PINs: how many the TPM has counted, when it locks itself, and when a PIN is not sent.

The TPM has one counter for all keys that have a PIN, whichever process used them (TPM 2.0 Library,
Part 1, 19.8). Each wrong try raises it, and so does each loss of power between the use of such a
key and an orderly shutdown; at its limit the TPM locks. So the counter is read before a PIN is
sent, and the last try is left to a person, unless the config sets ``use_last_try``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from keymgmt.backend import LockedOut

__all__ = ["CLEAR", "Lockout"]

_PERMANENT: Final = 0x200
_PASSWORD: Final = 0x4
_IN_LOCKOUT: Final = 0x200
_STARTUP: Final = 0x201
_ORDERLY: Final = 0x80000000
_COUNTED: Final = 0x20E
_LIMIT: Final = 0x20F
_INTERVAL: Final = 0x210
_RECOVERY: Final = 0x211
CLEAR: Final = "at once, as the owner: keymgmt tpm setup PROVIDER --clear-lockout"


@dataclass(frozen=True)
class Lockout:
    """The dictionary-attack parameters and state of a TPM (Part 2, 6.13, TPM_PT_VAR).

    ``counted`` of ``limit`` tries; one is given back every ``interval`` seconds of power (0: none);
    ``recovery``: seconds until a wrong lockout password may be tried again, 0 for a restart;
    ``locked`` now; ``orderly``: whether the TPM was shut down before it was started; ``password``:
    whether the lockout hierarchy has one.
    """

    counted: int
    limit: int
    interval: int
    recovery: int
    locked: bool
    orderly: bool
    password: bool

    @classmethod
    def of(cls, properties: Mapping[int, int]) -> Self:
        """From the variable properties of a TPM."""
        return cls(
            properties.get(_COUNTED, 0),
            properties.get(_LIMIT, 0),
            properties.get(_INTERVAL, 0),
            properties.get(_RECOVERY, 0),
            bool(properties.get(_PERMANENT, 0) & _IN_LOCKOUT),
            bool(properties.get(_STARTUP, 0) & _ORDERLY),
            bool(properties.get(_PERMANENT, 0) & _PASSWORD),
        )

    def __str__(self) -> str:
        return f"{self.counted} of {self.limit} wrong tries are counted, {self.given_back}"

    @property
    def given_back(self) -> str:
        """When the TPM forgets a wrong try, in words."""
        if not self.interval:
            return "none is given back by time"
        return f"one is given back every {self.interval} seconds"

    @property
    def barred(self) -> str:
        """The consequence of a wrong lockout password, in words (Part 1, 19.8)."""
        how_long = f"for {self.recovery} seconds" if self.recovery else "until it is restarted"
        return f"after a wrong lockout password the TPM accepts none {how_long}"

    @property
    def causes(self) -> str:
        """The possible causes of the counted tries, in words."""
        if self.orderly:
            return "a wrong PIN counts, and a power cut after a PIN was used"
        return (
            "the TPM lost power without a shutdown, which counts like a wrong PIN if a PIN was "
            "used before, so the PIN need not have been wrong"
        )

    def locked_out(self, doing: str) -> LockedOut:
        """The error for a locked TPM."""
        return LockedOut(
            f"{doing}: the TPM is locked: {self.counted} of {self.limit} tries are counted; "
            f"{self.causes}",
            hint=f"{self.given_back}; {CLEAR}",
        )

    def check(self, *, use_last: bool) -> None:
        """LockedOut if no PIN must be sent now, since a wrong PIN would lock the TPM."""
        if self.locked:
            raise self.locked_out("the PIN was not sent")
        if self.limit - self.counted <= 1 and not use_last:
            raise LockedOut(
                f"the PIN was not sent: {self.counted} of {self.limit} tries are counted, and the "
                f"last one is kept; {self.causes}",
                hint=f"correct the PIN in its source and wait, {self.given_back}; if the PIN is "
                f"right, set use_last_try = true in the provider's table; {CLEAR}",
            )

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "counted": self.counted,
            "tries": self.limit,
            "recovery": self.interval,
            "lockout_recovery": self.recovery,
            "locked": self.locked,
        }
