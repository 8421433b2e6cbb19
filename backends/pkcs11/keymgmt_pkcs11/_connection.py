"""The connection of one provider: a bounded pool of sessions.

A C call cannot be interrupted, so another thread makes it and the caller only waits, up to the time
limit (``within``). A call that does not come back keeps its thread and its session: neither is used
again, and should it come back one day, it closes the session. An interrupt ends the wait the same
way, except that the session returns to the pool when its call is done.

Sessions are read-only; what changes the token gets another for the time of the call. No session
logs in or out by itself: the first to open logs the process in, and the token logs it out when the
last is closed.

A call that failed for a passing reason is made again, after ever more was made anew: its session;
every session here, and so the login; the library, by C_Finalize and C_Initialize, where we
initialised it. Each happens once for a call, and within its time limit.
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
"""Seconds for a call that a person may give the PIN for at the token's PIN pad."""
_PAUSES: Final = (0.01, 0.03, 0.06, 0.1, 0.2)


class Session:
    """An open session, as a call gets it.

    Attributes:
        module: the library.
        token: the token as it was when the connection was made.
        handle: its number, which ``renew`` changes.
        cache: shared by all sessions of one connection; empty again after a loss, but for
            ``again``, which says that there was one and no login since.
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
            again = self.cache.get("again", False)
            self._log_in(handle, again=again)
            self.cache.pop("again", None)
        except BaseException:
            with contextlib.suppress(CkError):
                self.ck.close_session(handle)
            raise
        return handle

    def _log_in(self, handle: int, **how: bool) -> None:
        log_in(self.module, self.token, handle, self.settings, typed=self.typed, **how)

    def close(self) -> None:
        # After a C_Initialize the number may be somebody else's session.
        if self.generation == self.module.generation:
            with contextlib.suppress(CkError):
                self.ck.close_session(self.handle)

    def renew(self) -> None:
        """Another session in place of this one, which a failed call may have left in the middle."""
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
        """A session that may change the token, while this one is kept."""
        other = Session(
            self.module, self.token, self.settings, self.cache, self.typed, writing=True
        )
        try:
            yield other
        finally:
            other.close()

    def approve(self) -> None:
        """Log in for one use of one key, which it wants (CKA_ALWAYS_AUTHENTICATE)."""
        self._log_in(self.handle, context=True)

    def confirm(self) -> None:
        """Raise if token or login is gone: no key is seen then, and that must not be the news.

        Raises:
            CkError: it is gone.
        """
        if self.settings.login != "none" and not self.ck.logged_in(self.handle):
            raise CkError("C_GetSessionInfo", Ckr.USER_NOT_LOGGED_IN)
        self.ck.token_info(self.token.slot)


@dataclass(slots=True, eq=False)
class _Call(Generic[R]):
    """What ``run`` was given, until when, and the PIN where somebody typed it for this."""

    doing: str
    function: Callable[[Session], R]
    changes: bool
    deadline: Deadline
    typed: bytearray | None = None


class _Place:
    """Room for one session, which one ``call`` has at a time."""

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
        epoch: grows with every loss; sessions of an older one are opened again.
    """

    def __init__(self, settings: Pkcs11Settings) -> None:
        self.settings = settings
        self.epoch = 0
        super().__init__()

    def _renew(self) -> None:
        # A parent's sessions are only forgotten.
        self.epoch += 1
        self._cache: dict[Any, Any] = {}
        self._state = threading.Condition(threading.Lock())
        self._connecting = threading.Lock()
        self._asking = threading.Lock()
        self._idle: list[_Place] = []
        self._places: set[_Place] = set()
        self._limit = self.settings.sessions
        self._generation = 0

    def run(
        self,
        doing: str,
        function: Callable[[Session], R],
        *,
        changes: bool = False,
        limit: float | None = None,
    ) -> R:
        """Run ``function`` with a session, within the time limit.

        Args:
            doing: words for an error, such as ``unwrapping``.
            function: gets the session.
            changes: whether it changes the token: then its session may, and it is not run twice.
            limit: seconds in place of the settings' time limit.

        Raises:
            KeymgmtError: whatever went wrong, translated.
        """
        limit = limit or self.settings.timeout
        if self.settings.login == "protected":
            # In any call: after a loss, and for each use of a key that wants it.
            limit = max(limit, PAD_LIMIT)
        deadline = Deadline(limit, f"{doing}: the module")
        call = _Call(doing, function, changes, deadline)
        try:
            return self._run(call)
        except PinWanted:
            pass
        with contextlib.ExitStack() as stack:
            with deadline.paused():
                stack.enter_context(self._asking)
            try:
                return self._run(call)  # somebody else may have been asked meanwhile
            except PinWanted:
                assert self.settings.pin is not None  # noqa: S101 - it has a prompt
            with deadline.paused():
                call.typed = self.settings.pin.read()
            stack.callback(wipe, call.typed)
            return self._run(call)

    def _run(self, call: _Call[R]) -> R:
        deadline = call.deadline
        while True:
            place = self._take(call)
            try:
                serve = functools.partial(self._serve, place, call)
                return within(deadline.remaining, deadline.label, serve)
            except ProviderUnavailable:
                self._abandon(place, call)
                raise
            except CkError as error:
                if error.code == Ckr.SESSION_COUNT and self._fewer():
                    continue
                raise translate(error, call.doing) from error

    def close(self) -> None:
        """Close every session; waits for calls in flight, up to the time limit."""
        places = self._lose(self.epoch)
        with self._state:
            self._state.wait_for(
                lambda: not any(place.call and not place.abandoned for place in places),
                self.settings.timeout,
            )

    @property
    def sessions(self) -> tuple[int, int]:
        """How many sessions are open, and how many may be."""
        with self._state:
            return sum(place.session is not None for place in self._places), self._limit

    def _take(self, call: _Call[Any]) -> _Place:
        deadline = call.deadline
        with self._state:
            while not self._idle:
                if len(self._places) < self._limit:
                    self._idle.append(_Place())
                    self._places.update(self._idle)
                    break
                if not self._state.wait(deadline.remaining) and not deadline.remaining:
                    raise ProviderUnavailable(
                        f"{call.doing}: all {self._limit} sessions were busy for "
                        f"{deadline.seconds:g} seconds",
                        hint="set sessions or timeout higher, or see whether the HSM hangs",
                    )
            place = self._idle.pop()
            place.call = call
            return place

    def _give_back(self, place: _Place) -> None:
        with self._state:
            if (
                place.session is not None
                and place.epoch == self.epoch
                and not place.abandoned
                and len(self._places) <= self._limit
            ):
                place.call = None
                self._idle.append(place)
                self._state.notify()
                return
        place.drop()
        with self._state:
            place.call = None
            self._places.discard(place)
            self._state.notify_all()

    def _fewer(self) -> bool:
        """Do with the sessions that there are; whether there are any."""
        with self._state:
            # A call that hangs gives nothing back, but others may.
            self._limit = max(1, min(self._limit, len(self._places)))
            return bool(self._places)

    def _abandon(self, place: _Place, call: _Call[Any]) -> None:
        """Use a place no more, if it is that call's still, which gave no answer."""
        # It stays among the places, so that a module that hangs takes `sessions` threads at most.
        with self._state:
            if place.call is not call:
                return
            place.abandoned = True
            self._state.notify_all()
        in_flight = place.in_flight
        if in_flight is not None:
            in_flight.end()

    def _lose(self, epoch: int) -> list[_Place]:
        """Use no session of that epoch any more; the places of calls that have one."""
        with self._state:
            if epoch != self.epoch:
                return []
            self.epoch += 1
            self._cache = {}
            idle, self._idle = self._idle, []
            for place in idle:
                place.call = place
            places = list(self._places)
        if idle:
            # C_CloseSession may take long where the HSM is away.
            threading.Thread(target=self._drop, args=(idle,), daemon=True).start()
        return places

    def _drop(self, places: list[_Place]) -> None:
        for place in places:
            self._give_back(place)

    def _serve(self, place: _Place, call: _Call[R]) -> R:
        step = 0
        try:
            while True:
                began = False
                try:
                    session = self._connected(place, call)
                    with session.module.call() as place.in_flight:
                        began = True
                        if call.changes:
                            with session.writing() as other:
                                answer = call.function(other)
                        else:
                            answer = call.function(session)
                    session.module.in_vain = 0
                except PinWanted:
                    # Perhaps in the middle of an operation.
                    place.drop()
                    raise
                except (CkError, NoToken) as error:
                    place.drop()
                    step = self._make_anew(place.epoch, error, step, call, began=began)
                else:
                    return answer
                finally:
                    place.in_flight = None
        finally:
            self._give_back(place)

    def _connected(self, place: _Place, call: _Call[Any]) -> Session:
        if place.session is not None and place.epoch == self.epoch:
            if place.session.generation == place.session.module.generation:
                place.session.typed = call.typed
                return place.session
            # Another provider of this module initialised it anew.
            self._lose(place.epoch)
        place.drop()
        place.epoch = self.epoch
        place.session = self._connect(place, call)
        return place.session

    def _make_anew(
        self,
        epoch: int,
        error: CkError | NoToken,
        step: int,
        call: _Call[Any],
        *,
        began: bool,
    ) -> int:
        """Make the next thing anew that may help against an error, or raise it; the step after.

        Args:
            epoch: of the session that saw the error.
            error: the error.
            step: 0 after the first failure: it has a new session already.
            call: what failed.
            began: whether it was that, or only the connection.
        """
        answered = error if isinstance(error, CkError) else None
        if answered and not answered.passing:
            raise error
        login = answered is not None and answered.call == "C_Login"
        # Only what changes nothing is done twice; and a call has one PIN, whatever was made anew.
        final = (call.changes and began) or (
            login and answered is not None and answered.code not in NOT_COMPARED
        )
        if final or not answered or step:
            self._lose(epoch)
        self._cache["again"] = True
        if final:
            raise error
        if answered and step < 2:
            return step + 1
        step = max(step, 2)
        pause = _PAUSES[min(step - 2, len(_PAUSES) - 1)]
        # SoftHSM has no PIN, or no answer, for a moment while others log in to the same token.
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

    def _connect(self, place: _Place, call: _Call[Any]) -> Session:
        with self._connecting:
            module = open_module(self.settings.library, self.settings.init_args)
            self._generation = module.generation
            cache = self._cache
            with module.call() as place.in_flight:
                token = cache.get("token") or find_token(module, self.settings)
                session = Session(module, token, self.settings, cache, call.typed)
            # The next session of this connection need not look for it.
            cache["token"] = token
            return session
