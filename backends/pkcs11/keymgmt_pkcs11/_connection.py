"""The connection of one provider: a bounded pool of sessions.

A C call cannot be interrupted, so another thread makes it and the caller only waits, up to the time
limit (``within``). A call that does not return keeps its thread and its session, and neither is
used again; if the call returns later, the thread closes the session. An interrupt ends the wait the
same way, except that the session returns to the pool when its call returns.

Sessions are read-only; a call that changes the token gets a second, writing session for its
duration. A login holds for all sessions of a process with a token (PKCS#11 2.40, C_Login): the
first session logs the process in, and the token logs it out when the last session is closed.

A call that failed for a passing reason is repeated, each time after more was replaced: first its
session; then every session of the connection, and so the login; then the library, by C_Finalize
and C_Initialize, where this package initialised it. Each step happens once for a call, and within
its time limit.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from keymgmt.backend import Deadline, ForkSafe, ProviderUnavailable, wipe, within
from keymgmt_pkcs11._errors import CkError, Ckr, translate
from keymgmt_pkcs11._login import NOT_COMPARED, PinWanted, log_in
from keymgmt_pkcs11._module import CallInFlight, Module, open_module
from keymgmt_pkcs11._token import NoToken, find_token

if TYPE_CHECKING:
    from keymgmt_pkcs11._cryptoki import TokenInfo
    from keymgmt_pkcs11._settings import Pkcs11Settings

__all__ = ["Connection", "Session"]

R = TypeVar("R")
PAD_LIMIT: Final = 300.0
"""Seconds for a call during which a person may have to type the PIN at the token's PIN pad."""
_PAUSES: Final = (0.01, 0.03, 0.06, 0.1, 0.2)


class Session:
    """An open session, which is given to each call.

    Attributes:
        module: the library.
        token: the token as it was when the connection was opened.
        handle: the session's handle, which ``renew`` changes.
        cache: shared by all sessions of one connection, and emptied by a loss. Then "after loss"
            stands in it until the next login.
        typed: the PIN, where somebody typed it for the call that has this session.
    """

    def __init__(
        self,
        module: Module,
        token: TokenInfo,
        settings: Pkcs11Settings,
        cache: dict[Any, Any],
        typed: bytearray | None,
        *,
        writing: bool = False,
    ) -> None:
        self.module = module
        self.ck = module.cryptoki
        self.generation = module.generation
        self.token = token
        self.settings = settings
        self.cache = cache
        self.typed = typed
        self._writing = writing
        self.handle = self._open()

    def _open(self) -> int:
        handle = self.ck.open_session(self.token.slot, writing=self._writing)
        try:
            after_loss = self.cache.get("after loss", False)
            self._log_in(handle, after_loss=after_loss)
            self.cache.pop("after loss", None)
        except BaseException:
            with contextlib.suppress(CkError):
                self.ck.close_session(handle)
            raise
        return handle

    def _log_in(self, handle: int, **options: bool) -> None:
        log_in(self.module, self.token, handle, self.settings, typed=self.typed, **options)

    def close(self) -> None:
        # After another C_Initialize this handle may be that of a session of somebody else.
        if self.generation == self.module.generation:
            with contextlib.suppress(CkError):
                self.ck.close_session(self.handle)

    def renew(self) -> None:
        """Replace the session, in which a failed call may have left an operation active."""
        old = self.handle
        try:
            self.handle = self._open()
        except CkError as error:
            if error.code != Ckr.SESSION_COUNT:
                raise
            self.close()
            self.handle = self._open()
        else:
            with contextlib.suppress(CkError):
                self.ck.close_session(old)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Session]:
        """A second session, which may change the token; this one stays open."""
        other = Session(
            self.module, self.token, self.settings, self.cache, self.typed, writing=True
        )
        try:
            yield other
        finally:
            other.close()

    def approve(self) -> None:
        """Log in for one use of one key that requires it (CKA_ALWAYS_AUTHENTICATE)."""
        self._log_in(self.handle, context=True)

    def confirm(self) -> None:
        """See that token and login are still there, before a key is reported as missing.

        Raises:
            CkError: the token or the login was lost, so that private keys are not seen.
        """
        if self.settings.login != "none" and not self.ck.logged_in(self.handle):
            raise CkError("C_GetSessionInfo", Ckr.USER_NOT_LOGGED_IN)
        self.ck.token_info(self.token.slot)


@dataclass(slots=True, eq=False)
class _Call(Generic[R]):
    """The arguments of ``run``, its deadline, and the PIN where somebody typed it for this call."""

    operation: str
    function: Callable[[Session], R]
    changes: bool
    deadline: Deadline
    typed: bytearray | None = None


