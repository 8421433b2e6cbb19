"""The meaning of each refusal of the service to its client."""

from __future__ import annotations

from typing import Final

from keymgmt.backend import (
    AccessDenied,
    Fault,
    FaultTable,
    KeyNotFound,
    KeyRetired,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)

__all__ = ["FAULTS"]

_AGAIN: Final = "try again in a moment"
_BEHIND: Final = "the key service behind the broker"

FAULTS: Final = FaultTable[str](
    {
        "request": Fault(
            UnsupportedOperation,
            "the broker does not understand the request",
            "give keymgmt-broker here and keymgmt-broker-service there the same version",
        ),
        "nonce": Fault(
            ProviderUnavailable,
            "the broker does not accept its own nonce",
            "the evidence took longer than 60 s, or the instances of the broker have different "
            "clocks or nonce keys",
            passing=True,
        ),
        "evidence": Fault(
            AccessDenied,
            "the broker does not accept the evidence of this machine",
            "the reason is in the broker's log",
        ),
        "policy": Fault(
            AccessDenied,
            "the broker has no policy that gives this key for this kind of evidence",
            "name a policy of this kind in allow, under [keys.KEY] of the broker's config",
        ),
        "key": Fault(WrongKey, "the broker has no such key"),
        "wrong-key": Fault(WrongKey, "the broker does not hold the key that was sealed to"),
        "retired": Fault(
            KeyRetired,
            "the version of the key was retired",
            "rewrap the model on a machine where another group opens it",
        ),
        "missing": Fault(
            KeyNotFound, f"{_BEHIND} has no such key", "look at [keys.KEY] of the broker's config"
        ),
        "unwrap": Fault(
            UnwrapFailed,
            "the wrapped key does not authenticate",
            "it was damaged, or bound to another model",
        ),
        "denied": Fault(
            AccessDenied,
            f"{_BEHIND} refuses the broker",
            "the broker's login or rights are not enough; the broker's log says more",
        ),
        "unavailable": Fault(
            ProviderUnavailable, f"{_BEHIND} cannot be used now", _AGAIN, passing=True
        ),
        "not-ready": Fault(
            ProviderUnavailable,
            "the broker cannot verify evidence now",
            "the reason is in the broker's log",
            passing=True,
        ),
        "busy": Fault(ProviderUnavailable, "the broker is busy", _AGAIN, passing=True),
        "rate": Fault(
            ProviderUnavailable,
            "this address asked the broker too often",
            "try again in a moment; see rate in the broker's config",
            passing=True,
        ),
        "size": Fault(UnsupportedOperation, "the request is larger than the broker allows"),
        "time": Fault(
            ProviderUnavailable, "the request did not arrive whole in time", _AGAIN, passing=True
        ),
        "fault": Fault(
            ProviderUnavailable,
            "the broker failed",
            "the reason is in the broker's log",
            passing=True,
        ),
    },
    unknown=Fault(
        ProviderUnavailable,
        "this is no answer of a key broker",
        "look whether service is its address, and what stands between that may answer for it",
        passing=True,
    ),
)
"""By the word of the refusal."""
