"""The session of one provider: a token that is kept alive, and revoked at the end.

A thread of the session renews the token when two thirds of its time are over, or logs in again
where it can no longer be renewed, so that no caller waits for that. If the server does not know a
token any more, the call that learns it logs in again, once. ``close`` revokes the tokens for which
this process logged in, and no token that was given to it.
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

from keymgmt.backend import Deadline, ForkSafe, KeymgmtError, ProviderError, ProviderUnavailable
from keymgmt_vault._connection import Connection
from keymgmt_vault._errors import Refusal, Verb, refused
from keymgmt_vault._login import LOGIN_HINTS, Lease, Login
from keymgmt_vault._settings import AgentAuth, TokenAuth

if TYPE_CHECKING:
    from keymgmt_vault._settings import VaultSettings

__all__ = ["Session", "unbound"]

_LOGOUT: Final = 1.0  # seconds for revoking all tokens
_NO_NEW_LOGIN: Final = 60.0  # seconds without a new login, after a new token was refused too
log: Final = logging.getLogger("keymgmt.vault")


class Session(ForkSafe):
    """The Transit engine of one provider; thread-safe and fork-safe; raises only our errors."""

    def __init__(self, name: str, settings: VaultSettings) -> None:
        self.name = name
        self.settings = settings
        self.connection = Connection(settings)
        self._auth = settings.auth
        self._login = Login(settings, self.connection)
        self._lease: Lease | None = None
        super().__init__()

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._running: set[object] = set()
        self._keeper: threading.Event | None = None
        # A parent's tokens are revoked by the parent.
        self._ours: list[Lease] = []
        self._no_login_until = 0.0

    @property
    def needs_token(self) -> bool:
        """Whether requests carry a token of the session; the listener of an agent adds its own."""
        return not (isinstance(self._auth, AgentAuth) and self._auth.sink is None)

    def transit(
        self, verb: Verb, native: str, method: str, path: str, **options: Any
    ) -> dict[str, Any]:
        """``call`` with a path of the Transit engine, such as ``keys/NAME``."""
        return self.call(verb, native, method, f"/v1/{self.settings.mount}/{path}", **options)

    def call(
        self, verb: Verb, native: str, method: str, path: str, **options: Any
    ) -> dict[str, Any]:
        """Send a request logged in, once more if the token had died, and return its ``data``.

        Args:
            verb: what the request does, for ``_errors.refused``.
            native: the key's name in Transit; empty where it concerns no key.
            method: as in ``Connection.request``.
            path: from ``/v1/`` on, made of checked parts.
            options: the other options of ``Connection.request``.

        Raises:
            AccessDenied: the token has expired, or its policy does not allow this.
            ProviderUnavailable: no answer that can be used.
            ProviderError: any other refusal, see ``_errors.refused``.
        """

        def action() -> Any:
            return self.connection.request(method, path, **options)

        with self.connection.operation(), self._running_call():
            lease = self.log_in()
            try:
                answer = self._patiently(action)
            except Refusal as refusal:
                if refusal.code != "dead token" or not self._replace(lease):
                    raise self._refused(refusal, verb, native, path) from refusal
                try:
                    answer = action()
                except Refusal as second:
                    if second.code == "dead token" and not isinstance(self._auth, TokenAuth):
                        # A new token was refused too, so more logins would not help for now.
                        self._no_login_until = time.monotonic() + _NO_NEW_LOGIN
                    raise self._refused(second, verb, native, path) from second
        if not isinstance(answer, dict):
            return {}
        warnings = answer.get("warnings")
        for warning in warnings if isinstance(warnings, list) else []:
            if "associated_data" in str(warning):
                raise unbound()
            log.info("the server warns: %s", str(warning)[:200])
        data = answer.get("data")
        return data if isinstance(data, dict) else {}

    def _refused(self, refusal: Refusal, verb: Verb, native: str, path: str) -> ProviderError:
        if refusal.code == "dead token" and not self.needs_token:
            return ProviderUnavailable(
                "the agent has not logged in, or its token died", hint=LOGIN_HINTS["agent"]
            )
        return refused(refusal.code, verb, native, self.settings, refusal.words, path)

    def _patiently(self, action: Callable[[], Any]) -> Any:
        """Run ``action``, and wait for an agent that has not logged in yet, as during a boot."""
        while True:
            try:
                return action()
            except Refusal as refusal:
                agent_is_late = refusal.code == "dead token" and not self.needs_token
                if not agent_is_late or self.connection.deadline.remaining < 1:
                    raise
            time.sleep(0.25)

    @contextlib.contextmanager
    def _running_call(self) -> Iterator[None]:
        # Adding to a set and discarding from it are atomic in Python, so no lock is needed.
        self._running.add(call := object())
        try:
            yield
        finally:
            self._running.discard(call)

    def log_in(self) -> Lease | None:
        """Make sure that the session has a valid token and a thread that renews it.

        Returns:
            The token's lease; None where the listener of an agent adds its own token.

        Raises:
            AccessDenied: the login was refused.
            ProviderUnavailable: there was no answer to the login, or a secret cannot be read.
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
        """Replace a token that the server does not know; False where a login gives no other."""
        if dead is None or time.monotonic() < self._no_login_until:
            return False
        with self._turn():
            # The lease is None if another thread closed the provider meanwhile.
            if self._lease is dead or self._lease is None:
                self._log_in()
            return self._lease is not None and self._lease.token != dead.token

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock; waiting for the login of another thread ends by the deadline."""
        return self.connection.deadline.hold(self._lock)

    def _log_in(self) -> None:
        lease, now = self._login.get(), time.monotonic()
        self._ours = [each for each in (*self._ours, lease) if each.ours and each.ends > now]
        self._lease, self.connection.token = lease, lease.token

    def tend(self) -> float | None:
        """Renew or replace the token if that is due.

        Returns:
            Seconds until this is to be called again; None for never.
        """
        lease = self._lease
        if lease is None or lease.renew_at is None:
            self._keeper = None
            return None
        due = lease.renew_at - time.monotonic()
        if due > 0:
            return due
        # This holds the lock, for which a caller with a dead token would have to wait.
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
            # A token that has ended cannot be renewed.
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
                # A token that may not look itself up is used as it is, and never renewed.
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
        # Vault grants less time as the token nears its max TTL. Then a login replaces the token
        # while it is still valid.
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
        """Log out, within a second, and close the connections; the session may be used again."""
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
            # A token that a call of another thread still uses is not revoked.
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
    """The error for a server that ignores the context: any wrap would open under another model."""
    return ProviderUnavailable(
        "the server does not bind what it encrypts to its context (associated_data)",
        hint="HashiCorp Vault does so from 1.13 on; use an RSA key, or a newer server",
    )
