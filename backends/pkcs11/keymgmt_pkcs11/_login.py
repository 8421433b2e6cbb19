"""Logging in, with as few tries of a PIN as can be.

Rules, since every wrong try brings the token's lock nearer:
- A PIN that this token has never accepted in this process is sent once, whatever the answer; only
  where the code says that no PIN was compared may it be sent again.
- A PIN that was accepted before is sent once more for each new login, after the token answered
  C_GetTokenInfo. If the answer then says neither yes nor no, it waits, longer each time.
- Nothing is sent while the token's flags say that the PIN is locked or that the next wrong one
  locks it; nothing is sent again, after a loss, while they say that a wrong one was given.
- Children of this process know what was refused here.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from typing import TYPE_CHECKING, Final

from pkcs11 import TokenFlag

from keymgmt.backend import (
    AccessDenied,
    ForkSafe,
    LockedOut,
    ProviderUnavailable,
    UnsupportedOperation,
    wipe,
)
from keymgmt_pkcs11._errors import CkError, Ckr, translate

if TYPE_CHECKING:
    from keymgmt_pkcs11._cryptoki import TokenInfo
    from keymgmt_pkcs11._module import Module
    from keymgmt_pkcs11._settings import Pkcs11Settings

__all__ = ["NOT_COMPARED", "PinWanted", "log_in"]

NOT_COMPARED: Final = frozenset(
    {
        Ckr.CRYPTOKI_NOT_INITIALIZED,  # the call went nowhere
        Ckr.SESSION_HANDLE_INVALID,  # there is no such session to log in from
        Ckr.SESSION_CLOSED,
        Ckr.SESSION_COUNT,
        Ckr.SLOT_ID_INVALID,
        Ckr.USER_PIN_NOT_INITIALIZED,  # there is none to compare with
    }
)
"""Answers of C_Login that say that no PIN was compared."""
_WRONG: Final = frozenset({Ckr.PIN_INCORRECT, Ckr.PIN_INVALID, Ckr.PIN_LEN_RANGE})
_CONTEXT_SPECIFIC: Final = 2  # CKU_CONTEXT_SPECIFIC
_PAUSES: Final = (1.0, 2.0, 5.0, 10.0, 30.0)


class _Pins(ForkSafe):
    """What the tokens of this process said to PINs; of a PIN, only a keyed hash is kept."""

    def __init__(self) -> None:
        self._salt = os.urandom(32)
        self.accepted: set[bytes] = set()
        self.refused: set[bytes] = set()
        self.doubtful: dict[bytes, tuple[int, float]] = {}
        super().__init__()

    def _renew(self) -> None:
        self._tokens: dict[tuple[str, str, str], threading.Lock] = {}

    def lock(self, module: Module, token: TokenInfo) -> threading.Lock:
        """One for each token, so that one that hangs does not hold another up."""
        return self._tokens.setdefault(_place(module, token), threading.Lock())

    def mark(self, module: Module, token: TokenInfo, user: int, pin: bytearray) -> bytes:
        place = "\0".join((*_place(module, token), str(user), ""))
        digest = hashlib.blake2b(place.encode(), key=self._salt)
        digest.update(pin)
        return digest.digest()

    def check(self, mark: bytes, token: TokenInfo, source: object, *, again: bool) -> None:
        """Refuse to send a PIN that must not be sent now."""
        if mark in self.refused:
            raise AccessDenied(
                f"the PIN from {source} was not accepted before and is not tried again",
                hint="correct the PIN at its source; every wrong try brings the lock nearer",
            )
        again = again or mark in self.doubtful
        if again and mark in self.accepted and token.flags & TokenFlag.USER_PIN_COUNT_LOW:
            raise AccessDenied(
                f"a wrong PIN was given to the token {token.label!r} since the last login, "
                "so after a loss none is sent",
                hint="log in once by hand with the right one: pkcs11-tool --module LIBRARY.so "
                "--token-label LABEL --login --list-objects",
            )
        times, since = self.doubtful.get(mark, (0, 0.0))
        pause = _PAUSES[min(times, len(_PAUSES)) - 1] if times else 0.0
        if time.monotonic() < since + pause:
            raise ProviderUnavailable(
                f"the token {token.label!r} did not say yes or no to the PIN a moment ago; "
                f"it is sent again after {pause:g} seconds",
                hint="see whether the HSM is well",
            )

    def answered(self, mark: bytes, error: CkError | None) -> None:
        """Remember what the token said."""
        if error is None:
            self.accepted.add(mark)
            self.doubtful.pop(mark, None)
        elif error.code in _WRONG or mark not in self.accepted:
            self.refused.add(mark)
        elif error.passing:
            times, _ = self.doubtful.get(mark, (0, 0.0))
            self.doubtful[mark] = times + 1, time.monotonic()


def _place(module: Module, token: TokenInfo) -> tuple[str, str, str]:
    return module.path, token.serial, token.label


_pins = _Pins()


class PinWanted(Exception):
    """A person is to be asked for the PIN, by the thread that called and not by the module's."""


