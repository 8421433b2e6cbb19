"""The nodes of one Vault as one service: an hvac adapter that knows several addresses.

Strategy: ask the node that answered last. If it is dead, sealed or stalled, ask the next one at
once; if all are and waiting may help, wait (doubling, with jitter, or as the server asks) and go
round again until the time is over. The time is divided so that every node gets its turn. What a
node answers about a key or a right is final only if the node is the leader: a standby may not have
heard yet, and then the leader is asked. A request that changes something is repeated only where it
was certainly not carried out.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import random
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hvac.adapters import Adapter

from keymgmt.backend import Deadline, ForkSafe, ProviderUnavailable
from keymgmt_vault._errors import NODE_FAULTS, NodeFailure, Operation, Refusal
from keymgmt_vault._nodes import Nodes
from keymgmt_vault._settings import Address
from keymgmt_vault._transport import Answer, Node, Tls

if TYPE_CHECKING:
    from keymgmt_vault._settings import VaultSettings

__all__ = ["Connection"]

_BATCH_RESULTS: Final = b'"batch_results":['
_STALE: Final = (b"encryption key not found", b"version is too new", b"signing key not found")
_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
_MAX_INDEX: Final = 1024
# Seconds for what changes something and is asked once: making an RSA key takes some.
_SLOW: Final = 30.0
_LEADS_FOR: Final = 5.0  # seconds for which a node that led is taken for the leader
_to_json: Final = jsonlib.JSONEncoder(separators=(",", ":")).encode
_CREDENTIALS: Final = {"jwt", "plaintext", "role_id", "secret_id", "token"}


@dataclass
class _Request:
    """One request, as it goes to any node."""

    method: str
    path: str
    body: bytes | None = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    operation: Operation = "ask"
    fresh: bool = False
    json: Any = field(default=None, repr=False)

    @property
    def secrets(self) -> Iterator[str]:
        """What must not come back in the words of an answer."""
        if token := self.headers.get("X-Vault-Token"):
            yield token
        yield from _secrets(self.json)

    @property
    def login(self) -> bool:
        return self.operation in ("login", "single-use login")


class _Thread(threading.local):
    deadline: Deadline | None = None


_BOUNDED: Final = contextlib.nullcontext()


class Connection(Adapter, ForkSafe):  # type: ignore[misc]
    """What hvac's API classes send through: ``request`` returns the answer's JSON.

    Thread-safe and fork-safe. ``token`` goes with every request that is not a login; ``login_as``
    says whether the credentials of the next login may serve once.
    """

    def __init__(self, settings: VaultSettings) -> None:
        # hvac's own __init__ would make a requests session, which is not used here.
        self._settings = settings
        self._tls = Tls(settings)
        self._index: str | None = None
        self.login_as: Operation = "login"
        self.token: str | None = None
        self.namespace = settings.namespace
        ForkSafe.__init__(self)

    def _renew(self) -> None:
        # The sockets of a parent are the parent's too.
        self.nodes = Nodes(self._settings, self._tls)
        self._leads: dict[Node, float] = {}
        self._thread = _Thread()

    @property
    def deadline(self) -> Deadline:
        """When the operation of this thread ends."""
        assert self._thread.deadline is not None  # noqa: S101 - every request is in an operation
        return self._thread.deadline

    def operation(self, seconds: float | None = None) -> contextlib.AbstractContextManager[None]:
        """Bound all requests of this thread inside by ``seconds`` together; the outermost wins."""
        return _BOUNDED if self._thread.deadline else self._bound(seconds or self._settings.timeout)

    @contextlib.contextmanager
    def _bound(self, seconds: float) -> Iterator[None]:
        self._thread.deadline = Deadline(seconds, "the Vault server")
        try:
            yield
        finally:
            self._thread.deadline = None

    def get_login_token(self, response: Any) -> str:
        """The token of a login's answer; ProviderUnavailable if it has none."""
        auth = response.get("auth") if isinstance(response, dict) else None
        token = auth.get("client_token") if isinstance(auth, dict) else None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise ProviderUnavailable("the server's answer to the login has no token")
        return token

    def close(self) -> None:
        """Close the idle connections and forget the token; it may be used again."""
        self.token = None
        self.nodes.close()

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        raise_exception: bool = True,  # noqa: ARG002 - hvac's
        *,
        json: Any = None,
        operation: Operation = "ask",
        fresh: bool = False,
        token: str | None = None,
        **_: Any,
    ) -> Any:
        """Send one request to the cluster and return its JSON, or None if there is none.

        Args:
            method: HTTP method; hvac's ``list`` is Vault's LIST.
            url: path from ``/v1/`` on, made of checked parts.
            headers: more headers.
            raise_exception: always, here.
            json: body.
            operation: what repeating would do; a login carries no token.
            fresh: the leader's answer and no standby's.
            token: in place of the one that is held.
            _: nothing else of hvac's reaches a connection.

        Raises:
            ProviderUnavailable: no answer in time.
            Refusal: the service refused.
        """
        sent = {"X-Vault-Request": "true", "User-Agent": "keymgmt", **(headers or {})}
        token = None if operation.endswith("login") else token or self.token
        if token:
            sent["X-Vault-Token"] = token
        if self.namespace:
            sent["X-Vault-Namespace"] = self.namespace
        if self._index:
            # A standby that has not caught up with what we wrote passes this on to the leader.
            sent["X-Vault-Index"] = self._index
            sent["X-Vault-Inconsistent"] = "forward-active-node"
        body = None
        if json is not None:
            body = _to_json(json).encode()
            sent["Content-Type"] = "application/json"
        request = _Request(method.upper(), url, body, sent, operation, fresh, json)
        with self.operation():
            return _decode(request, self._send(request))

    def login(self, url: str, use_token: bool = True, **kwargs: Any) -> Any:  # noqa: ARG002
        """Send a login, without the token that is held; hvac's ``use_token`` has no meaning."""
        return self.request("post", url, operation=self.login_as, **kwargs)

    def ask_node(self, node: Node, path: str) -> tuple[int, Any]:
        """GET a public path of one node, in the root namespace: its status and JSON.

        Raises:
            NodeFailure: it gave no answer.
        """
        with self.operation():
            seconds = self.deadline.share(1, most=self._settings.call_timeout)
            headers = {"X-Vault-Request": "true", "User-Agent": "keymgmt"}
            answer = node.call("GET", path, None, headers, seconds)
        try:
            return answer.status, jsonlib.loads(answer.data)
        except (ValueError, RecursionError):
            return answer.status, None

    def _send(self, request: _Request) -> Answer:
        # Of each node the failure of its longest try: the last millisecond's says nothing.
        worst: dict[str, NodeFailure] = {}
        pause, deadline = _PAUSE, self.deadline
        while True:
            answer, failures = self._round(request, worst)
            if answer is not None:
                return answer
            asked = min((each.after for each in failures if each.after), default=0.0)
            wait = max(asked, pause * (1 + random.random()))  # noqa: S311 - jitter
            passing = any(each.fault.passing for each in failures)
            if not passing or asked > deadline.remaining or deadline.remaining < _PAUSE / 2:
                raise _unavailable(worst, asked)
            time.sleep(min(wait, deadline.remaining if asked else deadline.remaining / 2))
            pause = min(_LONGEST_PAUSE, pause * 2)

    def _round(
        self, request: _Request, worst: dict[str, NodeFailure]
    ) -> tuple[Answer | None, list[NodeFailure]]:
        nodes, failures = self.nodes, list[NodeFailure]()
        waiting, seen = nodes.candidates(), set[Node | Address]()
        fair = min(self._settings.call_timeout, self.deadline.seconds / len(waiting))
        # Once a node has failed, its reason says more than that the time is over.
        while waiting and (self.deadline.remaining or not worst):
            each = waiting.pop(0)
            if each in seen:
                continue
            seen.add(each)
            seconds = self.deadline.share(len(waiting) + 1, most=self._settings.call_timeout)
            begun = time.monotonic()
            try:
                if isinstance(each, Address):
                    waiting[:0] = nodes.look_up(each, seconds)
                    continue
                answer = self._try(request, each, seconds)
            except NodeFailure as failure:
                failure.seconds = time.monotonic() - begun
                failures.append(failure)
                hasty = failure.kind == "stalled" and seconds < fair * 0.9
                known = worst.get(str(each))
                if known is None or (not hasty and failure.seconds >= known.seconds):
                    worst[str(each)] = failure
                nodes.failed(each, failure, rest=failure.kind != "limited" and not hasty)
            else:
                nodes.current = each
                return self._settle(request, each, answer), failures
        return None, failures

    def _try(self, request: _Request, node: Node, seconds: float) -> Answer:
        """One node's answer, if it is one of Vault's; ``seconds`` is not for all of a slow one."""
        limits = {
            "ask": None,
            "change": _SLOW,
            # It may have to wait for an election, and each one that is sent leaves a token.
            "login": max(seconds, self.deadline.remaining / 2),
            "single-use login": self.deadline.remaining,
        }
        limit = limits[request.operation]
        try:
            answer = node.call(
                request.method,
                request.path,
                request.body,
                request.headers,
                seconds,
                answer=limit,
                fresh=limit is not None,
            )
            _judge(answer, request.secrets)
        except NodeFailure as failure:
            fault = NODE_FAULTS.find("lost", request.operation)
            # What a node says of its own failure to log us in is an answer.
            answered = request.login and failure.kind == "status"
            if failure.sent and not answered and fault is not _UNKNOWN:
                raise fault.error(
                    f"{node} did not answer ({failure}); {fault.message}", hint=fault.hint
                ) from failure
            raise
        self.nodes.answered(node)
        if request.operation == "change" and 200 <= answer.status < 300:
            index = answer.headers.get("X-Vault-Index")
            if index and len(index) <= _MAX_INDEX and index.isascii() and index.isprintable():
                self._index = index
        return answer

    def _settle(self, request: _Request, node: Node, answer: Answer) -> Answer:
        """Ask the leader where ``node`` may only not have heard yet of a key, version or right."""
        if not _may_be_stale(request, answer):
            return answer
        leader = None
        with contextlib.suppress(NodeFailure):
            leader = self._leader(node, known=not request.fresh)
        if leader is node:
            return answer
        if request.login:
            return self._settle_login(request, node, answer, leader)
        seconds = self.deadline.share(1, most=self._settings.call_timeout)
        if leader is not None:
            with contextlib.suppress(NodeFailure):
                answer = self._try(request, leader, seconds)
                if _may_be_stale(request, answer):
                    # What else is refused is refused here, and asked once.
                    self.nodes.current = leader
            return answer
        if answer.status == 403:
            return answer
        # The leader is not one of ours by name: behind a load balancer, say. Standbys were seen to
        # lag by up to 100 ms.
        for pause in (0.05, 0.1, 0.2, 0.4):
            time.sleep(min(pause, self.deadline.remaining))
            for other in self.nodes.candidates():
                if isinstance(other, Node) and self.deadline.remaining:
                    seconds = self.deadline.share(1, most=self._settings.call_timeout)
                    with contextlib.suppress(NodeFailure):
                        answer = self._try(request, other, seconds)
                        if not _may_be_stale(request, answer):
                            return answer
        return answer

    def _settle_login(
        self, request: _Request, node: Node, answer: Answer, leader: Node | None
    ) -> Answer:
        """What the leader says of a login that a standby refused, which may lag behind it.

        A refusal is final, and noted for a while, so it must be the leader's: while there is none,
        a standby may lag for long. It is waited for, and the login is sent once more only: the
        server counts bad ones, and after five it locks the role for everybody.
        """
        pause, elsewhere = _PAUSE, False
        while True:
            nodes = [each for each in self.nodes.candidates() if isinstance(each, Node)]
            for each in sorted(nodes, key=lambda one: one is not leader):
                with contextlib.suppress(NodeFailure):
                    leads = self._leader(each, known=False)
                    # The leader is not one of ours by name: behind a load balancer, say.
                    elsewhere = elsewhere or leads is None
                    if leads is each:
                        self.nodes.current = each
                        return self._send_login(request, each)
            if elsewhere:
                time.sleep(min(0.3, self.deadline.remaining))
                with contextlib.suppress(NodeFailure):
                    return self._send_login(request, nodes[0])
                return answer
            if self.deadline.remaining < _PAUSE / 2:
                raise ProviderUnavailable(
                    f"{node} refuses the login, and there is no leader that may know better",
                    hint=NODE_FAULTS.find("standby").hint,
                )
            time.sleep(min(pause * (1 + random.random()), self.deadline.remaining))  # noqa: S311
            pause = min(_LONGEST_PAUSE, pause * 2)

    def _send_login(self, request: _Request, node: Node) -> Answer:
        return self._try(request, node, self.deadline.share(1, most=self._settings.call_timeout))

    def _leader(self, node: Node, *, known: bool) -> Node | None:
        """The node that ``node`` says leads, maybe ``node`` itself; None for one that is not ours.

        ``known``: whether what it said a moment ago will do.

        Raises:
            NodeFailure: it knows of none, or does not answer.
        """
        if known and self._leads.get(node, 0.0) > time.monotonic():
            return node
        try:
            _, answer = self.ask_node(node, "/v1/sys/leader")
        except ProviderUnavailable:
            raise NodeFailure("stalled", sent=False) from None
        if not isinstance(answer, dict):
            return None  # a proxy keeps that path to itself
        if not answer.get("ha_enabled") or answer.get("is_self"):
            self._leads = {node: time.monotonic() + _LEADS_FOR}
            return node
        try:
            address = Address.parse(str(answer.get("leader_address")))
        except ValueError:
            raise NodeFailure("standby", sent=False) from None
        # Only an address of the config is ever contacted, whatever the answer says.
        for other in self.nodes.candidates():
            if isinstance(other, Node) and other.address == address:
                return other
        return None


