"""The connection of one provider: a client that is logged in, and what a call does with failures.

A whole operation, with its login, retries and waiting for another thread's login, runs within
``timeout`` in a thread that is left behind where botocore does not come back. A session that AWS
calls expired is replaced once. What may pass is asked again, more slowly each time; what changes
something is not, unless it was certainly not carried out.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from keymgmt.backend import Deadline, ForkSafe, KeymgmtError, ProviderUnavailable
from keymgmt_aws._errors import (
    CHANGES,
    EXPIRED,
    FAULTS,
    NOT_CARRIED_OUT,
    UNSPEAKABLE,
    Verb,
    code_of,
    error_of,
)
from keymgmt_aws._login import log_in
from keymgmt_aws._transport import Client, is_ours, prepare

if TYPE_CHECKING:
    from keymgmt_aws._settings import AwsSettings

__all__ = ["Connection", "Service", "member"]

R = TypeVar("R")
_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_LOGINS: Final = ("AssumeRole", "AssumeRoleWithWebIdentity")


class Connection(ForkSafe):
    """AWS KMS as one provider reaches it; thread-safe and fork-safe."""

    def __init__(self, settings: AwsSettings) -> None:
        self.settings = settings
        super().__init__()

    def _renew(self) -> None:
        # The sockets of a parent are the parent's too, and so is who refreshes its credentials.
        self._lock = threading.Lock()
        self._client: Client | None = None

    def run(self, work: Callable[[Service], R], seconds: float = 0.0) -> R:
        """Run ``work`` with the service, within the settings' time limit, or longer ``seconds``."""
        prepare()
        deadline = Deadline(max(seconds, self.settings.timeout), "AWS KMS")
        try:
            return deadline.run(lambda: self._run(work, deadline))
        finally:
            if not deadline.remaining:
                # The thread that was left behind may hold the lock, and uses what it uses.
                self._renew()

    def _run(self, work: Callable[[Service], R], deadline: Deadline) -> R:
        is_ours.active = True
        try:
            return work(Service(self, deadline))
        finally:
            is_ours.active = False

    def client(self) -> Client:
        """The client of AWS KMS, logged in on first use."""
        client = self._client
        if client is None:
            with self._lock:
                if self._client is None:
                    credentials = log_in(self.settings.auth, self.settings)
                    self._client = Client("kms", self.settings, credentials)
                client = self._client
        return client

    def sts(self) -> Client:
        """A client of AWS STS with the same login, for the caller to close."""
        return Client("sts", self.settings, self.client().credentials)

    def forget(self, client: Client | None = None) -> None:
        """Log in anew at the next call; with ``client`` only if it is still the one in use."""
        with self._lock:
            old = self._client
            if old is None or client not in (None, old):
                return
            self._client = None
        old.close()


class Service:
    """AWS KMS for one operation, within its time limit."""

    def __init__(self, connection: Connection, deadline: Deadline) -> None:
        self._connection, self._deadline = connection, deadline

    def __call__(self, verb: Verb, place: str, operation: str, **arguments: Any) -> dict[str, Any]:
        """Call an operation of AWS KMS.

        Args:
            verb: what it does, as ``_errors.FAULTS`` tells answers apart.
            place: the key or alias, or what else it is done with, for messages.
            operation: its name in botocore.
            arguments: as the API reference of AWS KMS has them.

        Raises:
            ConfigError: what should be made is there.
            ProviderError: any other refusal or failure.
        """
        pause, replaced = _PAUSE, False
        while True:
            client = None
            try:
                client = self._connection.client()
                if verb == "identify":
                    with contextlib.closing(self._connection.sts()) as sts:
                        return sts(operation)
                return client(operation, **arguments)
            except KeymgmtError:
                # Of a login, which botocore hands through.
                raise
            except Exception as error:  # noqa: BLE001 - translated, and raised below
                login = getattr(error, "operation_name", "") in _LOGINS
                doing: Verb = "login" if login else verb
                code, words = code_of(error)
                fault = FAULTS.find(code, doing)
                if fault is EXPIRED and client is not None and not replaced:
                    replaced = True
                    self._connection.forget(client)
                    continue
                passing = fault.passing and (doing not in CHANGES or fault in NOT_CARRIED_OUT)
                failure = error_of(code, words, f"cannot {doing} with {place}", doing)
                if type(error).__name__ not in UNSPEAKABLE:
                    failure.__cause__ = error
            if not passing or self._deadline.remaining <= pause:
                raise failure
            # Jitter, so that a fleet that was throttled does not come back as one.
            time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311
            pause = min(_LONGEST_PAUSE, pause * 2)

    def identify(self) -> str:
        """The ARN of who we are (STS GetCallerIdentity, which needs no permission)."""
        return member(self("identify", "this login", "get_caller_identity"), "Arn", str)


def member(answer: dict[str, Any], name: str, kind: type[R]) -> R:
    """A member of an answer; ProviderUnavailable if it is not there or of another kind."""
    value = answer.get(name)
    if not isinstance(value, kind) or not value:
        raise ProviderUnavailable(
            f"the answer of AWS has no {name}", hint="look whether the endpoint is one of AWS"
        )
    return value
