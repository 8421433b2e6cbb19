"""Running one operation on a TPM: one at a time, within a time limit, and repeated if that is safe.

Rules: a process runs one operation at a time. Processes that share the key directory take turns in
two cases: on a TPM without a resource manager, because it has only three slots for all; and where a
PIN is used, so that no other process spends a try between the look at the counter and the PIN.
Waiting for other operations does not count towards an operation's time limit, and ends for all
waiters when the TPM gives no answer. While the TPM is busy or its PCRs change, the operation is
repeated until half of its time is over; after a lost connection it is repeated once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    Deadline,
    ForkSafe,
    KeymgmtError,
    LockedOut,
    ProviderUnavailable,
    SecretSource,
    wipe,
)
from keymgmt_tpm2._connection.journal import Journal, free_left
from keymgmt_tpm2._errors import (
    BUSY,
    LOCKOUT,
    LOCKOUT_HIERARCHY,
    NO_CONNECTION,
    PCR_CHANGED,
    TpmError,
    translate,
)
from keymgmt_tpm2._keys import KeyDirectory

if TYPE_CHECKING:
    from keymgmt_tpm2._connection.tpm import Tpm
    from keymgmt_tpm2._settings import Tpm2Settings

__all__ = ["CREATE_SECONDS", "Service"]

R = TypeVar("R")
MAX_PIN: Final = 32
CREATE_SECONDS: Final = 120.0
"""A slow chip needs a minute for an RSA key."""
_IN_LINE: Final = 8
"""An operation may wait for others this many times its own time limit."""
_FORK_SECONDS: Final = 5.0
_EXPLAIN_SECONDS: Final = 5.0


class Service(ForkSafe):
    """The TPM of one provider."""

    def __init__(self, name: str, settings: Tpm2Settings, keys: KeyDirectory) -> None:
        self.name, self.settings, self.keys = name, settings, keys
        self._typed: dict[str, bytearray] = {}
        self.refused: set[str] = set()
        self._unanswered = 0.0
        super().__init__()

    def _renew(self) -> None:
        # They guard the TPM, the first place in line, and the terminal.
        self._lock, self._next, self._asking = (threading.Lock() for _ in range(3))
        self._forking: list[threading.Lock] = []

    def _before_fork(self) -> None:
        # A child would inherit the connection of an operation that is running, and keep it open.
        if self._next.acquire(timeout=_FORK_SECONDS):
            if self._lock.acquire(timeout=_FORK_SECONDS):
                self._forking.append(self._lock)
            self._next.release()

    def _after_fork(self) -> None:
        if self._forking:
            self._forking.pop().release()

    def run(
        self,
        doing: str,
        operation: Callable[[Tpm], R],
        *,
        seconds: float | None = None,
        pinned: bool = True,
        alone: bool = False,
        pin_of: str | None = None,
        passwords: Mapping[str, SecretSource | None] | None = None,
    ) -> R:
        """Run ``operation`` on a new connection, in a thread that is abandoned when time is up.

        Args:
            doing: a few words for messages, such as "reading PCRs".
            operation: may be called again; raises TpmError for an answer of the TPM.
            seconds: time limit of the whole; None for that of the settings.
            pinned: whether the storage root key must be the pinned one.
            alone: whether other processes that share the key directory must wait meanwhile, as they
                must where a PIN is used.
            pin_of: the key whose PIN is used.
            passwords: the hierarchies that authorise it, each with the source of its password, or
                None where it has none.

        Raises:
            ProviderUnavailable: the TPM was not reached, was busy, or gave no answer in time; or
                the source of a secret cannot be read.
            AccessDenied: no source of the PIN is configured, or its PIN has more than 32 bytes.
            KeymgmtError: the translated TpmError, or an error of ``operation``.
        """
        settings = self.settings
        if pinned and settings.srk_name is None:
            raise ConfigError(
                f"[providers.{self.name}] has no srk_name, so another TPM could take its place",
                hint=f"see the line to add with: keymgmt tpm setup {self.name}",
            )
        seconds = seconds or settings.timeout
        with contextlib.ExitStack() as stack:
            secrets = {
                hierarchy: stack.enter_context(self._secret(source))
                for hierarchy, source in (passwords or {}).items()
                if source is not None
            }
            pin = None if pin_of is None else stack.enter_context(self._pin(pin_of))
            alone = alone or pin is not None or not settings.resource_managed
            stack.enter_context(self._turn(seconds * _IN_LINE, alone=alone))
            deadline = Deadline(seconds, f"the TPM of {self.name!r} ({settings.tcti})")
            once = partial(
                self._once, operation, deadline, pinned=pinned, passwords=secrets, pin=pin
            )
            return self._repeat(once, deadline, doing)

    def _repeat(self, once: Callable[[], R], deadline: Deadline, doing: str) -> R:
        first, pause = True, 0.005
        while True:
            try:
                return once()
            except TpmError as error:
                if error.code in BUSY or error.code == PCR_CHANGED or self._is_full(error):
                    # A call that may take long, as making a key, is told of it as soon.
                    limit = min(deadline.seconds, self.settings.timeout)
                    again = deadline.seconds - deadline.remaining < limit / 2
                else:
                    # If the answer to a PIN was lost, sending it again may count as a second wrong
                    # try.
                    again = first and error.fault.passing and not (error.lost and error.auth_sent)
                    first = False
                if not again:
                    raise self._explain(error, doing) from error
                if error.code != PCR_CHANGED:
                    time.sleep(pause)
                    pause = min(pause * 2, 0.25)
            except ProviderUnavailable:
                if not deadline.remaining:
                    self._unanswered = time.monotonic()
                raise

    def _once(
        self,
        operation: Callable[[Tpm], R],
        deadline: Deadline,
        *,
        pinned: bool,
        passwords: Mapping[str, bytearray],
        pin: bytearray | None,
    ) -> R:
        from keymgmt_tpm2._connection.tcti import look_for_device
        from keymgmt_tpm2._connection.tpm import Tpm

        settings, given_up = self.settings, threading.Event()
        look_for_device(settings.tcti)
        bare = not settings.resource_managed and self.keys.path.is_dir()
        directory = self.keys.path if bare else None

        def attempt() -> R:
            with Tpm(settings, given_up, Journal(directory), pinned=pinned, pin=pin) as tpm:
                if directory:
                    # No process uses these: those that share the directory wait for their turn.
                    free_left(directory, tpm.free)
                for hierarchy, password in passwords.items():
                    tpm.set_password(hierarchy, password)
                return operation(tpm)

        try:
            return deadline.run(attempt)
        finally:
            # Set before the caller wipes its secrets. If the thread is still running, after a
            # timeout or an interrupt, it sends no further command and frees its objects.
            given_up.set()

    @contextlib.contextmanager
    def _turn(self, seconds: float, *, alone: bool) -> Iterator[None]:
        line = Deadline(seconds, "the TPM")
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            # ``_next`` makes the lock fair: a waiting thread comes before one that works in a loop.
            with _acquired(self._next, line.remaining, self.name):
                stack.enter_context(_acquired(self._lock, line.remaining, self.name))
            if self._unanswered > began:
                raise ProviderUnavailable(
                    f"the TPM of {self.name!r} gave no answer to the operation before this one",
                    hint="look whether it hangs; the next call asks it again",
                )
            if alone and os.path.isdir(self.keys.path):  # noqa: PTH112 - never raises
                self._hold_directory(stack, line.remaining)
            yield

    def _hold_directory(self, stack: contextlib.ExitStack, seconds: float) -> None:
        try:
            stack.enter_context(self.keys.locked(seconds))
        except ProviderUnavailable as error:
            cause = error.__cause__
            # On a read-only file system no process can lock, and a model must open all the same.
            if not isinstance(cause, OSError) or cause.errno != errno.EROFS:
                raise

    def _is_full(self, error: TpmError) -> bool:
        """Whether tpm2-abrmd may have all its clients: its refusal does not give the reason."""
        return error.code == NO_CONNECTION and self.settings.tcti.startswith("tabrmd")

    def _explain(self, error: TpmError, doing: str) -> KeymgmtError:
        translated = translate(error, doing)
        if error.lost:
            where = f"{translated}, with tcti = {self.settings.tcti!r}"
            return type(translated)(where, hint=translated.hint)
        if error.code != LOCKOUT and not error.refused_pin and not error.refused_lockout:
            return translated
        deadline = Deadline(min(self.settings.timeout, _EXPLAIN_SECONDS), "the TPM")
        try:
            state = self._once(
                lambda tpm: tpm.lockout(), deadline, pinned=False, passwords={}, pin=None
            )
        except (TpmError, KeymgmtError):
            return translated
        if error.refused_lockout:
            return AccessDenied(f"{translated}; {state.barred}", hint=translated.hint)
        if error.code == LOCKOUT and error.whose == LOCKOUT_HIERARCHY:
            return LockedOut(
                f"{doing}: {state.barred}",
                hint="correct lockout_auth and wait; nothing was changed",
            )
        if error.code == LOCKOUT:
            return state.locked_out(doing)
        return AccessDenied(f"{translated}; {state}", hint=translated.hint)

    @contextlib.contextmanager
    def _secret(self, source: SecretSource) -> Iterator[bytearray]:
        """The secret of a source, wiped at the end."""
        value = self._read(source)
        try:
            yield value
        finally:
            wipe(value)

    @contextlib.contextmanager
    def _pin(self, key: str) -> Iterator[bytearray]:
        """The PIN of a key, wiped at the end; one that the TPM refused is asked for again."""
        source = self.settings.pins.get(key, self.settings.pin)
        if source is None:
            raise AccessDenied(
                f"the key {key!r} requires a PIN, and [providers.{self.name}] names no source",
                hint=f'add to that table: pins = {{ {key} = {{ file = "PATH" }} }}',
            )
        with self._secret(source) as pin:
            if len(pin) > MAX_PIN:
                raise AccessDenied(
                    f"the PIN from {source} has more than {MAX_PIN} bytes",
                    hint="correct the PIN in its source",
                )
            try:
                yield pin
            except AccessDenied as error:
                if isinstance(error.__cause__, TpmError) and error.__cause__.refused_pin:
                    self.refused.add(key)
                    wipe(self._typed.pop(str(source), bytearray()))
                raise
            self.refused.discard(key)

    def _read(self, source: SecretSource) -> bytearray:
        if source.prompt is None:
            return source.read()
        # A person is asked once, by the first thread that needs the PIN, without a time limit.
        with self._asking:
            if str(source) not in self._typed:
                self._typed[str(source)] = source.read()
            return bytearray(self._typed[str(source)])

    def forget(self) -> None:
        """Wipe the PINs that were typed."""
        with self._asking:
            while self._typed:
                wipe(self._typed.popitem()[1])


@contextlib.contextmanager
def _acquired(lock: threading.Lock, seconds: float, name: str) -> Iterator[None]:
    # The lock is an argument, since a child has new locks and must release the one it acquired.
    if not lock.acquire(timeout=max(0.0, seconds)):
        raise ProviderUnavailable(
            f"the TPM of {name!r} was in use by other threads all the time",
            hint="a TPM runs one operation at a time; with a larger timeout, more of them can wait",
        )
    try:
        yield
    finally:
        lock.release()
