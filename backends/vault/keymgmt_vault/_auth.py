"""Logging in, staying logged in, and telling a dead token from a policy that says no.

A token is renewed when two thirds of its time are over, and replaced by a new login where it can
no longer be renewed. One thread does that; the others go on with the token that still lives.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from hvac import exceptions
from hvac.api.auth_methods import JWT, AppRole, Kubernetes, Token

from keymgmt.backend import (
    AccessDenied,
    ConfigError,
    ProviderUnavailable,
    SecretSource,
    private_file_problem,
    wipe,
)
from keymgmt_vault._locks import ProcessLock
from keymgmt_vault._settings import (
    AgentAuth,
    AppRoleAuth,
    CertAuth,
    JwtAuth,
    KubernetesAuth,
    TokenAuth,
)

if TYPE_CHECKING:
    from pathlib import Path

    from keymgmt_vault._cluster import ClusterAdapter
    from keymgmt_vault._settings import VaultSettings

__all__ = ["Login"]

_MAX_TOKEN: Final = 65536


class Login:
    """The token of one provider; shared by its threads, and made anew in a forked child."""

    def __init__(self, settings: VaultSettings, adapter: ClusterAdapter) -> None:
        self._auth = settings.auth
        self._adapter = adapter
        self._lock = ProcessLock()
        self._renew_at: float | None = None
        self._lease = 0.0
        self._renewable = False

    @property
    def needs_token(self) -> bool:
        """Whether requests carry a token of ours; an agent's listener adds its own."""
        return not (isinstance(self._auth, AgentAuth) and self._auth.sink is None)

    def ensure(self) -> None:
        """Have a token that lives for a while yet; logs in or renews if need be.

        Raises:
            AccessDenied: the login was refused.
            ConfigError: a secret source cannot be read.
            ProviderUnavailable: no answer to the login.
        """
        if not self.needs_token:
            return
        lock = self._lock.here()
        if self._adapter.token is None:
            with self._turn():
                if self._adapter.token is None:
                    self._login()
        elif self._is_due() and lock.acquire(blocking=False):
            try:
                if self._is_due():
                    self._renew()
            finally:
                lock.release()

    def _is_due(self) -> bool:
        return self._renew_at is not None and time.monotonic() >= self._renew_at

    def is_dead(self) -> bool:
        """Whether the token itself is refused, and not what was asked with it (lookup-self)."""
        try:
            Token(self._adapter).lookup_self()
        except exceptions.Forbidden as error:
            # A token without the default policy may not look itself up; that refusal is worded
            # as a policy's, and the token is good.
            text = " ".join(error.errors or [])
            return "invalid token" in text or "bad token" in text or text == "permission denied"
        except exceptions.VaultError:
            return False
        return False

    def again(self, dead: str | None) -> bool:
        """Replace the token ``dead``; False where nobody but the operator can."""
        if not self.needs_token:
            return False
        with self._turn():
            if self._adapter.token == dead:
                self._login()
            return self._adapter.token != dead

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the lock; a thread that waits for another's login still ends in time."""
        lock = self._lock.here()
        if not lock.acquire(timeout=max(0.0, self._adapter.left())):
            raise ProviderUnavailable("the login of another thread gave no answer in time")
        try:
            yield
        finally:
            lock.release()

    def _login(self) -> None:
        auth = self._auth
        try:
            if isinstance(auth, TokenAuth):
                self._take(auth.token)
            elif isinstance(auth, AgentAuth):
                assert auth.sink is not None  # noqa: S101 - needs_token says so
                self._adapter.token = _read(auth.sink)
                self._renew_at = None  # the agent renews it
            else:
                self._keep(self._ask(auth))
        except exceptions.VaultError as error:
            reason = "; ".join(error.errors or []) or "no reason given"
            raise AccessDenied(
                f"the login by {auth.method} was refused: {reason[:200]}",
                hint=_login_hint(auth),
            ) from error

    def _ask(self, auth: AppRoleAuth | CertAuth | JwtAuth | KubernetesAuth) -> Any:
        adapter = self._adapter
        if isinstance(auth, AppRoleAuth):
            return AppRole(adapter).login(
                _read(auth.role_id),
                _read(auth.secret_id) if auth.secret_id else None,
                use_token=False,
                mount_point=auth.mount,
            )
        if isinstance(auth, JwtAuth):
            return JWT(adapter).jwt_login(
                auth.role, _read(auth.jwt), use_token=False, path=auth.mount
            )
        if isinstance(auth, KubernetesAuth):
            token = _read_service_account(auth.token_file)
            return Kubernetes(adapter).login(
                auth.role, token, use_token=False, mount_point=auth.mount
            )
        # Not hvac's Cert, which wants to read the files itself; the connection has them.
        body = {"name": auth.role} if auth.role else {}
        return adapter.login(f"/v1/auth/{auth.mount}/login", use_token=False, json=body)

    def _take(self, source: SecretSource) -> None:
        self._adapter.token = _read(source)
        self._renew_at = None
        try:
            answer = Token(self._adapter).lookup_self()
        except exceptions.VaultError:
            # A token that may not look itself up is used as it is, and never renewed.
            return
        except ProviderUnavailable:
            self._adapter.token = None
            raise
        data = answer.get("data") if isinstance(answer, dict) else None
        if isinstance(data, dict):
            self._plan(data.get("ttl"), data.get("renewable"))

    def _keep(self, answer: Any) -> None:
        self._adapter.token = self._adapter.get_login_token(answer)
        self._plan(answer["auth"].get("lease_duration"), answer["auth"].get("renewable"))

    def _plan(self, lease: object, renewable: object) -> None:
        self._lease = float(lease) if isinstance(lease, int) else 0.0
        self._renewable = renewable is True
        self._renew_at = time.monotonic() + self._lease * 2 / 3 if self._lease else None

    def _renew(self) -> None:
        before, lease = self._adapter.token, self._lease
        try:
            if self._renewable:
                answer = Token(self._adapter).renew_self()
                auth = answer.get("auth") if isinstance(answer, dict) else None
                if isinstance(auth, dict):
                    self._plan(auth.get("lease_duration"), auth.get("renewable"))
                # A lease that shrinks nears its greatest age: better log in while it still lives.
                if self._lease > lease / 2 or isinstance(self._auth, TokenAuth):
                    return
            if not isinstance(self._auth, TokenAuth):
                self._login()
        except (exceptions.VaultError, AccessDenied, ConfigError, ProviderUnavailable):
            # The old token lives yet; if it dies, the call that it is for says so.
            self._adapter.token = before
        finally:
            if self._renew_at is not None:
                self._renew_at = max(self._renew_at, time.monotonic() + 1)


