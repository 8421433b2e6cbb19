"""The connection of one provider: a client that is logged in, and the handling of failures.

A whole operation, with its login, retries and waiting for another thread's login, runs within
``timeout`` in a thread that is abandoned if botocore does not return. An expired session is
replaced once. After a passing failure the request is repeated, with a longer pause each time; a
request that changes something is repeated only if it was certainly not carried out.
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
    """The connection of one provider to AWS KMS; thread-safe and fork-safe."""

    def __init__(self, settings: AwsSettings) -> None:
        self.settings = settings
        super().__init__()

    def _renew(self) -> None:
        # A child shares sockets with its parent, and a lock may be held by a thread of the parent
        # that refreshes credentials.
        self._lock = threading.Lock()
        self._clients: dict[str, Client] = {}

    def run(self, work: Callable[[Service], R], seconds: float = 0.0) -> R:
        """Run ``work`` with the service, within ``timeout``, or ``seconds`` if that is longer."""
        prepare()
        deadline = Deadline(max(seconds, self.settings.timeout), "AWS KMS")
        try:
            return deadline.run(lambda: self._run(work, deadline))
        finally:
            if not deadline.remaining:
                # The abandoned thread may hold the lock and goes on using its clients.
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
        """Log in again at the next call; with ``client`` only if it is still in use."""
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

    def __call__(
        self, verb: Verb, subject: str, operation: str, **arguments: Any
    ) -> dict[str, Any]:
        """Call an operation of AWS KMS.

        Args:
            verb: what it does, by which ``_errors`` tells answers apart.
            subject: the key or alias that it concerns, or "this login", for messages.
            operation: its name in botocore.
            arguments: its arguments, named as in the API reference of AWS KMS.

        Raises:
            ConfigError: the key or alias to be created exists.
            ProviderError: any other refusal or failure.
        """
        pause, replaced = _PAUSE, False
        while True:
            client = None
            try:
                client = self._connection.client("sts" if verb == "identify" else "kms")
                return client(operation, **arguments)
            except KeymgmtError:
                # An error of the login, which botocore passes on.
                raise
            except Exception as error:  # noqa: BLE001 - translated, and raised below
                failure, fault, again = failure_of(error, verb, subject)
            if fault is EXPIRED and client is not None and not replaced:
                replaced = True
                self._connection.forget(client)
                continue
            if not again or self._deadline.remaining <= pause:
                raise failure
            # Jitter, so that the machines of a throttled fleet do not all repeat at the same time.
            time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311
            pause = min(_LONGEST_PAUSE, pause * 2)

    def identify(self) -> str:
        """The ARN of this login (STS GetCallerIdentity, which needs no permission)."""
        return member(self("identify", "this login", "get_caller_identity"), "Arn", str)


def member(answer: dict[str, Any], name: str, kind: type[R]) -> R:
    """A member of an answer; ProviderUnavailable if it is missing or of another type."""
    value = answer.get(name)
    if not isinstance(value, kind) or not value:
        raise ProviderUnavailable(
            f"the answer of AWS has no {name}", hint="look whether the endpoint is one of AWS"
        )
    return value
