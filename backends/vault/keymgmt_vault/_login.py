"""Logging in with the credentials of each method, which are read again for each login."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hvac.api.auth_methods import JWT, AppRole, Kubernetes
from pydantic import TypeAdapter

from keymgmt.backend import (
    AccessDenied,
    ProviderUnavailable,
    SecretSource,
    lock_file,
    read_file,
    read_projected,
    replace_file,
    wipe,
)
from keymgmt_vault._errors import Refusal
from keymgmt_vault._settings import (
    AgentAuth,
    AppRoleAuth,
    CertAuth,
    JwtAuth,
    KubernetesAuth,
    TokenAuth,
)

if TYPE_CHECKING:
    from keymgmt_vault._connection import Connection
    from keymgmt_vault._settings import VaultSettings

__all__ = ["LOGIN_HINTS", "Lease", "Login", "text_of"]

_MachineAuth = AppRoleAuth | CertAuth | JwtAuth | KubernetesAuth

# Seconds until a given token is looked up. A look-up costs a token with ``num_uses`` one of its
# uses, so a short command does without.
_FIRST_LOOK: Final = 1.0
# Seconds until refused credentials are sent again, doubled with each refusal. Vault locks a role
# for everybody after five bad logins in fifteen minutes (its user lockout).
_BACK_OFF: Final = 60.0
_LONGEST_BACK_OFF: Final = 960.0
_FORGOTTEN: Final = 86400.0  # seconds after which the note of unused credentials is removed

# Notes hold times of CLOCK_MONOTONIC, which a boot resets; a boot also empties /dev/shm.
_NOTES: Final = Path("/dev/shm")  # noqa: S108 - files of this user alone, read as secrets are
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
LOGIN_HINTS: Final = {
    "approle": "look at role_id and secret_id (wrong, used up, expired?)",
    "cert": "look which certificates the server's role trusts, and at client_cert",
    "jwt": "look at the role's bounds (audience, subject, claims) and the JWT's expiry",
    "kubernetes": "look at the role's service account names and namespaces",
    "agent": "look whether the agent is logged in",
}


@dataclass
class Lease:
    """A token, how long it lives, and whether this process is to revoke it (``ours``)."""

    token: str = field(repr=False)
    ends: float = float("inf")
    renew_at: float | None = None
    seconds: float = 0.0
    renewable: bool = False
    ours: bool = False

    def plan(self, seconds: object, renewable: object) -> None:
        """Set the times from the server's answer: seconds to live, and whether it is renewable."""
        self.seconds = float(seconds) if isinstance(seconds, int) else 0.0
        self.renewable = renewable is True
        now = time.monotonic()
        self.ends = now + self.seconds if self.seconds else float("inf")
        self.renew_at = now + self.seconds * 2 / 3 if self.seconds else None


@dataclass
class _RefusedLogin:
    """A login that was refused, and until when no process of this user sends it again.

    Attributes:
        note: the file that holds this; its name is a digest of the server and the credentials.
        until: in seconds of CLOCK_MONOTONIC, which no process can set.
        times: how often the login was refused.
        reason: the server's reason.
    """

    note: Path
    until: float = 0.0
    times: int = 0
    reason: str = ""

    @classmethod
    def read(cls, note: Path) -> _RefusedLogin:
        """Read a note; from memory where this process could not write it."""
        try:
            data = read_file(
                note, label="note", limit=4096, access="private", error=ProviderUnavailable
            )
            until, times, reason = _NOTE.validate_json(bytes(data))
        except (ProviderUnavailable, ValueError):
            return _unwritten.get(note.name, cls(note))
        return cls(note, min(until, time.monotonic() + _LONGEST_BACK_OFF), times, reason)

    def add(self, reason: str) -> None:
        """Note another refusal."""
        wait = min(_LONGEST_BACK_OFF, _BACK_OFF * 2 ** min(self.times, 9))
        self.until, self.times, self.reason = time.monotonic() + wait, self.times + 1, reason
        try:
            content = _NOTE.dump_json((self.until, self.times, reason))
            replace_file(self.note, content, mode=0o600)
        except OSError:
            _unwritten[self.note.name] = self
        else:
            _unwritten.pop(self.note.name, None)
            _remove_old_notes()

    def forget(self) -> None:
        """Remove the note after a successful login."""
        _unwritten.pop(self.note.name, None)
        with contextlib.suppress(OSError):
            self.note.unlink()


