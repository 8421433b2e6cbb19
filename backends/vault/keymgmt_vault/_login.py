"""Logging in: the credentials of each method, read anew each time, and what a refusal means."""

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

_FIRST_LOOK: Final = 1.0  # a short command never looks a token up, which costs one of its uses
# The server counts bad logins, and after five in fifteen minutes locks the role for everybody.
_BACK_OFF: Final = 60.0
_LONGEST_BACK_OFF: Final = 960.0
_FORGOTTEN: Final = 86400.0  # seconds after which a note of credentials that nobody uses is removed

# Gone when the machine starts, as the times are that are kept there.
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
    """A token, how long it lives, and whether it is for us to revoke."""

    token: str = field(repr=False)
    ends: float = float("inf")
    renew_at: float | None = None
    seconds: float = 0.0
    renewable: bool = False
    ours: bool = False

    def plan(self, seconds: object, renewable: object) -> None:
        """Take in what the server says of it."""
        self.seconds = float(seconds) if isinstance(seconds, int) else 0.0
        self.renewable = renewable is True
        now = time.monotonic()
        self.ends = now + self.seconds if self.seconds else float("inf")
        self.renew_at = now + self.seconds * 2 / 3 if self.seconds else None


@dataclass
class _Refused:
    """Until when a login that was refused is not sent again, by any process of this user.

    Attributes:
        note: the file that says so; its name is a digest of place and credentials.
        until: by the clock that no process sets (CLOCK_MONOTONIC).
        times: how often it was refused.
        reason: what the server said.
    """

    note: Path
    until: float = 0.0
    times: int = 0
    reason: str = ""

    @classmethod
    def read(cls, note: Path) -> _Refused:
        """What is known of a login; where nothing can be kept, this process alone knows."""
        try:
            data = read_file(
                note, label="note", limit=4096, access="private", error=ProviderUnavailable
            )
            until, times, reason = _NOTE.validate_json(bytes(data))
        except (ProviderUnavailable, ValueError):
            return _kept_here.get(note.name, cls(note))
        return cls(note, min(until, time.monotonic() + _LONGEST_BACK_OFF), times, reason)

    def again(self, reason: str) -> None:
        """Note that it was refused once more."""
        wait = min(_LONGEST_BACK_OFF, _BACK_OFF * 2 ** min(self.times, 9))
        self.until, self.times, self.reason = time.monotonic() + wait, self.times + 1, reason
        try:
            content = _NOTE.dump_json((self.until, self.times, reason))
            replace_file(self.note, content, mode=0o600)
        except OSError:
            _kept_here[self.note.name] = self
        else:
            _kept_here.pop(self.note.name, None)
            _remove_old_notes()

    def forget(self) -> None:
        """It was not refused."""
        _kept_here.pop(self.note.name, None)
        with contextlib.suppress(OSError):
            self.note.unlink()


_NOTE: Final = TypeAdapter(tuple[float, int, str])
_kept_here: Final[dict[str, _Refused]] = {}
"""What could not be noted, by the name of the note."""


def _note_of(label: str) -> Path:
    boot = b""
    with contextlib.suppress(OSError):
        boot = _BOOT.read_bytes()[:64]
    digest = hashlib.blake2b(label.encode(), key=boot, digest_size=16)
    return _NOTES / f"keymgmt-{os.geteuid()}-{digest.hexdigest()}"


