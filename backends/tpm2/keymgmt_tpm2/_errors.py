"""The response codes of a TPM as keymgmt's errors.

Response codes are those of Part 2, 6.6; the layer of a resource manager and, for format-one codes,
the number of the handle, parameter or session are taken off before they are looked up. Codes of
libtss2 itself keep their layer (tss2_common.h).

A TPM answers with the same code whether it refuses a PIN or the password of a hierarchy or of the
root key. Which of them it refused follows from the command and from the number of the session in
the code; only the PIN of a key is ever called the PIN.
"""

from __future__ import annotations

from typing import Final

from keymgmt.backend import (
    AccessDenied,
    Fault,
    FaultTable,
    KeyNotFound,
    LockedOut,
    ProviderError,
    ProviderUnavailable,
    UnwrapFailed,
)

__all__ = ["BUSY", "NO_SUCH_KEYS", "TpmError", "base_code", "translate"]

HIERARCHY: Final = 0x085

AUTH_FAIL: Final = 0x08E
BAD_AUTH: Final = 0x0A2
POLICY_FAIL: Final = 0x09D
POLICY_NV: Final = 0x126
PCR_CHANGED: Final = 0x128
LOCKOUT: Final = 0x921
VALUE: Final = 0x084
SIZE: Final = 0x095
HANDLE: Final = 0x08B
FAILURE: Final = 0x101
NV_DEFINED: Final = 0x14C
NO_CONNECTION: Final = 0xA0008
BUSY: Final = frozenset({0x902, 0x903, 0x904, 0x905, 0x906, 0x908, 0x90A, 0x920, 0x922, 0x923})
"""Codes after which the same command may work: memory, yielded, testing, NV rate, retry."""
NO_SUCH_KEYS: Final = frozenset({0x083, 0x084, 0x087, 0x096, 0x0A6})
"""Codes of a TPM that cannot create a template's keys: hash, value, key size, symmetric, curve."""
REFUSED: Final = frozenset({AUTH_FAIL, BAD_AUTH})
"""A wrong auth value of an object that counts wrong tries, and of an object that does not."""
_RESET: Final = range(0x910, 0x919)
"""A handle or session of the connection is gone, because the TPM was reset meanwhile."""
_RESOURCE_MANAGER: Final = (0xB0000, 0xC0000)

_SLOTS: Final = (
    "use a resource manager (device:/dev/tpmrm0); free what a crashed program left in a bare TPM "
    "with: keymgmt tpm flush PROVIDER"
)
_ENABLE: Final = "enable it in the firmware's setup, where it is called the TPM or its storage"
_UNREACHED: Final = "see whether the TPM, or what serves it, is there and runs; else correct tcti"
_LIBRARY: Final = 0xA0000
"""Stands for every code of libtss2 itself that is not told apart; it depends on the TCTI."""


def _later(message: str, hint: str) -> Fault:
    return Fault(ProviderUnavailable, message, hint, passing=True)


_FAULTS: Final[dict[int, Fault]] = {
    **dict.fromkeys(BUSY, _later("the TPM is busy", "try again")),
    0x902: _later("the TPM is busy: all its object slots are taken", _SLOTS),
    0x903: _later("the TPM is busy: all its session slots are taken", _SLOTS),
    0x905: _later(
        "the TPM is busy: all its session handles are taken, by sessions that programs saved",
        _SLOTS,
    ),
    **dict.fromkeys(
        _RESET, _later("the TPM was not reached: it was restarted meanwhile", _UNREACHED)
    ),
    **dict.fromkeys(REFUSED, Fault(AccessDenied, "the TPM refused an auth value")),
    HIERARCHY: Fault(ProviderUnavailable, "a hierarchy of the TPM is disabled", _ENABLE),
    0x120: Fault(ProviderUnavailable, "this command of the TPM is disabled", _ENABLE),
    LOCKOUT: Fault(LockedOut, "the TPM is locked after too many wrong PINs"),
    POLICY_FAIL: Fault(AccessDenied, "the policy of the key does not hold"),
    POLICY_NV: Fault(
        AccessDenied,
        "the approval is outdated: the NV counter went past it",
        "sign a new approval with: keymgmt tpm policy sign APPROVAL --key FILE --pcr LIST",
    ),
    PCR_CHANGED: Fault(
        AccessDenied, "a PCR changed while the key was being used", "try again", passing=True
    ),
    0x12F: Fault(AccessDenied, "the key can be used only with its policy"),
    0x149: Fault(
        AccessDenied, "the TPM does not allow this use of the NV index with this authorisation"
    ),
    0x14B: Fault(
        ProviderUnavailable,
        "the TPM has no space for another NV index",
        "its owner can remove an index that is not used any more (tpm2_nvundefine)",
    ),
    0x09B: Fault(AccessDenied, "the TPM refused the signature of an approval"),
    0x09F: Fault(
        KeyNotFound,
        "the TPM refuses the key: its file was damaged, or belongs to another or a cleared TPM",
        "restore the key directory of this TPM, or make a new version of the key (keys rotate) and "
        "rewrap",
    ),
    HANDLE: Fault(KeyNotFound, "the TPM has nothing at that handle"),
    0x0A7: Fault(UnwrapFailed, "the wrapped key holds no point of the curve"),
    0x100: Fault(
        ProviderUnavailable,
        "the TPM was not started",
        "the firmware or the emulator sends TPM2_Startup; restart it",
    ),
    FAILURE: Fault(ProviderUnavailable, "the TPM reports a failure", "restart the machine"),
    0xA0005: Fault(ProviderUnavailable, "the TPM was not reached: no permission", _UNREACHED),
    NO_CONNECTION: _later(
        "the TPM was not reached: nobody answers, or tpm2-abrmd serves as many clients as it can",
        _UNREACHED,
    ),
    0xA000A: _later("the TPM was not reached: the connection failed", _UNREACHED),
    # After an error of libtss2 itself the connection cannot be used any more.
    _LIBRARY: _later("the TPM was not reached: libtss2 failed", _UNREACHED),
}
_UNKNOWN: Final = Fault(
    ProviderUnavailable,
    "the TPM answered with an unknown code",
    "look its code up with: tpm2_rc_decode CODE",
)