_UNKNOWN: Final = NODE_FAULTS.find("")


def _unavailable(worst: Mapping[str, NodeFailure], asked: float) -> ProviderUnavailable:
    kinds = [failure.kind for failure in worst.values()]
    kind = max(set(kinds), key=kinds.count) if kinds else "stalled"
    said = "; ".join(f"{place}: {failure}" for place, failure in worst.items())
    hint = NODE_FAULTS.find(kind).hint
    if asked:
        hint = f"the server asks to try again in {asked:.3g} s"
    return ProviderUnavailable(f"no answer from {said}", hint=hint)


def _secrets(body: Any) -> Iterator[str]:
    if isinstance(body, Mapping):
        for name, value in body.items():
            if isinstance(value, str) and value and name in _CREDENTIALS:
                yield value
            else:
                yield from _secrets(value)
    elif isinstance(body, list):
        for each in body:
            yield from _secrets(each)


def _may_be_stale(request: _Request, answer: Answer) -> bool:
    if request.fresh or (answer.status == 404 and request.method == "GET"):
        return True
    # A secret id, a token or a right that was given a moment ago is not known to a standby.
    if answer.status == 403 or (request.login and answer.status == 400):
        return True
    # 200 is a batch in which single items failed.
    return answer.status in (200, 400) and any(text in answer.data for text in _STALE)