@contextlib.contextmanager
def _alone(note: Path, seconds: float) -> Iterator[None]:
    """Keep other processes and threads of this user from the same login, where files can be locked.

    The lock stays: another user who saw its name and found it removed could take its place.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_file(note.with_name(f"{note.name}.lock"), seconds))
        except TimeoutError as error:
            raise ProviderUnavailable(
                "another process of this user had no answer to the same login in that time",
                hint="look whether the server hangs",
            ) from error
        except OSError:
            pass
        yield


def _remove_old_notes() -> None:
    """Remove the notes of credentials that were replaced long ago, and whatever lock they have."""
    for note in _NOTES.glob(f"keymgmt-{os.geteuid()}-{'[0-9a-f]' * 32}"):
        old = _Refused.read(note)
        if old.times and old.until < time.monotonic() - _FORGOTTEN:
            with contextlib.suppress(OSError), lock_file(Path(f"{note}.lock"), 0, remove=True):
                note.unlink(missing_ok=True)


class Login:
    """How one provider gets its token; one thread at a time."""

    def __init__(self, settings: VaultSettings, connection: Connection) -> None:
        self._settings, self._connection = settings, connection
        # The token that wrapped a secret id, and the secret id.
        self._unwrapped: tuple[str, bytearray] | None = None
        # Credentials that served before are not for a single use.
        self._served = ""

    def get(self) -> Lease:
        """A token: read where somebody else made it, else by a login.

        Raises:
            AccessDenied: the login was refused.
            ProviderUnavailable: no answer to the login, or a secret that is not there.
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
        """Whether a token that was given to us is another one at its source by now."""
        auth = self._settings.auth
        if not isinstance(auth, TokenAuth) or self.asks_a_person:
            return False
        return auth.token.read_text() != lease.token

    @property
    def asks_a_person(self) -> bool:
        """Whether somebody types a secret for it, who is not asked from a thread of ours."""
        sources = vars(self._settings.auth).values()
        return any(isinstance(each, SecretSource) and each.prompt is not None for each in sources)

    def close(self) -> None:
        """Wipe the secret id that was unwrapped."""
        if self._unwrapped:
            wipe(self._unwrapped[1])
            self._unwrapped = None

    def _read(self, source: SecretSource) -> str:
        """A secret; how long a person takes to type it is not the server's fault."""
        with self._connection.deadline.paused():
            return source.read_text()

    def _wait_for_sink(self, auth: AgentAuth) -> str:
        assert auth.sink is not None  # noqa: S101 - needs_token says so
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
        place = (self._settings.address, self._settings.namespace, auth.mount, credentials)
        note = _note_of(repr(place))
        if not isinstance(auth, AppRoleAuth):
            return self._send_once(auth, credentials, _Refused(note))
        # Workers that start together learn from the first that it was refused.
        with _alone(note, self._connection.deadline.remaining):
            return self._send_once(auth, credentials, _Refused.read(note))

    def _send_once(
        self, auth: _MachineAuth, credentials: tuple[str | None, ...], refused: _Refused
    ) -> Any:
        left = refused.until - time.monotonic()
        if left > 0:
            raise AccessDenied(
                f"the login by {auth.method} was refused: {refused.reason}; the same is not sent "
                f"again for {left:.0f} s",
                hint=f"{LOGIN_HINTS[auth.method]}; five bad logins lock a role for everybody; "
                f"if the server was mended: rm {refused.note}",
            )
        served = refused.note.name
        once = isinstance(auth, AppRoleAuth) and bool(auth.secret_id) and served != self._served
        self._connection.login_as = "single-use login" if once else "login"
        try:
            answer = self._login_by(auth, credentials)
        except Refusal as refusal:
            reason = refusal.words[:200] or "no reason given"
            if isinstance(auth, AppRoleAuth):
                refused.again(reason)
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
                hint="a machine has none: exempt its role from the MFA enforcement",
            )
        return answer

    def _login_hint(self, auth: _MachineAuth, no: Refusal, sent: str) -> str:
        hint = LOGIN_HINTS[auth.method]
        if isinstance(auth, AppRoleAuth) and sent.startswith(("hvs.", "s.", "hvb.")):
            hint = "secret_id is a token: if it wraps one, write { wrapped = { file = ... } }"
        if no.status == 403:
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
            # The token serves once, so what it held is kept for the next login.
            try:
                answer = self._connection.request(
                    "post", "/v1/sys/wrapping/unwrap", operation="change", token=token
                )
            except Refusal as refusal:
                raise AccessDenied(
                    f"the token from {source.wrapped} unwraps no secret id",
                    hint="it serves once and for a while: give this machine a new one; if it was "
                    "not this machine that used it, somebody else has the secret id",
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
        # Not hvac's Cert, which wants to read the files itself; the connection has them.
        body = {"name": auth.role} if auth.role else {}
        return connection.login(f"/v1/auth/{auth.mount}/login", json=body)


def text_of(data: Mapping[str, Any], name: str) -> str:
    """A member of an answer that is ASCII text; ProviderUnavailable if it is not there."""
    value = data.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise ProviderUnavailable(f"the server's answer has no {name}")
    return value
