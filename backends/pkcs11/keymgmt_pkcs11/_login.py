"""Logging in, with as few tries of a PIN as possible.

A token locks itself after a few wrong PINs, so each try counts. The rules:
- A PIN that this token has never accepted in this process is sent once, whatever the answer; it is
  sent again only if the return code says that no PIN was compared.
- A PIN that was accepted before is sent once for each new login, after the token answered
  C_GetTokenInfo. If the answer to that says neither yes nor no, the next login waits, longer each
  time.
- No PIN is sent while the token's flags say that the PIN is locked, or that the next wrong PIN
  locks it. After a loss, no PIN is sent while they say that a wrong PIN was given.
- Child processes inherit the memory of refused PINs.
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
        Ckr.CRYPTOKI_NOT_INITIALIZED,  # the call did not reach the token
        Ckr.SESSION_HANDLE_INVALID,  # there is no such session to log in from
        Ckr.SESSION_CLOSED,
        Ckr.SESSION_COUNT,
        Ckr.SLOT_ID_INVALID,
        Ckr.USER_PIN_NOT_INITIALIZED,  # the token has no PIN to compare with
    }
)
"""Return codes of C_Login by which no PIN was compared."""
_WRONG: Final = frozenset({Ckr.PIN_INCORRECT, Ckr.PIN_INVALID, Ckr.PIN_LEN_RANGE})
_CONTEXT_SPECIFIC: Final = 2  # CKU_CONTEXT_SPECIFIC
_PAUSES: Final = (1.0, 2.0, 5.0, 10.0, 30.0)


class _Pins(ForkSafe):
    """The tokens' answers to PINs in this process; of a PIN, only a keyed hash is kept."""

    def __init__(self) -> None:
        self._salt = os.urandom(32)
        self.accepted: set[bytes] = set()
        self.refused: set[bytes] = set()
        self.doubtful: dict[bytes, tuple[int, float]] = {}
        super().__init__()

    def _renew(self) -> None:
        self._tokens: dict[tuple[str, str, str], threading.Lock] = {}

    def lock(self, module: Module, token: TokenInfo) -> threading.Lock:
        """The lock of this token; a token that hangs does not delay another."""
        return self._tokens.setdefault(_token_id(module, token), threading.Lock())

    def pin_hash(self, module: Module, token: TokenInfo, user: int, pin: bytearray) -> bytes:
        login = "\0".join((*_token_id(module, token), str(user), ""))
        digest = hashlib.blake2b(login.encode(), key=self._salt)
        digest.update(pin)
        return digest.digest()

    def check(self, pin_hash: bytes, token: TokenInfo, source: object, *, after_loss: bool) -> None:
        """Refuse to send a PIN that must not be sent now."""
        if pin_hash in self.refused:
            raise AccessDenied(
                f"the PIN from {source} was not accepted before and is not sent again",
                hint="correct the PIN at its source; after a few wrong PINs the token locks itself",
            )
        after_loss = after_loss or pin_hash in self.doubtful
        if after_loss and pin_hash in self.accepted and token.flags & TokenFlag.USER_PIN_COUNT_LOW:
            raise AccessDenied(
                f"a wrong PIN was given to the token {token.label!r} since the last login, "
                "so after a loss none is sent",
                hint="log in once by hand with the right PIN: pkcs11-tool --module LIBRARY.so "
                "--token-label LABEL --login --list-objects",
            )
        times, since = self.doubtful.get(pin_hash, (0, 0.0))
        pause = _PAUSES[min(times, len(_PAUSES)) - 1] if times else 0.0
        if time.monotonic() < since + pause:
            raise ProviderUnavailable(
                f"the token {token.label!r} did not say a moment ago whether the PIN is right; "
                f"it is sent again {pause:g} seconds after that",
                hint="see whether the HSM works, with the vendor's tool",
            )

    def answered(self, pin_hash: bytes, error: CkError | None) -> None:
        """Remember the token's answer; ``error`` is None where it accepted the PIN."""
        if error is None:
            self.accepted.add(pin_hash)
            self.doubtful.pop(pin_hash, None)
        elif error.code in _WRONG or pin_hash not in self.accepted:
            self.refused.add(pin_hash)
        elif error.passing:
            times, _ = self.doubtful.get(pin_hash, (0, 0.0))
            self.doubtful[pin_hash] = times + 1, time.monotonic()


def _token_id(module: Module, token: TokenInfo) -> tuple[str, str, str]:
    return module.path, token.serial, token.label


_pins = _Pins()


class PinWanted(Exception):
    """A person must type the PIN; the thread that called the provider asks, not the module's."""


def log_in(
    module: Module,
    token: TokenInfo,
    session: int,
    settings: Pkcs11Settings,
    *,
    typed: bytearray | None = None,
    after_loss: bool = False,
    context: bool = False,
) -> None:
    """Log this process in to the token, unless it is logged in already.

    Args:
        module: the library.
        token: the token.
        session: a session with the token.
        settings: the user and the source of the PIN.
        typed: the PIN that a person typed for this call; the caller wipes it.
        after_loss: whether an earlier login was lost.
        context: log in for one use of one key with CKA_ALWAYS_AUTHENTICATE, between the C_*Init of
            that use and the use itself.

    Raises:
        AccessDenied: the PIN is wrong, or was refused before.
        LockedOut: the PIN is locked, or the next wrong PIN locks it.
        ProviderUnavailable: the PIN's source cannot be read.
        CkError: no PIN was compared, or the token said neither yes nor no to a PIN that it had
            accepted before.
        PinWanted: a person has to type the PIN, and has not done so for this call.
    """
    if settings.login == "none":
        return
    with _pins.lock(module, token):
        if not context and module.cryptoki.logged_in(session):
            return
        # The flags in `token` are old; and a token that does not answer now is sent no PIN.
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
            # A PIN of zeros was wiped, because the caller does not wait for this call any more.
            raise PinWanted
        pin = settings.pin.read() if typed is None else bytearray(typed)
        try:
            pin_hash = _pins.pin_hash(module, token, settings.user_type, pin)
            _pins.check(pin_hash, now, settings.pin, after_loss=after_loss)
            known = pin_hash in _pins.accepted
            try:
                compared = _send(module, session, user, pin)
            except CkError as error:
                if error.code in NOT_COMPARED:
                    raise
                _pins.answered(pin_hash, error)
                if known and error.passing:
                    raise
                if not error.passing:
                    raise translate(error, f"logging in to the token {token.label!r}") from error
                raise AccessDenied(
                    f"logging in to the token {token.label!r}: the answer {error.name} does not "
                    "say whether the PIN is wrong",
                    hint="see whether the PIN is right and the HSM works; the PIN is not sent "
                    "again in this process",
                ) from error
            if compared:
                _pins.answered(pin_hash, None)
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
            f"the next wrong PIN locks the token {token.label!r}, so no PIN is sent",
            hint="log in once by hand with the right PIN: pkcs11-tool --module LIBRARY.so "
            "--token-label LABEL --login --list-objects",
        )


def _send(module: Module, session: int, user: int, pin: bytearray | None) -> bool:
    """C_Login; False where the user was logged in already, so that no PIN was compared."""
    try:
        module.cryptoki.login(session, user, pin)
    except CkError as error:
        if error.code != Ckr.USER_ALREADY_LOGGED_IN:
            raise
        return False
    return True