PIN: Final = "PIN"
_AUTHORISED: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("create", "load"), ("root key",)),
    **dict.fromkeys(("ecdh_zgen", "rsa_decrypt", "sign"), (PIN,)),
    "certify": (PIN, "attestation key"),
    **dict.fromkeys(("activate_credential", "quote"), ("attestation key",)),
}
"""The authorisation that each session of a command proves; that of a hierarchy is an argument."""
LOCKOUT_HIERARCHY: Final = "lockout"
_HIERARCHIES: Final = {
    0x101: "owner",
    0x10A: LOCKOUT_HIERARCHY,
    0x10B: "endorsement",
}
"""ESYS_TR of the hierarchies (tss2_esys.h)."""


def _refused(whose: str, message: str, hint: str | None = None) -> dict[tuple[str, int], Fault]:
    return {(whose, code): Fault(AccessDenied, message, hint) for code in REFUSED}


def _of_hierarchy(name: str) -> dict[tuple[str, int], Fault]:
    message = f"the TPM refused the password of the {name} hierarchy"
    hint = f"name the source of its password in the provider's table: {name}_auth"
    disabled = f"the {name} hierarchy of the TPM is disabled"
    fault = Fault(ProviderUnavailable, disabled, _ENABLE)
    return {**_refused(name, message, hint), (name, HIERARCHY): fault}


_BY_AUTHORITY: Final[dict[tuple[str, int], Fault]] = {
    **_refused(PIN, "the TPM refused the PIN", "look at the source of the PIN"),
    **_refused(
        "root key",
        "the storage root key has a password, and keymgmt uses only root keys without one",
        'name another handle in the config, such as srk = "0x81000010"; then: '
        "keymgmt tpm setup PROVIDER",
    ),
    **_refused("attestation key", "the TPM refused the attestation key"),
    **_of_hierarchy("owner"),
    **_of_hierarchy("endorsement"),
    **_of_hierarchy(LOCKOUT_HIERARCHY),
}
_TABLE: Final = FaultTable(_FAULTS, unknown=_UNKNOWN, operations=_BY_AUTHORITY)


class TpmError(Exception):
    """A response code that is not success, or a connection that broke.

    Args:
        raw: the response code.
        command: the function of ESAPI that it answered.
        arguments: the arguments of that function, in which a hierarchy may stand.

    Attributes:
        code: the base code.
        row: the code under which the fault table has its meaning.
        fault: the meaning.
        whose: the authorisation that was refused, empty if unknown.
        of_library: whether libtss2 itself failed, so that the connection is broken.
        lost: whether the connection is broken or its objects are gone, and a new one may work.
        auth_sent: whether an auth value was in use, so that trying again may count as a second try.
    """

    def __init__(self, raw: int, command: str = "", arguments: tuple[object, ...] = ()) -> None:
        super().__init__(f"TPM response code {raw:#x}")
        self.raw, self.code = raw, base_code(raw)
        self.whose = _whose(raw, command, arguments)
        self.auth_sent = False
        self.of_library = self.code >= 0x10000
        self.row = _LIBRARY if self.of_library and self.code not in _TABLE else self.code
        self.fault = _TABLE.find(self.row, self.whose)
        self.lost = self.of_library or self.code in _RESET

    @property
    def refused_pin(self) -> bool:
        """Whether the TPM says that the PIN of a key is wrong."""
        return self.code in REFUSED and self.whose == PIN

    @property
    def refused_lockout(self) -> bool:
        """Whether the TPM says that the lockout password is wrong; then it accepts none for now."""
        return self.code in REFUSED and self.whose == LOCKOUT_HIERARCHY


def _whose(raw: int, command: str, arguments: tuple[object, ...]) -> str:
    for argument in arguments:
        # Only a handle of ESAPI counts: another argument may be the same number.
        if isinstance(argument, int) and type(argument).__name__ == "ESYS_TR":
            hierarchy = _HIERARCHIES.get(int(argument))
            if hierarchy:
                return hierarchy
    session = raw >> 8 & 0x7 if raw & 0x880 == 0x880 else 1
    parties = _AUTHORISED.get(command, ())
    return parties[session - 1] if 1 <= session <= len(parties) else ""


def base_code(raw: int) -> int:
    """The code without a resource manager's layer and a parameter, handle or session number."""
    if raw >= 0x10000 and raw & 0xFF0000 not in _RESOURCE_MANAGER:
        return raw
    code = raw & 0xFFFF
    return code & 0xBF if code & 0x80 else code


def translate(error: TpmError, doing: str) -> ProviderError:
    """The error of keymgmt for a TPM's answer; the caller sets its ``__cause__``."""
    return _TABLE.error(error.row, doing, error.whose, shown=f"{error.raw:#x}")