def log_in(
    module: Module,
    token: TokenInfo,
    session: int,
    settings: Pkcs11Settings,
    *,
    typed: bytearray | None = None,
    again: bool = False,
    context: bool = False,
) -> None:
    """Log this process in to the token, unless it is already.

    Args:
        module: the library.
        token: the token.
        session: a session with it.
        settings: say who logs in, and where the PIN is.
        typed: what a person typed for this call; the caller wipes it.
        again: the login that was there is lost.
        context: log in for one use of one key, which its CKA_ALWAYS_AUTHENTICATE wants; between
            the call that begins it and the one that does it.

    Raises:
        AccessDenied: the PIN is wrong, or was found wrong before.
        LockedOut: the PIN is locked, or the next wrong one locks it.
        ProviderUnavailable: the PIN's source cannot be read.
        CkError: no PIN was compared, or an accepted one was neither taken nor refused.
        PinWanted: a person has to type it, and did not for this call.
    """
    if settings.login == "none":
        return
    with _pins.lock(module, token):
        if not context and module.cryptoki.logged_in(session):
            return
        # The flags in `token` are as old as it is; and a token that does not answer gets no PIN.
        now = module.cryptoki.token_info(token.slot)
        _refuse_if_locked(now)
        user = _CONTEXT_SPECIFIC if context else settings.user_type
        if settings.login == "protected":
            if not now.flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
                raise UnsupportedOperation(
                    f"the token {token.label!r} has no PIN pad of its own",
                    hint="set login = 'user' and pin",
                )
            _send(module, session, user, None)
            return
        assert settings.pin is not None  # noqa: S101 - the settings hold login and pin together
        if settings.pin.prompt is not None and not (typed and any(typed)):
            # Zeros are what is left of it where nobody waits for this call any more.
            raise PinWanted
        pin = settings.pin.read() if typed is None else bytearray(typed)
        try:
            mark = _pins.mark(module, token, settings.user_type, pin)
            _pins.check(mark, now, settings.pin, again=again)
            known = mark in _pins.accepted
            try:
                compared = _send(module, session, user, pin)
            except CkError as error:
                if error.code in NOT_COMPARED:
                    raise
                _pins.answered(mark, error)
                if known and error.passing:
                    raise
                if not error.passing:
                    raise translate(error, f"logging in to the token {token.label!r}") from error
                raise AccessDenied(
                    f"logging in to the token {token.label!r}: the answer {error.name} does not "
                    "say whether the PIN is wrong",
                    hint="see whether PIN and HSM are well; the PIN is not sent again in this "
                    "process",
                ) from error
            if compared:
                _pins.answered(mark, None)
        finally:
            wipe(pin)


def _refuse_if_locked(token: TokenInfo) -> None:
    if token.flags & TokenFlag.USER_PIN_LOCKED:
        raise LockedOut(
            f"the user PIN of the token {token.label!r} is locked",
            hint="ask whoever runs the HSM: it is unlocked with the SO PIN",
        )
    if token.flags & TokenFlag.USER_PIN_FINAL_TRY:
        raise LockedOut(
            f"the next wrong PIN locks the token {token.label!r}, so none is tried",
            hint="log in once by hand with the right one: pkcs11-tool --module LIBRARY.so "
            "--token-label LABEL --login --list-objects",
        )


def _send(module: Module, session: int, user: int, pin: bytearray | None) -> bool:
    """C_Login; whether the PIN was compared, and not only found unneeded."""
    try:
        module.cryptoki.login(session, user, pin)
    except CkError as error:
        if error.code != Ckr.USER_ALREADY_LOGGED_IN:
            raise
        return False
    return True