_NOTE: Final = TypeAdapter(tuple[float, int, str])
_unwritten: Final[dict[str, _RefusedLogin]] = {}
"""Refused logins whose note could not be written, by the name of the note."""


def _note_of(label: str) -> Path:
    boot = b""
    with contextlib.suppress(OSError):
        boot = _BOOT.read_bytes()[:64]
    digest = hashlib.blake2b(label.encode(), key=boot, digest_size=16)
    return _NOTES / f"keymgmt-{os.geteuid()}-{digest.hexdigest()}"


@contextlib.contextmanager
def _one_at_a_time(note: Path, seconds: float) -> Iterator[None]:
    """Keep other processes and threads of this user from the same login, where files can be locked.

    The lock file stays: if it were removed, another user who knows its name could create it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_file(note.with_name(f"{note.name}.lock"), seconds))
        except TimeoutError as error:
            raise ProviderUnavailable(
                "another process of this user sent the same login and had no answer in time",
                hint="look whether the server hangs",
            ) from error
        except OSError:
            pass
        yield


def _remove_old_notes() -> None:
    """Remove the notes of credentials that were replaced long ago, and their locks."""
    for note in _NOTES.glob(f"keymgmt-{os.geteuid()}-{'[0-9a-f]' * 32}"):
        old = _RefusedLogin.read(note)
        if old.times and old.until < time.monotonic() - _FORGOTTEN:
            with contextlib.suppress(OSError), lock_file(Path(f"{note}.lock"), 0, remove=True):
                note.unlink(missing_ok=True)


class Login:
    """Gets the token of one provider; for one thread at a time."""

    def __init__(self, settings: VaultSettings, connection: Connection) -> None:
        self._settings, self._connection = settings, connection
        # A wrapping token, and the secret id that it held.
        self._unwrapped: tuple[str, bytearray] | None = None
        # The note of the last successful credentials: these are not for a single use.
        self._served = ""

    def get(self) -> Lease:
        """A token: read from its source where the method gives one, else by a login.

        Raises:
            AccessDenied: the login was refused.
            ProviderUnavailable: there was no answer to the login, or a secret cannot be read.
        """
        auth = self._settings.auth
        if isinstance(auth, TokenAuth):
            lease = Lease(self._read(auth.token))
            if auth.renew:
                lease.renew_at = time.monotonic() + _FIRST_LOOK
            return lease
        if isinstance(auth, AgentAuth):
            return Lease(self._wait_for_sink(auth))
        answer = self._send_login(auth)
        lease = Lease(self._connection.get_login_token(answer))
        lease.plan(answer["auth"].get("lease_duration"), answer["auth"].get("renewable"))
        lease.ours = answer["auth"].get("token_type") != "batch"
        return lease

    def is_replaced(self, lease: Lease) -> bool:
        """Whether the source of a given token holds another token by now."""
        auth = self._settings.auth
        if not isinstance(auth, TokenAuth) or self.asks_a_person:
            return False
        return auth.token.read_text() != lease.token

    @property
    def asks_a_person(self) -> bool:
        """Whether a person types a secret for the login; no background thread may ask for it."""
        sources = vars(self._settings.auth).values()
        return any(isinstance(each, SecretSource) and each.prompt is not None for each in sources)

    def close(self) -> None:
        """Wipe the unwrapped secret id."""
        if self._unwrapped:
            wipe(self._unwrapped[1])
            self._unwrapped = None

    def _read(self, source: SecretSource) -> str:
        """A secret; the time in which a person types it does not count."""
        with self._connection.deadline.paused():
            return source.read_text()

    def _wait_for_sink(self, auth: AgentAuth) -> str:
        assert auth.sink is not None  # noqa: S101 - see Session.needs_token
        while True:
            try:
                return auth.sink.read_text()
            except ProviderUnavailable as error:
                if self._connection.deadline.remaining < 1:
                    raise ProviderUnavailable(
                        f"the agent has not logged in yet: {error}", hint=LOGIN_HINTS["agent"]
                    ) from error
            time.sleep(0.25)

    def _send_login(self, auth: _MachineAuth) -> Any:
        credentials = self._credentials(auth)
        login = (self._settings.address, self._settings.namespace, auth.mount, credentials)
        note = _note_of(repr(login))
        if not isinstance(auth, AppRoleAuth):
            return self._send_once(auth, credentials, _RefusedLogin(note))
        # Of workers that start together, the first logs in; the others read its note of a refusal.
        with _one_at_a_time(note, self._connection.deadline.remaining):
            return self._send_once(auth, credentials, _RefusedLogin.read(note))

    def _send_once(
        self, auth: _MachineAuth, credentials: tuple[str | None, ...], refused: _RefusedLogin
    ) -> Any:
        left = refused.until - time.monotonic()
        if left > 0:
            raise AccessDenied(
                f"the login by {auth.method} was refused: {refused.reason}; the same is not sent "
                f"again for {left:.0f} s",
                hint=f"{LOGIN_HINTS[auth.method]}; five bad logins lock a role for everybody; "
                f"if the fault was at the server and is gone: rm {refused.note}",
            )
        served = refused.note.name
        once = isinstance(auth, AppRoleAuth) and bool(auth.secret_id) and served != self._served
        self._connection.login_as = "single-use login" if once else "login"
        try:
            answer = self._login_by(auth, credentials)
        except Refusal as refusal:
            reason = refusal.words[:200] or "no reason given"
            if isinstance(auth, AppRoleAuth):
                refused.add(reason)
            raise AccessDenied(
                f"the login by {auth.method} was refused: {reason}",
                hint=self._login_hint(auth, refusal, credentials[-1] or ""),
            ) from refusal
        if refused.times:
            refused.forget()
        self._served = served
        if isinstance(answer, dict) and (answer.get("auth") or {}).get("mfa_requirement"):
            raise AccessDenied(
                f"the login by {auth.method} asks for a second factor",
                hint="a machine has no second factor: exempt its role from the MFA enforcement",
            )
        return answer

    def _login_hint(self, auth: _MachineAuth, refusal: Refusal, secret: str) -> str:
        hint = LOGIN_HINTS[auth.method]
        if isinstance(auth, AppRoleAuth) and secret.startswith(("hvs.", "s.", "hvb.")):
            hint = "secret_id is a token: if it wraps one, write { wrapped = { file = ... } }"
        if refusal.status == 403:
            hint += (
                f"; look whether the method is enabled at auth/{auth.mount}, and whether "
                "bad logins locked the role (a lockout ends after fifteen minutes)"
            )
        return hint

    def _credentials(self, auth: _MachineAuth) -> tuple[str | None, ...]:
        if isinstance(auth, AppRoleAuth):
            return self._read(auth.role_id), self._secret_id(auth)
        if isinstance(auth, JwtAuth):
            file = auth.jwt.file
            return auth.role, read_projected(file, "JWT") if file else self._read(auth.jwt)
        if isinstance(auth, KubernetesAuth):
            return auth.role, read_projected(auth.token_file, "service account token")
        return (auth.role,)

    def _secret_id(self, auth: AppRoleAuth) -> str | None:
        source = auth.secret_id
        if source is None:
            return None
        token = self._read(source.wrapped or source)
        if source.wrapped is None:
            return token
        if self._unwrapped is None or self._unwrapped[0] != token:
            # The token can be used only once, so its secret id is kept for the next login.
            try:
                answer = self._connection.request(
                    "post", "/v1/sys/wrapping/unwrap", operation="change", token=token
                )
            except Refusal as refusal:
                raise AccessDenied(
                    f"the token from {source.wrapped} unwraps no secret id",
                    hint="such a token can be used once, and for a limited time: give this machine "
                    "a new one; if another machine used it, somebody else has the secret id",
                ) from refusal
            data = answer.get("data") if isinstance(answer, dict) else None
            self._unwrapped = token, bytearray(text_of(data or {}, "secret_id").encode())
        return self._unwrapped[1].decode()

    def _login_by(self, auth: _MachineAuth, credentials: tuple[str | None, ...]) -> Any:
        connection = self._connection
        if isinstance(auth, AppRoleAuth):
            return AppRole(connection).login(*credentials, mount_point=auth.mount)
        if isinstance(auth, JwtAuth):
            return JWT(connection).jwt_login(*credentials, path=auth.mount)
        if isinstance(auth, KubernetesAuth):
            return Kubernetes(connection).login(*credentials, mount_point=auth.mount)
        # hvac's Cert is not used, since it reads the certificate files itself.
        body = {"name": auth.role} if auth.role else {}
        return connection.login(f"/v1/auth/{auth.mount}/login", json=body)


def text_of(data: Mapping[str, Any], name: str) -> str:
    """A member of an answer that is ASCII text; ProviderUnavailable if it is missing."""
    value = data.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise ProviderUnavailable(f"the server's answer has no {name}")
    return value
