"""Where known modules differ from the standard, as data.

A module is known by what it says of itself (C_GetInfo); what is not listed is found by trying.
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
    """What is different about a module.

    Attributes:
        name: what people call it.
        manufacturer: how its CK_INFO.manufacturerID begins.
        codes: our mechanism name -> the CKM_ under which this module has it.
        broken: our mechanism name -> why it is never used, although the module may list it.
        before: the library version from which on none of this holds.
        one_at_a_time: it crashes when two threads call it, whatever it says of locking.
        configuration: where to look if it shows no token.
        wraps_out: it lets any key be wrapped out of the token in spite of CKA_EXTRACTABLE, so a
            new key is not refused for that.
        notes: what ``doctor`` tells the operator.
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
    # Its CKM_AES_KEY_WRAP_PAD is RFC 5649. It is wrong for lengths that are no multiple of 8;
    # we only ever wrap 32 bytes.
    codes={"AES-KWP": Mechanism.AES_KEY_WRAP_PAD},
    configuration="see directories.tokendir in the file that SOFTHSM2_CONF names",
    notes=("SoftHSM keeps keys in files and never locks a PIN: for tests, not for secrets",),
)
_KNOWN: Final = (
    replace(
        _SOFTHSM,
        before=(2, 7),
        broken={
            "RSA-OAEP-256-L": "SoftHSM does OAEP only with SHA-1 and without a label",
            "RSA-OAEP-256": "SoftHSM does OAEP only with SHA-1",
        },
    ),
    _SOFTHSM,
    Quirks(
        "NSS softokn",
        "Mozilla",
        # Seen with 3.87: C_WrapKey takes a key whose CKA_EXTRACTABLE is false.
        wraps_out=True,
        configuration="see configdir in init_args",
        notes=(
            "NSS keeps keys in files and never locks a PIN: for tests, not for secrets",
            "NSS lets whoever has the PIN wrap any key out, whatever CKA_EXTRACTABLE says",
        ),
    ),
    Quirks(
        "openCryptoki",
        "IBM",
        # Seen with 3.8: two threads crash it.
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
    """The quirks of a module; none for one that is not known."""
    for quirks in _KNOWN:
        if info.manufacturer.startswith(quirks.manufacturer) and (
            quirks.before is None or info.version < quirks.before
        ):
            return quirks
    return _PLAIN
