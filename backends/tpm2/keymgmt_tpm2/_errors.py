"""What a TPM answers, in the words of keymgmt's errors.

Response codes are those of Part 2, 6.6; the layer and, for format-one codes, the number of the
handle, parameter or session are taken off before they are looked up.
"""

from __future__ import annotations

from typing import Final

from keymgmt.backend import (
    AccessDenied,
    KeymgmtError,
    KeyNotFound,
    LockedOut,
    ProviderError,
    ProviderUnavailable,
    UnwrapFailed,
    WrongKey,
)

__all__ = ["BUSY", "POLICY", "TpmError", "base_code", "translate"]

AUTH_FAIL: Final = 0x08E
BAD_AUTH: Final = 0x0A2
POLICY_FAIL: Final = 0x09D
POLICY_NV: Final = 0x126
PCR_CHANGED: Final = 0x128
AUTH_UNAVAILABLE: Final = 0x12F
LOCKOUT: Final = 0x921
INTEGRITY: Final = 0x09F
SIGNATURE: Final = 0x09B
VALUE: Final = 0x084
HANDLE: Final = 0x08B
ECC_POINT: Final = 0x0A7
FAILURE: Final = 0x101
INITIALIZE: Final = 0x100
NV_UNINITIALIZED: Final = 0x14A
OBJECT_MEMORY: Final = 0x902
SESSION_MEMORY: Final = 0x903
TCTI_LAYER: Final = 0xA0000

BUSY: Final = frozenset({0x902, 0x903, 0x904, 0x905, 0x906, 0x908, 0x90A, 0x920, 0x922, 0x923})
"""Codes after which the same command may work: memory, yielded, testing, NV rate, retry."""

POLICY: Final = frozenset({POLICY_FAIL, POLICY_NV, PCR_CHANGED, AUTH_UNAVAILABLE, SIGNATURE, VALUE})
"""Codes by which a TPM says that a policy does not hold."""

_MEANING: Final[dict[int, tuple[type[KeymgmtError], str, str | None]]] = {
    AUTH_FAIL: (AccessDenied, "the TPM refused the PIN", "look at the source of the PIN"),
    BAD_AUTH: (AccessDenied, "the TPM refused the auth value", "look at the source of the PIN"),
    LOCKOUT: (LockedOut, "the TPM is locked after too many wrong PINs", None),
    POLICY_FAIL: (AccessDenied, "the policy of the key does not hold", None),
    POLICY_NV: (
        AccessDenied,
        "the approval is outdated: the NV counter went past it",
        "sign a new approval with: keymgmt tpm policy sign",
    ),
    PCR_CHANGED: (AccessDenied, "a PCR changed while the key was being used", "try again"),
    AUTH_UNAVAILABLE: (AccessDenied, "the key is used by its policy only", None),
    SIGNATURE: (AccessDenied, "the TPM refused the signature of an approval", None),
    INTEGRITY: (
        WrongKey,
        "the TPM refuses the key: its file was damaged or is of another or a cleared TPM",
        "restore the key directory of this TPM, or make a new key and rewrap",
    ),
    HANDLE: (KeyNotFound, "the TPM has nothing at that handle", None),
    ECC_POINT: (UnwrapFailed, "the wrapped key carries no point of the curve", None),
    INITIALIZE: (
        ProviderUnavailable,
        "the TPM was not started",
        "the firmware or the emulator sends TPM2_Startup; restart it",
    ),
    FAILURE: (ProviderUnavailable, "the TPM reports a failure", "restart the machine"),
}
_TCTI: Final = {
    0xA0005: "no permission",
    0xA0008: "no answer",
    0xA000A: "the connection failed",
}


class TpmError(Exception):
    """A TPM's response code that nothing here expected, or a line to it that broke.

    ``code`` is the base code; ``lost`` says that the connection is gone and a new one may work;
    ``auth_sent`` that an auth value was in use, so that trying again may count as a second try.
    """

    def __init__(self, raw: int) -> None:
        super().__init__(f"TPM response code {raw:#x}")
        self.raw = raw
        self.auth_sent = False
        self.code = base_code(raw)
        # 0x910 to 0x918: a handle of ours is gone, because the TPM was reset underneath.
        broken = raw >= 0x10000 and raw & 0xFF0000 != 0xB0000
        self.lost = broken or 0x910 <= self.code <= 0x918


def base_code(raw: int) -> int:
    """Take the layer and the parameter, handle or session number off a response code."""
    code = raw & 0xFFFF
    return code & 0xBF if code & 0x80 else code


def translate(error: TpmError, doing: str) -> KeymgmtError:
    """The error of keymgmt for a TPM's answer; its ``__cause__`` is set by the caller."""
    if error.code in BUSY:
        what = "object" if error.code == OBJECT_MEMORY else "session"
        slots = error.code in (OBJECT_MEMORY, SESSION_MEMORY)
        return ProviderUnavailable(
            f"{doing}: the TPM is busy" + (f": all its {what} slots are taken" if slots else ""),
            hint="use a resource manager (device:/dev/tpmrm0); "
            "keymgmt tpm flush frees what a crashed program left in a bare TPM"
            if slots
            else "try again",
        )
    if error.lost or error.raw & 0xFF0000 == TCTI_LAYER:
        why = _TCTI.get(error.raw, f"the connection failed ({error.raw:#x})")
        if error.code in range(0x910, 0x919):
            why = "it was restarted underneath"
        return ProviderUnavailable(
            f"{doing}: the TPM was not reached: {why}", hint="keymgmt doctor says more"
        )
    kind, message, hint = _MEANING.get(
        error.code,
        (ProviderError, f"the TPM answered {error.raw:#x}", "tpm2_rc_decode explains it"),
    )
    return kind(f"{doing}: {message}", hint=hint)
