"""Where known modules differ from the standard, as data.

A module is recognised by the manufacturer in C_GetInfo. A difference that is not listed here is
discovered by trying.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from pkcs11 import Mechanism

if TYPE_CHECKING:
    from keymgmt_pkcs11._cryptoki import LibraryInfo

__all__ = ["Quirks", "quirks_of"]


@dataclass(frozen=True)
class Quirks:
    """The differences of one module.

    Attributes:
        name: the usual name of the module.
        manufacturer: the beginning of its CK_INFO.manufacturerID.
        codes: name of a ``Wrapping`` -> the CKM_ number that this module uses for it.
        broken: name of a ``Wrapping`` -> why it is never used, although the module may list it.
        before: the first library version that this entry does not hold for.
        one_at_a_time: the module crashes when two threads call it, although it accepts locking.
        configuration: where to look if the module shows no token.
        wraps_out: the module lets any key be wrapped out of the token in spite of CKA_EXTRACTABLE.
            Then a new key is not refused because of that.
        notes: warnings that ``doctor`` shows.
    """

    name: str
    manufacturer: str
    codes: Mapping[str, Mechanism] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    before: tuple[int, int] | None = None
    one_at_a_time: bool = False
    configuration: str = "see its vendor's manual for its own configuration"
    wraps_out: bool = False
    notes: tuple[str, ...] = ()


_SOFTHSM: Final = Quirks(
    "SoftHSM",
    "SoftHSM",
    # SoftHSM's CKM_AES_KEY_WRAP_PAD is RFC 5649. It is wrong for lengths that are not a multiple
    # of 8, but a data key has 32 bytes.
    codes={"AES-KWP": Mechanism.AES_KEY_WRAP_PAD},
    configuration="see directories.tokendir in the file that SOFTHSM2_CONF names",
    notes=("SoftHSM keeps keys in files and never locks a PIN: for tests, not for secrets",),
)
_KNOWN: Final = (
    replace(
        _SOFTHSM,
        before=(2, 7),
        broken={"RSA-OAEP-256": "SoftHSM does OAEP only with SHA-1"},
    ),
    _SOFTHSM,
    Quirks(
        "NSS softokn",
        "Mozilla",
        # Seen with NSS 3.87: C_WrapKey wraps a key whose CKA_EXTRACTABLE is false.
        wraps_out=True,
        configuration="see configdir in init_args",
        notes=(
            "NSS keeps keys in files and never locks a PIN: for tests, not for secrets",
            "whoever has the PIN can wrap any key out of NSS, whatever CKA_EXTRACTABLE says",
        ),
    ),
    Quirks(
        "openCryptoki",
        "IBM",
        # Seen with openCryptoki 3.8: calls of two threads crash it.
        one_at_a_time=True,
        configuration="see whether pkcsslotd runs, and /etc/opencryptoki/opencryptoki.conf",
    ),
    Quirks(
        "tpm2-pkcs11",
        "tpm2-software",
        configuration="see the folder that TPM2_PKCS11_STORE names, and TPM2_PKCS11_TCTI",
    ),
    Quirks(
        "p11-kit",
        "PKCS#11 Kit",
        configuration="see P11_KIT_SERVER_ADDRESS, or /etc/pkcs11/modules",
    ),
)
_PLAIN: Final = Quirks("", "")


def quirks_of(info: LibraryInfo) -> Quirks:
    """The quirks of a module; no differences for a module that is not listed."""
    for quirks in _KNOWN:
        if info.manufacturer.startswith(quirks.manufacturer) and (
            quirks.before is None or info.version < quirks.before
        ):
            return quirks
    return _PLAIN
