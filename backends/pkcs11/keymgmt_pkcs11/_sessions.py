"""A bounded pool of sessions, each with a thread of its own.

A C call cannot be interrupted, so it runs on its session's thread and the caller only waits, up to
the time limit. A call that does not come back keeps its thread and its session: neither is used
again, and should it come back one day, it closes the session and ends. An interrupt ends the wait
the same way, except that the session returns to the pool when its call is done.

No session logs in or out by itself: the first to open logs the process in, and the token logs it
out when the last is closed. After a loss everything is opened again, once for each call.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pkcs11.exceptions import PKCS11Error

from keymgmt.backend import AccessDenied, ProviderUnavailable
from keymgmt_pkcs11._cryptoki import CkError
from keymgmt_pkcs11._errors import LOST, reason, translate
from keymgmt_pkcs11._module import Module, open_module
from keymgmt_pkcs11._token import NoToken, find_token, log_in

if TYPE_CHECKING:
    from pkcs11 import Session, Token

    from keymgmt_pkcs11._settings import Pkcs11Settings

__all__ = ["Channel", "Lost", "Pool"]

R = TypeVar("R")
SETTLED: Final = 1.0
"""Seconds after C_Initialize for which a module is believed about its tokens."""
PROMPT_LIMIT: Final = 300.0
"""Seconds for a call that asks a person for the PIN."""
FREE_RESTARTS: Final = 3
"""How often in a process that is not waited for."""
_PAUSES: Final = (0.01, 0.03, 0.06, 0.1, 0.2)


class Lost(Exception):
    """Raised by a call that suspects the token: reconnect from the ground, then try once more."""


class _NoSession(Exception):
    """The token has no free session for one more thread."""


class Channel:
    """An open session, as a call gets it.

    Attributes:
        module: the library.
        token: the token as it was when the session was opened.
        session: python-pkcs11's session.
        handle: its number.
        cache: shared by all sessions of one connection; empty again after a loss.
        expects_login: whether private objects are to be seen.
    """

    def __init__(
        self,
        module: Module,
        token: Token,
        session: Session,
        cache: dict[Any, Any],
        *,
        expects_login: bool,
    ) -> None:
        self.module = module
        self.generation = module.generation
        self.token = token
        self.session = session
        self.handle: int = session.handle  # type: ignore[attr-defined]
        self.cache = cache
        self.ck = module.cryptoki
        self.expects_login = expects_login

    def close(self) -> None:
        # After a C_Initialize the number may be somebody else's session.
        if self.generation == self.module.generation:
            with contextlib.suppress(PKCS11Error), self.module.call():
                self.session.close()


class _Lane:
    """One thread and its session."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.channel: Channel | None = None
        self.epoch = -1
        self.jobs: SimpleQueue[tuple[Callable[[Channel], Any], bool, SimpleQueue[Any]] | None] = (
            SimpleQueue()
        )
        self.ticket: Any = None
        self.abandoned = False
        self.thread = threading.Thread(target=self._run, name="keymgmt pkcs11", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            call, retry, box = job
            del job
            try:
                answer: tuple[bool, Any] = (True, self._serve(call, retry))
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
                answer = (False, error)
            del call
            # Back to the pool first: the caller's next call finds this lane idle.
            kept = self.pool._give(self)
            box.put(answer)
            del answer, box
            if not kept:
                break
        self._drop()

    def _drop(self) -> None:
        channel, self.channel = self.channel, None
        if channel is not None:
            channel.close()

    def _serve(self, call: Callable[[Channel], R], retry: bool) -> R:
        for last in (False, True):
            channel = self._connected()
            try:
                with channel.module.call() as self.ticket:
                    return call(channel)
            except (Lost, PKCS11Error, CkError) as error:
                suspect = isinstance(error, Lost)
                if not suspect and reason(error) not in LOST:
                    raise
                self.pool._lose(self.epoch, restart=suspect)
                self._drop()
                if last or not retry:
                    if isinstance(error, Lost) and error.__cause__:
                        raise error.__cause__ from None
                    raise
            finally:
                self.ticket = None
        raise AssertionError("unreachable")

    def _connected(self) -> Channel:
        if self.channel is not None and self.epoch == self.pool.epoch:
            if self.channel.generation == self.channel.module.generation:
                return self.channel
            # Another provider of this module initialised it anew.
            self.pool._lose(self.epoch, restart=False)
        self._drop()
        self.epoch, self.channel = self.pool._connect()
        return self.channel


class Pool:
    """The sessions of one provider in one process. Every method is safe in any thread.

    Attributes:
        epoch: grows with every loss; sessions of an older one are opened again.
    """

    def __init__(self, settings: Pkcs11Settings) -> None:
        self.settings = settings
        self.epoch = 0
        self._cache: dict[Any, Any] = {}
        self._state = threading.Condition()
        self._connecting = threading.Lock()
        self._idle: list[_Lane] = []
        self._lanes: set[_Lane] = set()
        self._limit = settings.sessions
        self._closed = False
        self._restart = False

    def run(
        self,
        doing: str,
        call: Callable[[Channel], R],
        *,
        retry: bool = True,
        limit: float | None = None,
    ) -> R:
        """Run ``call`` with a session, within the time limit.

        Args:
            doing: words for an error, such as ``unwrapping``.
            call: gets the session; on a lost one it is run once more, with another.
            retry: False where running it twice could do harm.
            limit: seconds in place of the settings' time limit.

        Raises:
            KeymgmtError: whatever went wrong, translated.
        """
        limit = limit or self.settings.timeout
        if self.settings.pin and self.settings.pin.prompt and "token" not in self._cache:
            limit = max(limit, PROMPT_LIMIT)
        deadline = time.monotonic() + limit
        while True:
            lane = self._take(deadline, doing)
            box: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
            lane.jobs.put((call, retry, box))
            try:
                done, answer = box.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                self._abandon(lane)
                raise ProviderUnavailable(
                    f"{doing}: no answer within {limit:g} seconds",
                    hint="see whether the HSM hangs; the call and its session were abandoned",
                ) from None
            if done:
                return answer  # type: ignore[no-any-return]
            if isinstance(answer, _NoSession):
                with self._state:
                    # Others of this pool have sessions: wait for one of those.
                    self._limit = max(1, min(self._limit, len(self._lanes)))
                    others = bool(self._lanes)
                if others:
                    continue
                raise translate(answer.__cause__ or answer, doing)
            if not isinstance(answer, Exception):
                raise answer
            raise translate(answer, doing)

    def close(self) -> None:
        """Close every session; waits for calls in flight, up to the time limit."""
        with self._state:
            self._closed = True
            idle, self._idle = self._idle, []
            lanes = list(self._lanes)
            self._state.notify_all()
        for lane in idle:
            lane.jobs.put(None)
        deadline = time.monotonic() + self.settings.timeout
        for lane in lanes:
            lane.thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def sessions(self) -> tuple[int, int]:
        """How many sessions are open, and how many may be."""
        with self._state:
            return sum(lane.channel is not None for lane in self._lanes), self._limit

    def _take(self, deadline: float, doing: str) -> _Lane:
        with self._state:
            while not self._closed:
                if self._idle:
                    return self._idle.pop()
                if len(self._lanes) < self._limit:
                    lane = _Lane(self)
                    self._lanes.add(lane)
                    return lane
                if not self._state.wait(max(0.0, deadline - time.monotonic())) and (
                    time.monotonic() >= deadline
                ):
                    raise ProviderUnavailable(
                        f"{doing}: all {self._limit} sessions were busy for "
                        f"{self.settings.timeout:g} seconds",
                        hint="set sessions or timeout higher, or see whether the HSM hangs",
                    )
        raise ProviderUnavailable(f"{doing}: this provider was closed")

    def _give(self, lane: _Lane) -> bool:
        with self._state:
            keep = lane.channel is not None and not self._closed and not lane.abandoned
            if keep:
                self._idle.append(lane)
            else:
                self._lanes.discard(lane)
            self._state.notify()
            return keep

    def _abandon(self, lane: _Lane) -> None:
        # It stays among the lanes, so that a module that hangs takes `sessions` threads at most.
        lane.abandoned = True
        ticket = lane.ticket
        if ticket is not None:
            ticket.give_back()

    def _lose(self, epoch: int, *, restart: bool) -> None:
        with self._state:
            if epoch == self.epoch:
                self.epoch += 1
                self._cache = {}
                self._restart = restart

    def _connect(self) -> tuple[int, Channel]:
        with self._connecting:
            epoch = self.epoch
            module = open_module(self.settings.library, self.settings.init_args)
            if self._restart:
                self._restart = False
                module.restart(module.generation)
            for pause in _PAUSES:
                seen = module.generation
                try:
                    return epoch, self._open(module)
                except NoToken as error:
                    # A token that came, or that another process changed just then, may be seen
                    # only after a new C_Initialize. It is not done again and again.
                    if not module.restart(seen, settled=SETTLED if seen > FREE_RESTARTS else 0.0):
                        raise ProviderUnavailable(str(error), hint=error.hint) from error
                except (ProviderUnavailable, AccessDenied) as error:
                    # SoftHSM has no answer, or no PIN, for a moment while others log in to the
                    # same token. No PIN was compared then, so asking again counts as no try.
                    if isinstance(error, AccessDenied) and not _no_pin_yet(error):
                        raise
                    self._cache.pop("token", None)
                time.sleep(pause)
            module.restart(module.generation, settled=SETTLED)
            return epoch, self._open(module)

    def _open(self, module: Module) -> Channel:
        with module.call():
            known = self._cache.get("token")
            token = find_token(module, self.settings) if known is None else known
            try:
                session = token.open(rw=not self.settings.read_only)
            except PKCS11Error as error:
                if reason(error) == "SessionCount":
                    raise _NoSession from error
                raise translate(error, f"opening a session with {token.label!r}") from error
            channel = Channel(
                module,
                token,
                session,
                self._cache,
                expects_login=self.settings.login != "none",
            )
            try:
                log_in(module, token, channel.handle, self.settings)
            except BaseException as error:
                with contextlib.suppress(PKCS11Error):
                    session.close()
                if isinstance(error, (PKCS11Error, CkError)):
                    raise translate(error, f"logging in to {token.label!r}") from error
                raise
            # The next session of this connection need not look for it.
            self._cache["token"] = token
            return channel


def _no_pin_yet(error: AccessDenied) -> bool:
    cause = error.__cause__
    return isinstance(cause, CkError) and cause.reason == "UserPinNotInitialized"