def _read(source: SecretSource) -> str:
    secret = source.read()
    try:
        text = secret.decode("ascii")
    except UnicodeDecodeError:
        raise ConfigError(f"the secret from {source} is no token or id: it is not ASCII") from None
    finally:
        wipe(secret)
    if not text.isprintable():
        raise ConfigError(f"the secret from {source} is no token or id: it has control characters")
    return text


def _read_service_account(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_TOKEN + 1)
            problem = private_file_problem(os.fstat(file.fileno()))
    except OSError as error:
        raise ConfigError(
            f"cannot read the service account token {path}: {error.strerror}",
            hint="is this a pod with a mounted service account? else name token_file",
        ) from error
    # The kubelet chooses its owner and mode, inside a container; only a writable one is refused.
    if problem and path.stat().st_mode & 0o022:
        raise ConfigError(f"the service account token {path} is refused: others can write it")
    if not text.strip() or len(text) > _MAX_TOKEN or not text.isascii():
        raise ConfigError(f"{path} holds no service account token")
    return text.decode().strip()


def _login_hint(auth: Any) -> str:
    return {
        "token": "look whether the token is right and lives",
        "approle": "look at role_id and secret_id (wrong, used up, expired?) and whether AppRole "
        f"is enabled at auth/{getattr(auth, 'mount', '')}",
        "cert": "look which certificates the server's role trusts, and at client_cert",
        "jwt": "look at the role's bounds (audience, subject, claims) and the JWT's expiry",
        "kubernetes": "look at the role's service account names and namespaces",
        "agent": "look whether the agent is logged in",
    }[str(auth.method)]
