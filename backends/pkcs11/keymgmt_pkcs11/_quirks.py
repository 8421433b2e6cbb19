"""Where known modules differ from the standard, as data.

A module is known by what it says of itself (C_GetInfo); what is not listed is found by trying.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pkcs11 import Mechanism

if TYPE_CHECKING:
    from keymgmt_pkcs11._module import Module

__all__ = ["Quirks", "quirks_of"]


@dataclass(frozen=True)
class Quirks:
    """What is different about a module.

    Attributes:
        name: what people call it.
        manufacturer: how its CK_INFO.manufacturerID begins.
        description: how its CK_INFO.libraryDescription begins.
        codes: our mechanism name -> the CKM_ under which this module has it.
        broken: our mechanism name -> why it is never used, although the module may list it.
        wraps_out: it lets any key be wrapped out of the token in spite of CKA_EXTRACTABLE, so a
            new key is not refused for that.
        notes: what ``doctor`` tells the operator.
    """

    name: str
    manufacturer: str
    description: str = ""
    codes: Mapping[str, Mechanism] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    wraps_out: bool = False
    notes: tuple[str, ...] = ()


_KNOWN: Final = (
    Quirks(
        "SoftHSM",
        "SoftHSM",
        # Its CKM_AES_KEY_WRAP_PAD is RFC 5649. It is wrong for lengths that are no multiple of 8;
        # we only ever wrap 32 bytes.
        codes={"AES-KWP": Mechanism.AES_KEY_WRAP_PAD},
        broken={
            "RSA-OAEP-256-L": "SoftHSM does OAEP only with SHA-1 and without a label",
            "RSA-OAEP-256": "SoftHSM does OAEP only with SHA-1",
        },
        notes=("SoftHSM keeps keys in files and never locks a PIN: for tests, not for secrets",),
    ),
    Quirks(
        "NSS softokn",
        "Mozilla",
        # Seen with 3.87: C_WrapKey takes a key whose CKA_EXTRACTABLE is false.
        wraps_out=True,
        notes=(
            "NSS keeps keys in files and never locks a PIN: for tests, not for secrets",
            "NSS lets whoever has the PIN wrap any key out, whatever CKA_EXTRACTABLE says",
        ),
    ),
)
_PLAIN: Final = Quirks("", "")


def quirks_of(module: Module) -> Quirks:
    """The quirks of a module; none for one that is not known."""
    manufacturer = module.library.manufacturer_id.strip("\0 ")
    description = module.library.library_description.strip("\0 ")
    for quirks in _KNOWN:
        if manufacturer.startswith(quirks.manufacturer) and description.startswith(
            quirks.description
        ):
            return quirks
    return _PLAIN
