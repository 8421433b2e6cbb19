"""The operator's token in a module: found by what the settings say, and logged in to.

Rules: a token that is not there is unavailable, one of several is a mistake in the config. A PIN
that was wrong is never given to that token again in this process or its children, since every try
brings the lock nearer; nor is any PIN given when the token says that one more wrong one locks it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from typing import TYPE_CHECKING, Final

from pkcs11 import TokenFlag
from pkcs11.exceptions import PKCS11Error

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    LockedOut,
    ProviderUnavailable,
    UnsupportedOperation,
    wipe,
)
from keymgmt_pkcs11._cryptoki import CkError
from keymgmt_pkcs11._errors import reason, translate

if TYPE_CHECKING:
    from pkcs11 import Token

    from keymgmt_pkcs11._module import Module
    from keymgmt_pkcs11._settings import Pkcs11Settings

__all__ = ["NoToken", "describe", "find_token", "log_in", "serial", "tokens"]

_WRONG: Final = frozenset({"PinIncorrect", "PinInvalid", "PinLenRange"})
_salt: Final = os.urandom(32)
_refused: Final[set[bytes]] = set()
_login = threading.Lock()


class NoToken(ProviderUnavailable):
    """The token is not there; only its kind is told outside this package."""


def serial(token: Token) -> str:
    """The serial number as text."""
    return token.serial.decode("ascii", "replace").strip("\0 ")


def describe(token: Token) -> str:
    """A token in one line."""
    label = token.label.strip("\0 ") or "(no label)"
    return f"{label!r} serial {serial(token)} in slot {token.slot.slot_id}"


def tokens(module: Module) -> list[Token]:
    """Every token that is present and initialised, and answers."""
    return _look(module)[0]


def _look(module: Module) -> tuple[list[Token], list[str]]:
    """The tokens, and why others gave no answer."""
    found, troubled = [], []
    for slot in module.slots():
        try:
            token = slot.get_token()
        except PKCS11Error as error:
            # One token in trouble says nothing of the others.
            troubled.append(f"slot {slot.slot_id}: {reason(error)}")
            continue
        if token.flags & TokenFlag.TOKEN_INITIALIZED:
            found.append(token)
    return found, troubled


def find_token(module: Module, settings: Pkcs11Settings) -> Token:
    """The one token that the settings mean.

    Raises:
        ProviderUnavailable: it is not there.
        ConfigError: several are, and the settings do not tell them apart.
    """
    wanted = settings.selector
    try:
        present, troubled = _look(module)
    except PKCS11Error as error:
        raise translate(error, "listing the tokens") from error
    found = [token for token in present if _is(token, module, wanted)]
    if len(found) == 1:
        return found[0]
    listed = "; ".join([*(describe(token) for token in found or present), *troubled]) or "none"
    words = " ".join(f"{name}={value!r}" for name, value in wanted.items()) or "any"
    if found:
        raise ConfigError(
            f"{len(found)} tokens are {words}: {listed}",
            hint='name the one you mean: serial = "..."',
        )
    kind = ProviderUnavailable if troubled else NoToken
    raise kind(f"no token is {words} in {module.path}", hint=f"tokens there: {listed}")


def _is(token: Token, module: Module, wanted: dict[str, str]) -> bool:
    slot, library = token.slot, module.library
    version = library.library_version
    have = {
        "token": token.label,
        "serial": serial(token),
        "model": token.model.decode() if isinstance(token.model, bytes) else token.model,
        "manufacturer": token.manufacturer_id,
        "slot-id": str(slot.slot_id),
        "slot-description": slot.slot_description,
        "slot-manufacturer": slot.manufacturer_id,
        "library-manufacturer": library.manufacturer_id,
        "library-description": library.library_description,
    }
    for name, value in wanted.items():
        if name == "library-version":
            if value not in (str(version[0]), f"{version[0]}.{version[1]}"):
                return False
        elif name == "slot-id":
            if int(value) != slot.slot_id:
                return False
        elif have[name].strip("\0 ") != value.strip(" "):
            return False
    return True


def log_in(module: Module, token: Token, session: int, settings: Pkcs11Settings) -> None:
    """Log this process in to the token, unless it is already.

    Raises:
        AccessDenied: the PIN is wrong, or was found wrong before.
        LockedOut: the PIN is locked, or the next wrong one locks it.
        ConfigError: the PIN's source cannot be read.
    """
    if settings.login == "none":
        return
    with _login:
        if module.cryptoki.logged_in(session):
            return
        # The flags in `token` are as old as it is.
        _refuse_if_locked(token.slot.get_token())
        if settings.login == "protected":
            if not token.flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
                raise UnsupportedOperation(
                    f"the token {token.label!r} has no PIN pad of its own",
                    hint="set login = 'user' and pin",
                )
            _ask(module, session, None, token)
            return
        if settings.pin is None:
            raise ConfigError("login = 'user' needs a pin", hint='pin = { file = "PATH" }')
        pin = settings.pin.read()
        try:
            mark = hashlib.blake2b(
                b"\0".join([module.path.encode(), token.serial, token.label.encode(), pin]),
                key=_salt,
            ).digest()
            if mark in _refused:
                raise AccessDenied(
                    f"the PIN from {settings.pin} was wrong before and is not tried again",
                    hint="correct the PIN at its source; every wrong try brings the lock nearer",
                )
            try:
                _ask(module, session, pin, token)
            except (AccessDenied, LockedOut) as error:
                if isinstance(error.__cause__, CkError) and error.__cause__.reason in _WRONG:
                    _refused.add(mark)
                raise
        finally:
            wipe(pin)


def _refuse_if_locked(token: Token) -> None:
    if token.flags & TokenFlag.USER_PIN_LOCKED:
        raise LockedOut(
            f"the user PIN of the token {token.label!r} is locked",
            hint="ask whoever runs the HSM: it is unlocked with the SO PIN",
        )
    if token.flags & TokenFlag.USER_PIN_FINAL_TRY:
        raise LockedOut(
            f"the next wrong PIN locks the token {token.label!r}, so none is tried",
            hint="log in once by hand with the right one: pkcs11-tool --module ... --login -O",
        )


def _ask(module: Module, session: int, pin: bytearray | None, token: Token) -> None:
    try:
        module.cryptoki.login(session, pin)
    except CkError as error:
        if error.reason != "UserAlreadyLoggedIn":
            raise translate(error, f"logging in to the token {token.label!r}") from error


def _in_child() -> None:
    global _login
    _login = threading.Lock()


os.register_at_fork(after_in_child=_in_child)
