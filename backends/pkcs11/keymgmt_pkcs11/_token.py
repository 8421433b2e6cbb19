"""The operator's token in a module, found by what the settings say.

A token that is not there is unavailable; several that fit are told, and none is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkcs11 import TokenFlag

from keymgmt.backend import ProviderUnavailable
from keymgmt_pkcs11._errors import CkError

if TYPE_CHECKING:
    from keymgmt_pkcs11._cryptoki import TokenInfo
    from keymgmt_pkcs11._module import Module
    from keymgmt_pkcs11._settings import Pkcs11Settings

__all__ = ["NoToken", "find_token", "look_for_tokens"]


class NoToken(ProviderUnavailable):
    """The token is not seen; only its kind is told outside this package."""


def look_for_tokens(module: Module) -> tuple[list[TokenInfo], list[str]]:
    """Every token that is ready, and in words what else is in the slots.

    Raises:
        CkError: the module does not list its slots.
    """
    found, others = [], []
    for slot in module.cryptoki.slots():
        try:
            token = module.cryptoki.token_info(slot)
        except CkError as error:
            # One token in trouble says nothing of the others.
            others.append(f"slot {slot} answers {error.name}")
            continue
        if token.flags & TokenFlag.TOKEN_INITIALIZED:
            found.append(token)
        else:
            others.append(f"slot {slot} has a token that is not initialised")
    return found, others


def find_token(module: Module, settings: Pkcs11Settings) -> TokenInfo:
    """The one token that the settings mean.

    Raises:
        ProviderUnavailable: it is not there, or the settings do not tell several apart.
        CkError: the module does not list its slots.
    """
    wanted = settings.selector
    present, others = look_for_tokens(module)
    found = [token for token in present if _is(token, module, wanted)]
    if len(found) == 1:
        return found[0]
    words = " ".join(f"{name}={value!r}" for name, value in wanted.items()) or "any"
    listed = "; ".join([*map(str, found or present), *others])
    if found:
        raise ProviderUnavailable(
            f"{len(found)} tokens are {words}: {listed}",
            hint='name the one you mean: serial = "..."',
        )
    raise NoToken(
        f"no token is {words} in {module.path}",
        hint=f"tokens there: {listed}"
        if present
        else f"{listed or 'the module shows no token at all'}: {module.quirks.configuration}",
    )


def _is(token: TokenInfo, module: Module, wanted: dict[str, str]) -> bool:
    library = module.info
    have = {
        "token": token.label,
        "serial": token.serial,
        "model": token.model,
        "manufacturer": token.manufacturer,
        "library-manufacturer": library.manufacturer,
        "library-description": library.description,
    }
    if any(name.startswith("slot-") for name in wanted.keys() - {"slot-id"}):
        texts = module.cryptoki.slot_texts(token.slot)
        have["slot-description"], have["slot-manufacturer"] = texts
    for name, value in wanted.items():
        if name == "library-version":
            if value not in (str(library.version[0]), "{}.{}".format(*library.version)):
                return False
        elif name == "slot-id":
            if int(value) != token.slot:
                return False
        elif have[name] != value.strip(" "):
            return False
    return True