class _PoolEntry:
    """Holds one session; one ``call`` at a time has it."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.epoch = -1
        self.in_flight: CallInFlight | None = None
        self.call: object | None = None
        self.abandoned = False

    def drop(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            with session.module.call() as self.in_flight:
                session.close()


class Connection(ForkSafe):
    """The sessions of one provider in this process. Every method is safe in any thread.

    Attributes:
        epoch: grows with every loss; a session of an older epoch is replaced before its next use.
    """

    def __init__(self, settings: Pkcs11Settings) -> None:
        self.settings = settings
        self.epoch = 0
        super().__init__()

    def _renew(self) -> None:
        # PKCS#11 lets a child use no session of its parent, so they are forgotten and not closed.
        self.epoch += 1
        self._cache: dict[Any, Any] = {}
        self._state = threading.Condition(threading.Lock())
        self._connecting = threading.Lock()
        self._asking = threading.Lock()
        self._idle: list[_PoolEntry] = []
        self._entries: set[_PoolEntry] = set()
        self._limit = self.settings.sessions
        self._generation = 0

    def run(
        self,
        operation: str,
        function: Callable[[Session], R],
        *,
        changes: bool = False,
        limit: float | None = None,
    ) -> R:
        """Run ``function`` with a session, within the time limit.

        Args:
            operation: a few words for the error, such as ``unwrapping``.
            function: gets the session.
            changes: whether ``function`` changes the token: then its session is a writing one, and
                ``function`` is not run twice.
            limit: seconds, in place of the time limit of the settings.

        Raises:
            KeymgmtError: the translated error of the module, or any error of ``function``.
        """
        limit = limit or self.settings.timeout
        if self.settings.login == "protected":
            # Any call may need the PIN: after a loss, and for a key that requires it at each use.
            limit = max(limit, PAD_LIMIT)
        deadline = Deadline(limit, f"{operation}: the module")
        call = _Call(operation, function, changes, deadline)
        try:
            return self._run(call)
        except PinWanted:
            pass
        with contextlib.ExitStack() as stack:
            with deadline.paused():
                stack.enter_context(self._asking)
            try:
                return self._run(call)  # another thread may have asked and logged in meanwhile
            except PinWanted:
                assert self.settings.pin is not None  # noqa: S101 - only a prompt raises it
            with deadline.paused():
                call.typed = self.settings.pin.read()
            stack.callback(wipe, call.typed)
            return self._run(call)

    def _run(self, call: _Call[R]) -> R:
        deadline = call.deadline
        while True:
            entry = self._take(call)
            try:
                serve = functools.partial(self._serve, entry, call)
                return within(deadline.remaining, deadline.label, serve)
            except ProviderUnavailable:
                self._abandon(entry, call)
                raise
            except CkError as error:
                if error.code == Ckr.SESSION_COUNT and self._shrink():
                    continue
                raise translate(error, call.operation) from error

    def close(self) -> None:
        """Close every session; waits for calls in flight, up to the time limit."""
        entries = self._lose(self.epoch)
        with self._state:
            self._state.wait_for(
                lambda: not any(entry.call and not entry.abandoned for entry in entries),
                self.settings.timeout,
            )

    @property
    def sessions(self) -> tuple[int, int]:
        """How many sessions are open, and how many may be."""
        with self._state:
            return sum(entry.session is not None for entry in self._entries), self._limit

    def _take(self, call: _Call[Any]) -> _PoolEntry:
        deadline = call.deadline
        with self._state:
            while not self._idle:
                if len(self._entries) < self._limit:
                    self._idle.append(_PoolEntry())
                    self._entries.update(self._idle)
                    break
                if not self._state.wait(deadline.remaining) and not deadline.remaining:
                    raise ProviderUnavailable(
                        f"{call.operation}: all {self._limit} sessions were busy for "
                        f"{deadline.seconds:g} seconds",
                        hint="set sessions or timeout higher, or see whether the HSM hangs",
                    )
            entry = self._idle.pop()
            entry.call = call
            return entry

    def _give_back(self, entry: _PoolEntry) -> None:
        with self._state:
            if (
                entry.session is not None
                and entry.epoch == self.epoch
                and not entry.abandoned
                and len(self._entries) <= self._limit
            ):
                entry.call = None
                self._idle.append(entry)
                self._state.notify()
                return
        entry.drop()
        with self._state:
            entry.call = None
            self._entries.discard(entry)
            self._state.notify_all()

    def _shrink(self) -> bool:
        """Limit the pool to the sessions that are open; False where there are none."""
        with self._state:
            self._limit = max(1, min(self._limit, len(self._entries)))
            return bool(self._entries)

    def _abandon(self, entry: _PoolEntry, call: _Call[Any]) -> None:
        """Do not use an entry again whose ``call`` gave no answer, if it still has that call."""
        # The entry stays in the pool: so a module that hangs takes `sessions` threads at most.
        with self._state:
            if entry.call is not call:
                return
            entry.abandoned = True
            self._state.notify_all()
        in_flight = entry.in_flight
        if in_flight is not None:
            in_flight.end()

    def _lose(self, epoch: int) -> list[_PoolEntry]:
        """Do not use a session of ``epoch`` again; return the entries of the whole pool."""
        with self._state:
            if epoch != self.epoch:
                return []
            self.epoch += 1
            self._cache = {}
            idle, self._idle = self._idle, []
            for entry in idle:
                entry.call = entry
            entries = list(self._entries)
        if idle:
            # C_CloseSession may take long where the HSM is away.
            threading.Thread(target=self._drop, args=(idle,), daemon=True).start()
        return entries

    def _drop(self, entries: list[_PoolEntry]) -> None:
        for entry in entries:
            self._give_back(entry)

    def _serve(self, entry: _PoolEntry, call: _Call[R]) -> R:
        step = 0
        try:
            while True:
                began = False
                try:
                    session = self._connected(entry, call)
                    with session.module.call() as entry.in_flight:
                        began = True
                        if call.changes:
                            with session.writing() as other:
                                answer = call.function(other)
                        else:
                            answer = call.function(session)
                    session.module.in_vain = 0
                except PinWanted:
                    # An operation may be active in the session: the PIN is asked for between
                    # C_SignInit and C_Sign.
                    entry.drop()
                    raise
                except (CkError, NoToken) as error:
                    entry.drop()
                    step = self._recover(entry.epoch, error, step, call, began=began)
                else:
                    return answer
                finally:
                    entry.in_flight = None
        finally:
            self._give_back(entry)

    def _connected(self, entry: _PoolEntry, call: _Call[Any]) -> Session:
        if entry.session is not None and entry.epoch == self.epoch:
            if entry.session.generation == entry.session.module.generation:
                entry.session.typed = call.typed
                return entry.session
            # Another provider that uses this module has initialised it again.
            self._lose(entry.epoch)
        entry.drop()
        entry.epoch = self.epoch
        entry.session = self._connect(entry, call)
        return entry.session

    def _recover(
        self,
        epoch: int,
        error: CkError | NoToken,
        step: int,
        call: _Call[Any],
        *,
        began: bool,
    ) -> int:
        """Replace the next thing that may help against ``error``, or raise it.

        Args:
            epoch: the epoch of the session that saw the error.
            error: the error.
            step: 0 after the first failure, for which the session was replaced already.
            call: the call that failed.
            began: whether the function of the call ran, and not only the connection failed.

        Returns:
            The step for the next failure.
        """
        answered = error if isinstance(error, CkError) else None
        if answered and not answered.passing:
            raise error
        login = answered is not None and answered.call == "C_Login"
        # A function that changes the token is not repeated; and a call sends its PIN only once,
        # whatever was replaced.
        final = (call.changes and began) or (
            login and answered is not None and answered.code not in NOT_COMPARED
        )
        if final or not answered or step:
            self._lose(epoch)
        self._cache["after loss"] = True
        if final:
            raise error
        if answered and step < 2:
            return step + 1
        step = max(step, 2)
        pause = _PAUSES[min(step - 2, len(_PAUSES) - 1)]
        # While others log in to the same token, SoftHSM answers for a moment that the token has no
        # PIN, or that something failed.
        deadline = call.deadline
        patient = login and deadline.remaining > deadline.seconds / 2
        over = step - 2 >= len(_PAUSES) or (began and step > 2)
        if (over and not patient) or deadline.remaining <= pause:
            raise error
        module = open_module(self.settings.library, self.settings.init_args)
        if not answered or step == 2:
            module.restart(self._generation)
        time.sleep(pause)
        return step + 1

    def _connect(self, entry: _PoolEntry, call: _Call[Any]) -> Session:
        with self._connecting:
            module = open_module(self.settings.library, self.settings.init_args)
            self._generation = module.generation
            cache = self._cache
            with module.call() as entry.in_flight:
                token = cache.get("token") or find_token(module, self.settings)
                session = Session(module, token, self.settings, cache, call.typed)
            # The next session of this connection need not look for the token.
            cache["token"] = token
            return session