def _is_answered(answer: Answer) -> bool:
    """Whether the service did what was asked, or says of each item of a batch why not."""
    # A batch of which every item failed is status 400, whatever code was asked for.
    return 200 <= answer.status < 300 or (answer.status == 400 and _BATCH_RESULTS in answer.data)


def _judge(answer: Answer, secrets: Iterator[str]) -> None:
    """NodeFailure where another node should be asked, because this answer does not count."""
    status = answer.status
    if _is_answered(answer):
        return
    if 300 <= status < 400:
        raise NodeFailure("redirect", sent=False)
    words = _words(answer, secrets)
    if words is None:
        if b"HTTP request to an HTTPS server" in answer.data:
            raise NodeFailure("https", sent=False)
        raise NodeFailure("page" if status >= 500 or status == 429 else "stranger", status)
    reason = "; ".join(words)[:300]
    text = reason.lower()
    if status == 503 and ("sealed" in text or "not initialized" in text):
        raise NodeFailure("sealed", sent=False)
    if status == 429:
        raise NodeFailure("limited", sent=False, after=_seconds(answer.headers.get("Retry-After")))
    if status in (412, 472, 473) or (status == 500 and "active cluster node not found" in text):
        raise NodeFailure("standby", sent=False)
    if status >= 500:
        raise NodeFailure("status", f"{status}: {reason}" if reason else status)


def _words(answer: Answer, secrets: Iterator[str]) -> list[str] | None:
    """The service's own reasons, short and printable; None where it is no Vault's answer."""
    try:
        errors = jsonlib.loads(answer.data)["errors"]
        words = [str(text) for text in errors]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    for secret in secrets:
        words = [text.replace(secret, "***") for text in words]
    return [
        " ".join("".join(char if char.isprintable() else " " for char in text).split())[:300]
        for text in words[:8]
    ]


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isdecimal() and len(text) < 6 else 0.0


def _decode(request: _Request, answer: Answer) -> Any:
    if not _is_answered(answer):
        raise Refusal(answer.status, _words(answer, request.secrets) or [])
    with contextlib.suppress(ValueError, RecursionError):
        return jsonlib.loads(answer.data) if answer.data else None
    # Not while the decoder's error is handled, which holds the whole answer.
    fault = NODE_FAULTS.find("json")
    raise ProviderUnavailable(fault.message, hint=fault.hint)
