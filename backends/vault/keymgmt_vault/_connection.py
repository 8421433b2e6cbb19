"""The nodes of one Vault as one service: an hvac adapter that knows several addresses.

Strategy: ask the node that answered last. If it is dead, sealed or stalled, ask the next node at
once; if all nodes are, and waiting may help, wait (doubling, with jitter, or as the server asks)
and ask them all again until the time is over. The time is divided so that every node gets its turn.
A node's answer about a key or a right is final only if the node is the leader: a standby may lag
behind, so then the leader is asked. A request that changes something is repeated only if it was
certainly not carried out.
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
# Seconds for a request that changes something, which is sent once: creating an RSA key is slow.
_SLOW: Final = 30.0
_LEADS_FOR: Final = 5.0  # seconds for which the answer about who leads is reused
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
        """The secrets of the request, which an error must not repeat from the answer."""
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
    """The adapter through which hvac's API classes send: ``request`` returns the answer's JSON.

    Thread-safe and fork-safe. ``token`` goes with every request that is not a login; ``login_as``
    says whether the credentials of the next login can be used only once.
    """

    def __init__(self, settings: VaultSettings) -> None:
        # hvac's __init__ is not called: it would open a session of ``requests``.
        self._settings = settings
        self._tls = Tls(settings)
        self._index: str | None = None
        self.login_as: Operation = "login"
        self.token: str | None = None
        self.namespace = settings.namespace
        ForkSafe.__init__(self)

    def _renew(self) -> None:
        # A child shares the sockets of its parent, so it must not use them.
        self.nodes = Nodes(self._settings, self._tls)
        self._leads: dict[Node, float] = {}
        self._thread = _Thread()

    @property
    def deadline(self) -> Deadline:
        """When the operation of this thread ends."""
        assert self._thread.deadline is not None  # noqa: S101 - every request is in an operation
        return self._thread.deadline

    def operation(self, seconds: float | None = None) -> contextlib.AbstractContextManager[None]:
        """Limit all requests of this thread inside to ``seconds`` together; the outermost wins."""
        return _BOUNDED if self._thread.deadline else self._bound(seconds or self._settings.timeout)

    @contextlib.contextmanager
    def _bound(self, seconds: float) -> Iterator[None]:
        self._thread.deadline = Deadline(seconds, "the Vault server")
        try:
            yield
        finally:
            self._thread.deadline = None

    def get_login_token(self, response: Any) -> str:
        """The token of a login's answer; ProviderUnavailable if it has no token."""
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
        """Send one request to the cluster and return the JSON of the answer, or None without body.

        Args:
            method: HTTP method; hvac's ``list`` is Vault's LIST.
            url: path from ``/v1/`` on, made of checked parts.
            headers: more headers.
            raise_exception: ignored; errors are always raised.
            json: body.
            operation: whether the request may be repeated; a login carries no token.
            fresh: require the answer of the leader, and not of a standby.
            token: sent in place of ``self.token``.
            _: other options of hvac, which are ignored.

        Raises:
            ProviderUnavailable: no answer in time.
            Refusal: the service refused.
        """
        all_headers = {"X-Vault-Request": "true", "User-Agent": "keymgmt", **(headers or {})}
        token = None if operation.endswith("login") else token or self.token
        if token:
            all_headers["X-Vault-Token"] = token
        if self.namespace:
            all_headers["X-Vault-Namespace"] = self.namespace
        if self._index:
            # A standby that has not received our last change yet forwards the request to the
            # leader (Vault Enterprise's eventual consistency).
            all_headers["X-Vault-Index"] = self._index
            all_headers["X-Vault-Inconsistent"] = "forward-active-node"
        body = None
        if json is not None:
            body = _to_json(json).encode()
            all_headers["Content-Type"] = "application/json"
        request = _Request(method.upper(), url, body, all_headers, operation, fresh, json)
        with self.operation():
            return _decode(request, self._send(request))

    def login(self, url: str, use_token: bool = True, **kwargs: Any) -> Any:  # noqa: ARG002
        """Send a login, without ``self.token``; hvac's ``use_token`` is ignored."""
        return self.request("post", url, operation=self.login_as, **kwargs)

    def ask_node(self, node: Node, path: str) -> tuple[int, Any]:
        """GET a public path of one node, in the root namespace: its status and JSON.

        Raises:
            NodeFailure: the node gave no answer.
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
        # The failure of each node's longest try: a try in the last millisecond says nothing.
        longest: dict[str, NodeFailure] = {}
        pause, deadline = _PAUSE, self.deadline
        while True:
            answer, failures = self._round(request, longest)
            if answer is not None:
                return answer
            retry_after = min((each.after for each in failures if each.after), default=0.0)
            wait = max(retry_after, pause * (1 + random.random()))  # noqa: S311 - jitter
            passing = any(each.fault.passing for each in failures)
            if not passing or retry_after > deadline.remaining or deadline.remaining < _PAUSE / 2:
                raise _unavailable(longest, retry_after)
            time.sleep(min(wait, deadline.remaining if retry_after else deadline.remaining / 2))
            pause = min(_LONGEST_PAUSE, pause * 2)

    def _round(
        self, request: _Request, longest: dict[str, NodeFailure]
    ) -> tuple[Answer | None, list[NodeFailure]]:
        nodes, failures = self.nodes, list[NodeFailure]()
        waiting, seen = nodes.candidates(), set[Node | Address]()
        fair = min(self._settings.call_timeout, self.deadline.seconds / len(waiting))
        # When the time is over and a node has failed, that failure is reported, and not the time.
        while waiting and (self.deadline.remaining or not longest):
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
                known = longest.get(str(each))
                if known is None or (not hasty and failure.seconds >= known.seconds):
                    longest[str(each)] = failure
                nodes.failed(each, failure, rest=failure.kind != "limited" and not hasty)
            else:
                nodes.current = each
                return self._settle(request, each, answer), failures
        return None, failures

    def _try(self, request: _Request, node: Node, seconds: float) -> Answer:
        """The answer of one node, if it comes from a Vault.

        Args:
            request: the request.
            node: the node.
            seconds: for the connection, and for the answer to a request that may be repeated.
        """
        limits = {
            "ask": None,
            "change": _SLOW,
            # The node may have to wait for an election, and a repeated login leaves a second token.
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
            # An error status says that a login failed, so it is known not to have been carried out.
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
        """Ask the leader if ``node`` may be a standby that lags in a key, version or right."""
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
                    # The leader's refusal is final; the next requests go to the leader directly.
                    self.nodes.current = leader
            return answer
        if answer.status == 403:
            return answer
        # The leader's address is not in the config, for example behind a load balancer. Standbys
        # were seen to lag by up to 100 ms.
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
        """The leader's answer to a login that a standby refused.

        A refused login is not sent again for a while (``_login``), so the refusal must come from
        the leader: a standby may lag behind it, and for long while the cluster has no leader. So
        the leader is waited for, and the login is sent only once more, since the server counts bad
        logins and locks the role for everybody after five.
        """
        pause, elsewhere = _PAUSE, False
        while True:
            nodes = [each for each in self.nodes.candidates() if isinstance(each, Node)]
            for each in sorted(nodes, key=lambda node: node is not leader):
                with contextlib.suppress(NodeFailure):
                    leads = self._leader(each, known=False)
                    # The leader's address is not in the config, as behind a load balancer.
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
                    f"{node} is a standby and refuses the login, and no leader can be asked",
                    hint=NODE_FAULTS.find("standby").hint,
                )
            time.sleep(min(pause * (1 + random.random()), self.deadline.remaining))  # noqa: S311
            pause = min(_LONGEST_PAUSE, pause * 2)

    def _send_login(self, request: _Request, node: Node) -> Answer:
        return self._try(request, node, self.deadline.share(1, most=self._settings.call_timeout))

    def _leader(self, node: Node, *, known: bool) -> Node | None:
        """The leader according to ``node``; None for a leader whose address is not in the config.

        Args:
            node: the node to ask, which may be the leader itself.
            known: whether an answer of the last ``_LEADS_FOR`` seconds is good enough.

        Raises:
            NodeFailure: it knows no leader, or does not answer.
        """
        if known and self._leads.get(node, 0.0) > time.monotonic():
            return node
        try:
            _, answer = self.ask_node(node, "/v1/sys/leader")
        except ProviderUnavailable:
            raise NodeFailure("stalled", sent=False) from None
        if not isinstance(answer, dict):
            return None  # a proxy does not let this path through
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


def _unavailable(longest: Mapping[str, NodeFailure], retry_after: float) -> ProviderUnavailable:
    kinds = [failure.kind for failure in longest.values()]
    kind = max(set(kinds), key=kinds.count) if kinds else "stalled"
    failures = "; ".join(f"{node}: {failure}" for node, failure in longest.items())
    hint = NODE_FAULTS.find(kind).hint
    if retry_after:
        hint = f"the server asks to try again in {retry_after:.3g} s"
    return ProviderUnavailable(f"no answer from {failures}", hint=hint)


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
    # A standby may not know a secret id, a token or a right that was given a moment ago.
    if answer.status == 403 or (request.login and answer.status == 400):
        return True
    # A batch in which single items failed has the status 200.
    return answer.status in (200, 400) and any(text in answer.data for text in _STALE)


def _is_answered(answer: Answer) -> bool:
    """Whether the service carried the request out, or gives a reason for each item of a batch."""
    # A batch of which every item failed has status 400, whatever status the request asks for.
    return 200 <= answer.status < 300 or (answer.status == 400 and _BATCH_RESULTS in answer.data)


def _judge(answer: Answer, secrets: Iterator[str]) -> None:
    """Raise NodeFailure if the answer says something of the node only, so another one is asked."""
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
    """The service's own reasons, short and printable; None if the answer is not from a Vault."""
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
    # Raised outside of a handler: the decoder's error as __context__ would hold the whole answer.
    fault = NODE_FAULTS.find("json")
    raise ProviderUnavailable(fault.message, hint=fault.hint)
