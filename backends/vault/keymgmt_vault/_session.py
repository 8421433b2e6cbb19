"""The session of one provider: a token that is kept alive, and given back at the end.

A token that we got is renewed when two thirds of its time are over, or replaced by a new login
where it can no longer be renewed, by a thread of its own, so that no caller waits for it. A token
that the server no longer knows is replaced once by the call that finds out. ``close`` revokes what
this process logged in for, and nothing that was given to it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from hvac.api.auth_methods import Token
from hvac.api.secrets_engines import Transit

from keymgmt.backend import Deadline, ForkSafe, KeymgmtError, ProviderError, ProviderUnavailable
from keymgmt_vault._connection import Connection
from keymgmt_vault._errors import Refusal, Verb, refused
from keymgmt_vault._login import LOGIN_HINTS, Lease, Login
from keymgmt_vault._settings import AgentAuth, TokenAuth

if TYPE_CHECKING:
    from keymgmt_vault._settings import VaultSettings

__all__ = ["Session", "unbound"]

_LOGOUT: Final = 1.0
_FRUITLESS: Final = 60.0
log: Final = logging.getLogger("keymgmt.vault")


class Session(ForkSafe):
    """Transit of one provider; thread-safe and fork-safe, and raises only keymgmt's errors."""

    def __init__(self, name: str, settings: VaultSettings) -> None:
        self.name = name
        self.settings = settings
        self.connection = Connection(settings)
        self.transit = Transit(self.connection)
        self._auth = settings.auth
        self._login = Login(settings, self.connection)
        self._lease: Lease | None = None
        super().__init__()

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._running: set[object] = set()
        self._keeper: threading.Event | None = None
        # What a parent logged in for is its own to revoke.
        self._ours: list[Lease] = []
        self._fruitless = 0.0

    @property
    def needs_token(self) -> bool:
        """Whether requests carry a token of ours; an agent's listener adds its own."""
        return not (isinstance(self._auth, AgentAuth) and self._auth.sink is None)

    def call(self, verb: Verb, native: str, action: Callable[[], Any]) -> dict[str, Any]:
        """Run ``action`` logged in, once more if the token had died, and return its ``data``.

        Args:
            verb: what it does, as ``_errors.refused`` names it.
            native: the key's name in Transit; empty for none.
            action: one request through ``connection``.

        Raises:
            AccessDenied: expired or not allowed; the message says which.
            ProviderUnavailable: no answer that can be used.
            ProviderError: any other refusal, as ``_errors.refused``.
        """
        with self.connection.operation(), self._running_call():
            lease = self.log_in()
            try:
                answer = self._patiently(action)
            except Refusal as refusal:
                if refusal.code != "dead token" or not self._replace(lease):
                    raise self._refused(refusal, verb, native) from refusal
                try:
                    answer = action()
                except Refusal as again:
                    if again.code == "dead token" and not isinstance(self._auth, TokenAuth):
                        # What is refused with a new token is not cured by one login for each call.
                        self._fruitless = time.monotonic() + _FRUITLESS
                    raise self._refused(again, verb, native) from again
        if not isinstance(answer, dict):
            return {}
        warnings = answer.get("warnings")
        for warning in warnings if isinstance(warnings, list) else []:
            if "associated_data" in str(warning):
                raise unbound()
            log.info("the server warns: %s", str(warning)[:200])
        data = answer.get("data")
        return data if isinstance(data, dict) else {}

    def _refused(self, refusal: Refusal, verb: Verb, native: str) -> ProviderError:
        if refusal.code == "dead token" and not self.needs_token:
            return ProviderUnavailable(
                "the agent has not logged in, or its token died", hint=LOGIN_HINTS["agent"]
            )
        return refused(refusal.code, verb, native, self.settings, refusal.words)

    def _patiently(self, action: Callable[[], Any]) -> Any:
        """Run ``action``; at boot an agent that we ask through may not have logged in yet."""
        while True:
            try:
                return action()
            except Refusal as refusal:
                late = refusal.code == "dead token" and not self.needs_token
                if not late or self.connection.deadline.remaining < 1:
                    raise
            time.sleep(0.25)

    @contextlib.contextmanager
    def _running_call(self) -> Iterator[None]:
        # Adding to a set and taking from it are each one step for other threads.
        self._running.add(call := object())
        try:
            yield
        finally:
            self._running.discard(call)

    def log_in(self) -> Lease | None:
        """Have a token that lives, and somebody who keeps it alive; None where an agent has it.

        Raises:
            AccessDenied: the login was refused.
            ProviderUnavailable: no answer to the login, or a secret that is not there.
        """
        if not self.needs_token:
            return None
        lease = self._lease
        if lease is None or time.monotonic() >= lease.ends:
            with self._turn():
                if self._lease is lease:
                    self._log_in()
                lease = self._lease
        if self._keeper is None and lease is not None and lease.renew_at is not None:
            with self._turn():
                if self._keeper is None:
                    self._keeper = threading.Event()
                    _start_keeper(self, self._keeper)
        return lease

    def _replace(self, dead: Lease | None) -> bool:
        """Replace a token that the server does not know; False where only the operator can."""
        if dead is None or time.monotonic() < self._fruitless:
            return False
        with self._turn():
            # None where another thread closed the provider meanwhile.
            if self._lease is dead or self._lease is None:
                self._log_in()
            return self._lease is not None and self._lease.token != dead.token

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the lock; a thread that waits for another's login still ends in time."""
        lock = self._lock
        if not lock.acquire(timeout=self.connection.deadline.remaining):
            raise ProviderUnavailable("the login of another thread gave no answer in time")
        try:
            yield
        finally:
            lock.release()

    def _log_in(self) -> None:
        lease, now = self._login.get(), time.monotonic()
        self._ours = [each for each in (*self._ours, lease) if each.ours and each.ends > now]
        self._lease, self.connection.token = lease, lease.token

    def tend(self) -> float | None:
        """Do what is due for the token; seconds until it is to be asked again, None for never."""
        lease = self._lease
        if lease is None or lease.renew_at is None:
            self._keeper = None
            return None
        due = lease.renew_at - time.monotonic()
        if due > 0:
            return due
        # A callers' call that finds it dead must not wait for us for long.
        patience = max(self.settings.call_timeout, (lease.ends - time.monotonic()) / 2)
        try:
            with (
                self.connection.operation(min(self.settings.timeout, patience)),
                self._running_call(),
            ):
                self._extend(lease)
        except (KeymgmtError, Refusal) as error:
            left = lease.ends - time.monotonic()
            end = "its end is not known" if left == float("inf") else f"it ends in {left:.0f} s"
            if left <= 0:
                end = "and has ended, so the next call logs in"
            log.warning("the token of %s was not renewed, %s: %s", self.name, end, error)
            wait = min(60.0, max(1.0, left / 4))
            # A dead token is dead for ever.
            lease.renew_at = time.monotonic() + wait if left > 0 else None
        return 0.0

    def _extend(self, lease: Lease) -> None:
        given = isinstance(self._auth, TokenAuth)
        if given and self._login.is_replaced(lease):
            with self._turn():
                self._log_in()
            return
        api = Token(self.connection)
        if given and not lease.seconds:
            try:
                answer = api.lookup_self()
            except Refusal:
                # It may not look itself up: it is used as it is, and never renewed.
                lease.renew_at = None
                return
            data = (answer.get("data") if isinstance(answer, dict) else None) or {}
            lease.plan(data.get("ttl"), data.get("renewable"))
            if data.get("num_uses"):
                lease.renew_at = None
            return
        before = lease.seconds
        if lease.renewable:
            answer = api.renew_self()
            auth = answer.get("auth") if isinstance(answer, dict) else None
            if isinstance(auth, dict):
                lease.plan(auth.get("lease_duration"), auth.get("renewable"))
        # A lease that shrinks nears its greatest age: better log in while it still lives.
        if lease.renewable and lease.seconds > before * 0.9:
            return
        if not given and not self._login.asks_a_person:
            with self._turn():
                if self._lease is lease:
                    self._log_in()
            return
        left = lease.ends - time.monotonic()
        log.warning("the token of %s cannot be renewed and ends in %.0f s", self.name, left)
        lease.renew_at = time.monotonic() + max(1.0, left / 3)

    def close(self) -> None:
        """Log out, within a second, and close the connections; it may be used again."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.set()
        deadline = Deadline(_LOGOUT, "logging out")
        while self._running and deadline.remaining:
            time.sleep(0.01)
        quiet = not self._running
        ours, self._ours = self._ours, []
        self._lease = None
        self.connection.token = None
        for lease in ours:
            # Not one that a call of another thread still uses.
            if quiet and deadline.remaining:
                self._revoke(lease, deadline.remaining)
        self._login.close()
        self.connection.close()

    def _revoke(self, lease: Lease, seconds: float) -> None:
        try:
            with self.connection.operation(seconds):
                path = "/v1/auth/token/revoke-self"
                self.connection.request("post", path, token=lease.token)
        except (KeymgmtError, Refusal) as error:
            log.info("a token of %s lives until its time is over: %s", self.name, error)


def _start_keeper(session: Session, stop: threading.Event) -> None:
    reference = weakref.ref(session)
    weakref.finalize(session, stop.set)

    def keep() -> None:
        wait: float | None = 0.0
        while wait is not None and not stop.wait(wait):
            living = reference()
            wait = living.tend() if living is not None else None
            del living

    threading.Thread(target=keep, name=f"keymgmt {session.name} token", daemon=True).start()


def unbound() -> ProviderError:
    """The server ignores the context, so what is wrapped for one model would open another."""
    return ProviderUnavailable(
        "the server does not bind what it encrypts to its context (associated_data)",
        hint="HashiCorp Vault does so from 1.13 on; use an RSA key, or a newer server",
    )
