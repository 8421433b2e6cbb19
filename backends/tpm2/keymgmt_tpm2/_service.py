"""Running one operation on a TPM: in turn, in time, again where that is right, PIN used once.

Rules: one operation at a time in a process, and on a bare TPM also between processes that share the
key directory, because a bare TPM has three slots for everybody. A busy TPM is asked again until
half of the time is over; a lost connection or a PCR that moved once. A PIN that the TPM refused is
not sent again until its source gives another one, so that opening many models cannot lock the TPM.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, TypeVar

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    KeymgmtError,
    LockedOut,
    ProviderUnavailable,
    SecretSource,
    wipe,
)
from keymgmt_tpm2._errors import (
    AUTH_FAIL,
    BAD_AUTH,
    BUSY,
    LOCKOUT,
    OBJECT_MEMORY,
    PCR_CHANGED,
    TpmError,
    translate,
)
from keymgmt_tpm2._keys import KeyDirectory

if TYPE_CHECKING:
    from keymgmt_tpm2._settings import Tpm2Settings
    from keymgmt_tpm2._tpm import Tpm

__all__ = ["Service", "lockout_state"]

R = TypeVar("R")
MAX_PIN: Final = 32
CREATE_SECONDS: Final = 120.0
"""Making an RSA key takes a slow chip a minute."""
_PT_PERMANENT: Final = 0x200
_IN_LOCKOUT: Final = 0x200
_PT_LOCKOUT_COUNTER: Final = 0x20E
_PT_MAX_AUTH_FAIL: Final = 0x20F
_PT_LOCKOUT_INTERVAL: Final = 0x210


_services: weakref.WeakSet[Service] = weakref.WeakSet()
_held: list[threading.Lock] = []
_FORK_SECONDS: Final = 5.0
_EXPLAIN_SECONDS: Final = 5.0


def _before_fork() -> None:
    # A child would inherit the connection of a call that is under way, and keep it open for ever.
    for service in list(_services):
        if service.lock.acquire(timeout=_FORK_SECONDS):
            _held.append(service.lock)


def _after_fork() -> None:
    while _held:
        _held.pop().release()


def _after_fork_in_child() -> None:
    _held.clear()
    for service in list(_services):
        service.new_locks()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)


class Service:
    """The TPM of one provider."""

    def __init__(self, name: str, settings: Tpm2Settings, keys: KeyDirectory) -> None:
        self._name, self._settings, self._keys = name, settings, keys
        self.new_locks()
        self._left_behind: set[bytes] = set()
        self._refused: dict[str, bytes] = {}
        self._taken: set[tuple[str, bytes]] = set()
        self._typed: dict[str, bytearray] = {}
        self._salt = os.urandom(32)
        _services.add(self)

    def new_locks(self) -> None:
        """Make the locks: of the TPM, of a PIN that may be wrong, of the terminal."""
        self.lock, self._trying, self._asking = (threading.Lock() for _ in range(3))

    def run(
        self,
        doing: str,
        operation: Callable[[Tpm], R],
        *,
        seconds: float | None = None,
        pinned: bool = True,
    ) -> R:
        """Run ``operation`` on a fresh connection.

        Args:
            doing: what is done, for messages.
            operation: may be called again; TpmError means what the TPM answered.
            seconds: time limit of all of it; the settings' if None.
            pinned: whether the storage root key must be the pinned one.

        Raises:
            ProviderUnavailable: not reached, busy, or no answer in time.
            KeymgmtError: as ``translate`` says, or as ``operation`` raised it.
        """
        seconds = seconds or self._settings.timeout
        if pinned and self._settings.srk_name is None:
            raise ConfigError(
                f"[providers.{self._name}] has no srk_name, so another TPM could take its place",
                hint=f"keymgmt tpm setup {self._name} shows the line to add",
            )
        start = time.monotonic()
        with self._turn(start + seconds):
            again, pause = True, 0.005
            while True:
                left = start + seconds - time.monotonic()
                try:
                    return self._once(operation, left, pinned)
                except TpmError as error:
                    busy = error.code in BUSY and left > seconds / 2
                    lost = error.lost and not error.auth_sent
                    if not busy and not (again and (lost or error.code == PCR_CHANGED)):
                        raise self._explain(error, doing) from error
                    if error.code == OBJECT_MEMORY:
                        self._left_behind |= self._own_names()
                if busy:
                    time.sleep(pause)
                    pause = min(pause * 2, 0.25)
                else:
                    again = False

    def _once(self, operation: Callable[[Tpm], R], left: float, pinned: bool) -> R:
        from keymgmt_tpm2._connection import Connection, TimeLimit, is_resource_managed
        from keymgmt_tpm2._tpm import Tpm

        settings = self._settings
        name = bytes.fromhex(settings.srk_name) if pinned and settings.srk_name else None
        try:
            connection = Connection(settings.tcti, max(left, 0.05))
            with Tpm(connection, settings.srk_handle, name, self._left_behind.add) as tpm:
                if self._left_behind:
                    if not is_resource_managed(settings.tcti):
                        tpm.free_left_behind(self._left_behind)
                    self._left_behind.clear()
                return operation(tpm)
        except TimeLimit as error:
            raise ProviderUnavailable(
                f"the TPM of {self._name!r} gave no answer in time ({settings.tcti})",
                hint="look whether it hangs; a slow one may need a larger timeout in the config",
            ) from error

    @contextlib.contextmanager
    def _turn(self, deadline: float) -> Iterator[None]:
        from keymgmt_tpm2._connection import is_resource_managed

        with _acquired(self.lock, deadline - time.monotonic(), self._name):
            if is_resource_managed(self._settings.tcti) or not self._keys.path.is_dir():
                yield
            else:
                with self._keys.locked(deadline - time.monotonic()):
                    yield

    def _own_names(self) -> set[bytes]:
        # Nobody else uses them now: processes that share the directory wait for their turn.
        names: set[bytes] = set()
        for key in self._keys.names():
            with contextlib.suppress(KeymgmtError):
                names |= {version.public.name for version in self._keys.read(key).versions}
        return names

    def _explain(self, error: TpmError, doing: str) -> KeymgmtError:
        if error.code not in (LOCKOUT, AUTH_FAIL, BAD_AUTH):
            return translate(error, doing)
        try:
            seconds = min(self._settings.timeout, _EXPLAIN_SECONDS)
            counted, limit, interval, _ = self._once(lockout_state, seconds, pinned=False)
        except (TpmError, KeymgmtError):
            return translate(error, doing)
        if error.code == LOCKOUT:
            return LockedOut(
                f"{doing}: the TPM is locked after {counted} of {limit} wrong PINs",
                hint=f"one try is given back about every {interval} seconds; the owner can reset "
                "it at once with: tpm2_dictionarylockout --clear-lockout",
            )
        refused = translate(error, doing)
        return AccessDenied(
            f"{refused}; {counted} of {limit} wrong tries are counted",
            hint=f"{refused.hint}; a try is given back every {interval} seconds",
        )

    @contextlib.contextmanager
    def pin(self, key: str) -> Iterator[bytearray]:
        """The PIN of a key, wiped at the end; one that was refused before is refused here.

        Until the TPM has taken it, one thread at a time has it: the others wait to see what becomes
        of it, so that many that open at once do not lock the TPM with one wrong PIN.

        Raises:
            AccessDenied: no source is configured, or the TPM refused this PIN already.
            ConfigError: the source has none, or one of more than 32 bytes.
            ProviderUnavailable: others tried it all the time.
        """
        source = self.pin_source(key)
        if source is None:
            raise AccessDenied(
                f"the key {key!r} wants a PIN, and [providers.{self._name}] names no source of it",
                hint=f'add to that table: pins = {{ {key} = {{ file = "PATH" }} }}',
            )
        pin = self._read(source)
        try:
            if len(pin) > MAX_PIN:
                raise ConfigError(f"the PIN from {source} has more than {MAX_PIN} bytes")
            digest = hmac.new(self._salt, pin, hashlib.sha256).digest()
            known = (key, digest) in self._taken
            alone = _acquired(self._trying, self._settings.timeout, self._name)
            with contextlib.nullcontext() if known else alone:
                if hmac.compare_digest(self._refused.get(key, b""), digest):
                    raise AccessDenied(
                        f"the TPM refused this PIN of {key!r} before, and is not asked again",
                        hint=f"correct the PIN in {source}; each wrong try counts towards a "
                        "lockout",
                    )
                try:
                    yield pin
                except AccessDenied as error:
                    cause = error.__cause__
                    if isinstance(cause, TpmError) and cause.code in (AUTH_FAIL, BAD_AUTH):
                        self._refused[key] = digest
                        self._taken.discard((key, digest))
                        wipe(self._typed.pop(str(source), b""))
                    raise
                self._taken.add((key, digest))
        finally:
            wipe(pin)

    def _read(self, source: SecretSource) -> bytearray:
        if source.prompt is None:
            return source.read()
        # A person is asked once, by whichever thread comes first. He may take his time.
        with self._asking:
            if str(source) not in self._typed:
                self._typed[str(source)] = source.read()
            return bytearray(self._typed[str(source)])

    def refused_before(self, key: str) -> bool:
        """Whether the TPM refused a PIN of this key since the provider was made."""
        return key in self._refused

    def pin_source(self, key: str) -> SecretSource | None:
        """Where the PIN of a key is, if the config says so."""
        return self._settings.pins.get(key, self._settings.pin)

    def forget(self) -> None:
        """Forget which PINs were taken and refused, and wipe what was typed."""
        self._refused.clear()
        self._taken.clear()
        with self._asking:
            while self._typed:
                wipe(self._typed.popitem()[1])


@contextlib.contextmanager
def _acquired(lock: threading.Lock, seconds: float, name: str) -> Iterator[None]:
    # As an argument, so that a child forked meanwhile releases what it took, not its new lock.
    if not lock.acquire(timeout=max(0.0, seconds)):
        raise ProviderUnavailable(
            f"the TPM of {name!r} was in use by other threads all the time",
            hint="a TPM does one thing after the other; a larger timeout lets more wait",
        )
    try:
        yield
    finally:
        lock.release()


def lockout_state(tpm: Tpm) -> tuple[int, int, int, bool]:
    """Wrong tries counted, how many lock the TPM, seconds per try given back, locked now."""
    values = tpm.properties()
    return (
        values.get(_PT_LOCKOUT_COUNTER, 0),
        values.get(_PT_MAX_AUTH_FAIL, 0),
        values.get(_PT_LOCKOUT_INTERVAL, 0),
        bool(values.get(_PT_PERMANENT, 0) & _IN_LOCKOUT),
    )
