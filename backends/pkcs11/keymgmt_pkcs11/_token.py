"""Finding the token that the settings select.

If several tokens fit, none is used, and the error lists them.
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
    """The module does not show the token. A caller may replace the connection and look again."""


def look_for_tokens(module: Module) -> tuple[list[TokenInfo], list[str]]:
    """Every initialised token, and descriptions of the slots with any other token.

    Raises:
        CkError: the module does not list its slots.
    """
    tokens, others = [], []
    for slot in module.cryptoki.slots():
        try:
            token = module.cryptoki.token_info(slot)
        except CkError as error:
            # A token that does not answer does not hide the others.
            others.append(f"slot {slot} answers {error.name}")
            continue
        if token.flags & TokenFlag.TOKEN_INITIALIZED:
            tokens.append(token)
        else:
            others.append(f"slot {slot} has a token that is not initialised")
    return tokens, others


def find_token(module: Module, settings: Pkcs11Settings) -> TokenInfo:
    """The token that the settings select.

    Raises:
        ProviderUnavailable: no token fits the settings, or several do.
        CkError: the module does not list its slots.
    """
    wanted = settings.selector
    present, others = look_for_tokens(module)
    fitting = [token for token in present if _fits(token, module, wanted)]
    if len(fitting) == 1:
        return fitting[0]
    words = " ".join(f"{name}={value!r}" for name, value in wanted.items()) or "any"
    listed = "; ".join([*map(str, fitting or present), *others])
    if fitting:
        raise ProviderUnavailable(
            f"{len(fitting)} tokens are {words}: {listed}",
            hint='name the token that you mean: serial = "..."',
        )
    raise NoToken(
        f"no token is {words} in {module.path}",
        hint=f"tokens there: {listed}"
        if present
        else f"{listed or 'the module shows no token at all'}: {module.quirks.configuration}",
    )


def _fits(token: TokenInfo, module: Module, wanted: dict[str, str]) -> bool:
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
