"""The connection of one provider: a client that is logged in, and what a call does with failures.

A whole operation, with its login, retries and waiting for another thread's login, runs within
``timeout`` in a thread that is left behind where botocore does not come back. A session that AWS
calls expired is replaced once. What may pass is asked again, more slowly each time; what changes
something is not, unless it was certainly not carried out.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from keymgmt.backend import Deadline, ForkSafe, KeymgmtError, ProviderUnavailable
from keymgmt_aws._errors import EXPIRED, Verb, failure_of
from keymgmt_aws._login import log_in
from keymgmt_aws._transport import Client, is_ours, prepare

if TYPE_CHECKING:
    from keymgmt_aws._settings import AwsSettings

__all__ = ["Connection", "Service", "member"]

R = TypeVar("R")
_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0


class Connection(ForkSafe):
    """AWS KMS as one provider reaches it; thread-safe and fork-safe."""

    def __init__(self, settings: AwsSettings) -> None:
        self.settings = settings
        super().__init__()

    def _renew(self) -> None:
        # The sockets of a parent are the parent's too, and so is who refreshes its credentials.
        self._lock = threading.Lock()
        self._clients: dict[str, Client] = {}

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

    def client(self, service: str) -> Client:
        """The client of ``kms`` or ``sts``, logged in on first use."""
        if (client := self._clients.get(service)) is None:
            with self._lock:
                clients = self._clients
                if (client := clients.get(service)) is None:
                    other = next(iter(clients.values()), None)
                    known = other and other.credentials
                    login = known or log_in(self.settings.auth, self.settings)
                    client = clients[service] = Client(service, self.settings, login)
        return client

    def forget(self, client: Client | None = None) -> None:
        """Log in anew at the next call; with ``client`` only if it is still one in use."""
        with self._lock:
            old = list(self._clients.values())
            if client in (None, *old):
                self._clients = {}
                for each in old:
                    each.close()


class Service:
    """AWS KMS for one operation, within its time limit."""

    def __init__(self, connection: Connection, deadline: Deadline) -> None:
        self._connection, self._deadline = connection, deadline

    def __call__(self, verb: Verb, place: str, operation: str, **arguments: Any) -> dict[str, Any]:
        """Call an operation of AWS KMS.

        Args:
            verb: what it does, by which ``_errors`` tells answers apart.
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
                client = self._connection.client("sts" if verb == "identify" else "kms")
                return client(operation, **arguments)
            except KeymgmtError:
                # Of a login, which botocore hands through.
                raise
            except Exception as error:  # noqa: BLE001 - translated, and raised below
                failure, fault, again = failure_of(error, verb, place)
            if fault is EXPIRED and client is not None and not replaced:
                replaced = True
                self._connection.forget(client)
                continue
            if not again or self._deadline.remaining <= pause:
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
