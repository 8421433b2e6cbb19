"""The nodes of one Vault as one service: an hvac adapter that knows several addresses.

Strategy: ask the node that answered last. If it is dead, sealed or stalled, ask the next one at
once; if all are, wait (exponential, capped, with jitter) and go round again until the operation's
time is over. What a node answers about a key is final only if the node is the leader: a standby
may not have heard yet of a new key or version, and then the leader is asked. A request that
changes something is repeated only where it was certainly not carried out.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from hvac import exceptions
from hvac.adapters import Adapter
from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_exponential, wait_random

from keymgmt.backend import ProviderUnavailable, wipe
from keymgmt_vault._locks import ProcessLock
from keymgmt_vault._settings import Address
from keymgmt_vault._transport import Node, NodeFailure, Reply, tls_context

if TYPE_CHECKING:
    from keymgmt_vault._settings import VaultSettings

__all__ = ["HINTS", "UNSEAL", "ClusterAdapter"]

_STALE: Final = (b"encryption key not found", b"version is too new", b"signing key not found")
_BACKOFF: Final = wait_exponential(multiplier=0.05, max=1.0) + wait_random(0, 0.05)
_MAX_INDEX: Final = 1024
# Seconds for what changes something and is asked once: making an RSA key takes some.
_SLOW: Final = 30.0
log: Final = logging.getLogger("keymgmt.vault")
UNSEAL: Final = "unseal it: bao operator unseal (vault operator unseal)"
HINTS: Final = {
    "name": "look at the address in the config, and at the name service",
    "refused": "look whether the server runs, and at the address in the config",
    "stalled": "look whether the server hangs or a firewall drops what is sent",
    "tls": "name in ca_file who issued the server's certificate, or renew it",
    "broken": "look whether this is a Vault or OpenBao server, and at its log",
    "oversized": "look whether this is a Vault or OpenBao server",
    "sealed": UNSEAL,
    "redirect": "redirects are never followed: add the leader's address to the config",
    "limited": "the server limits its load; try again later",
    "status": "look at the server's log",
}


class _RoundFailed(Exception):
    """No node gave an answer that can be used."""

    def __init__(self, failures: dict[str, NodeFailure]) -> None:
        super().__init__()
        self.failures = failures

    def __str__(self) -> str:
        return "; ".join(f"{place}: {failure}" for place, failure in self.failures.items())

    @property
    def passing(self) -> bool:
        """Whether waiting may help: not for names and certificates that are wrong."""
        return any(failure.kind not in ("name", "tls") for failure in self.failures.values())


class _Nodes:
    """The connections of one process; a forked child makes its own."""

    def __init__(self, settings: VaultSettings) -> None:
        self.pid: Final = os.getpid()
        secure = any(address.scheme == "https" for address in settings.addresses)
        context = tls_context(settings) if secure else None
        self.all: Final = tuple(
            Node(address, context, settings.server_name) for address in settings.addresses
        )
        self.current: Node = self.all[0]
        # A node that failed is asked last until then.
        self.resting: dict[Node, float] = {}

    def order(self) -> list[Node]:
        if len(self.all) == 1:
            return [self.current]
        start = self.all.index(self.current)
        nodes = [*self.all[start:], *self.all[:start]]
        now = time.monotonic()
        return sorted(nodes, key=lambda node: max(0.0, self.resting.get(node, 0.0) - now))


class ClusterAdapter(Adapter):  # type: ignore[misc]
    """What hvac's API classes send through: ``request`` returns the answer's JSON.

    Thread-safe and fork-safe. ``token`` goes with every request that is not a login.
    """

    def __init__(self, settings: VaultSettings) -> None:
        # hvac's own __init__ would make a requests session, which is not used here.
        self._settings = settings
        self._made: _Nodes | None = None
        self._lock = ProcessLock()
        self._operation = threading.local()
        self._index: str | None = None
        self.token: str | None = None
        self.namespace = settings.namespace

    @property
    def nodes(self) -> _Nodes:
        """The nodes of this process, made on first use; ConfigError as ``tls_context``."""
        made = self._made
        if made is not None and made.pid == os.getpid():
            return made
        with self._lock.here():
            made = self._made
            if made is None or made.pid != os.getpid():
                # The sockets of a parent are the parent's too: none of them is used or closed here.
                made = self._made = _Nodes(self._settings)
            return made

    @contextlib.contextmanager
    def operation(self, seconds: float | None = None) -> Iterator[None]:
        """Bound all requests of this thread inside by ``seconds`` together; the outermost wins."""
        if getattr(self._operation, "ends", None) is not None:
            yield
            return
        limit = self._settings.timeout if seconds is None else seconds
        self._operation.ends = time.monotonic() + limit
        try:
            yield
        finally:
            self._operation.ends = None

    def get_login_token(self, response: Any) -> str:
        """The token of a login's answer; ProviderUnavailable if it has none."""
        auth = response.get("auth") if isinstance(response, dict) else None
        token = auth.get("client_token") if isinstance(auth, dict) else None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise ProviderUnavailable("the server's answer to the login has no token")
        return token

    def close(self) -> None:
        """Close the idle connections and forget the token; the adapter may be used again."""
        made, self._made = self._made, None
        self.token = None
        if made is not None and made.pid == os.getpid():
            for node in made.all:
                node.close()

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        raise_exception: bool = True,
        *,
        json: Any = None,
        once: bool = False,
        anonymous: bool = False,
        fresh: bool = False,
        **_: Any,
    ) -> Any:
        """Send one request to the cluster and return its JSON, or None if there is none.

        Args:
            method: HTTP method; hvac's ``list`` is Vault's LIST.
            url: path from ``/v1/`` on, made of checked parts.
            headers: more headers.
            raise_exception: raise for a status that is no success; else return the body anyway.
            json: body.
            once: whether repeating would change more than doing it once.
            anonymous: send no token.
            fresh: the leader's answer and no standby's.
            _: nothing else of hvac's reaches a connection.

        Raises:
            ProviderUnavailable: no answer in time.
            hvac.exceptions.VaultError: the service refused.
        """
        body = None if json is None else jsonlib.dumps(json, separators=(",", ":")).encode()
        sent = self._headers(headers)
        if anonymous:
            sent.pop("X-Vault-Token", None)
        if body is not None:
            sent["Content-Type"] = "application/json"
        ask = _Ask(method.upper(), url, body, sent, once, login=anonymous, fresh=fresh)
        with self.operation():
            try:
                reply = self._persist(ask)
            except _RoundFailed as failed:
                raise self._unavailable(failed) from failed
        return _decode(ask, reply, raise_exception=raise_exception)

    def _headers(self, more: Mapping[str, str] | None) -> dict[str, str]:
        headers = {"X-Vault-Request": "true", "User-Agent": "keymgmt", **(more or {})}
        if self.token:
            headers["X-Vault-Token"] = self.token
        if self.namespace:
            headers["X-Vault-Namespace"] = self.namespace
        if self._index:
            # A standby that has not caught up with what we wrote passes this on to the leader.
            headers["X-Vault-Index"] = self._index
            headers["X-Vault-Inconsistent"] = "forward-active-node"
        return headers

    def login(self, url: str, use_token: bool = True, **kwargs: Any) -> Any:
        """Send a login, without the token that is held, and keep the token of its answer."""
        response = self.request("post", url, anonymous=True, **kwargs)
        if use_token:
            self.token = self.get_login_token(response)
        return response

    def ask_node(self, node: Node, path: str) -> tuple[int, Any]:
        """GET a public path of one node, in the root namespace: its status and JSON.

        Raises:
            NodeFailure: it gave no answer.
        """
        with self.operation():
            headers = {"X-Vault-Request": "true", "User-Agent": "keymgmt"}
            ask = _Ask("GET", path, None, headers, once=False)
            seconds = max(0.001, min(self._settings.call_timeout, self.left()))
            reply = node.call("GET", path, None, headers, seconds)
            return reply.status, _decode(ask, reply, raise_exception=False)

    def left(self) -> float:
        """Seconds that the operation of this thread has left; negative when it is over."""
        return float(self._operation.ends) - time.monotonic()

    def _persist(self, ask: _Ask) -> Reply:
        try:
            return self._round(ask)
        except _RoundFailed as failed:
            if not failed.passing:
                raise
            known = failed.failures
        time.sleep(min(0.05, max(0.0, self.left())))
        for attempt in Retrying(
            stop=stop_before_delay(max(0.0, self.left())),
            wait=_BACKOFF,
            retry=retry_if_exception(lambda e: isinstance(e, _RoundFailed) and e.passing),
            reraise=True,
        ):
            with attempt:
                try:
                    return self._round(ask)
                except _RoundFailed as failed:
                    # A call that the end of the operation cut short says nothing of the node.
                    known |= {k: v for k, v in failed.failures.items() if not v.cut}
                    failed.failures = known
                    raise
        raise AssertionError  # the last attempt returns or raises

    def _round(self, ask: _Ask) -> Reply:
        nodes = self.nodes
        failures: dict[str, NodeFailure] = {}
        for node in nodes.order():
            if failures and self.left() <= 0:
                break
            try:
                reply = self._try(ask, node)
            except _RoundFailed as failed:
                failures |= failed.failures
                continue
            nodes.current = node
            return self._final(ask, node, reply)
        raise _RoundFailed(failures)

    def _try(self, ask: _Ask, node: Node) -> Reply:
        nodes = self.nodes
        seconds = max(0.001, min(self._settings.call_timeout, self.left()))
        if ask.once:
            seconds = _SLOW
        try:
            reply = node.call(ask.method, ask.url, ask.body, ask.headers, seconds)
            if (trouble := _trouble(reply)) is not None:
                raise trouble
        except NodeFailure as failure:
            failure.cut = failure.kind == "stalled" and seconds < self._settings.call_timeout
            if failure.kind != "limited" and len(nodes.all) > 1:
                if node not in nodes.resting:
                    log.warning("%s is passed over: %s", node.address, failure)
                nodes.resting[node] = time.monotonic() + 5 * self._settings.call_timeout
            if ask.once and failure.sent:
                raise ProviderUnavailable(
                    f"{node.address} did not answer ({failure}); what was asked may have been done",
                    hint="look with: keymgmt keys show",
                ) from failure
            raise _RoundFailed({str(node.address): failure}) from failure
        if nodes.resting.pop(node, None) is not None:
            log.warning("%s answers again", node.address)
        if ask.once and 200 <= reply.status < 300:
            index = reply.headers.get("X-Vault-Index")
            if index and len(index) <= _MAX_INDEX and index.isascii() and index.isprintable():
                self._index = index
        return reply

    def _final(self, ask: _Ask, node: Node, reply: Reply) -> Reply:
        """Ask the leader where ``node`` may only not have heard yet of a key or version."""
        if not _may_be_stale(ask, reply):
            return reply
        leader = self._leader(node)
        if leader is node:
            return reply
        if leader is not None:
            with contextlib.suppress(_RoundFailed):
                return self._try(ask, leader)
        # The leader is not one of ours by name: behind a load balancer, say. Standbys were seen to
        # lag by up to 100 ms. A login is tried only once more: the server counts bad ones, and
        # after five it locks the role for everybody.
        for pause in (0.3,) if ask.login else (0.05, 0.1, 0.2, 0.4):
            time.sleep(min(pause, max(0.0, self.left())))
            for other in self.nodes.order()[: 1 if ask.login else None]:
                with contextlib.suppress(_RoundFailed):
                    reply = self._try(ask, other)
                    if not _may_be_stale(ask, reply):
                        return reply
        return reply

    def _leader(self, node: Node) -> Node | None:
        """The configured node that ``node`` says leads, ``node`` itself included, or None."""
        try:
            _, answer = self.ask_node(node, "/v1/sys/leader")
        except (NodeFailure, ProviderUnavailable):
            return None
        if not isinstance(answer, dict):
            return None
        if not answer.get("ha_enabled") or answer.get("is_self"):
            return node
        try:
            address = Address.parse(str(answer.get("leader_address")))
        except ValueError:
            return None
        # Only an address of the config is ever contacted, whatever the answer says.
        return next((other for other in self.nodes.all if other.address == address), None)

    def _unavailable(self, failed: _RoundFailed) -> ProviderUnavailable:
        kinds = [failure.kind for failure in failed.failures.values()]
        kind = max(set(kinds), key=kinds.count) if kinds else "stalled"
        return ProviderUnavailable(f"no answer from {failed}", hint=HINTS[kind])


class _Ask:
    """One request, as it goes to any node."""

    def __init__(
        self,
        method: str,
        url: str,
        body: bytes | None,
        headers: dict[str, str],
        once: bool,
        login: bool = False,
        fresh: bool = False,
    ) -> None:
        self.method, self.url, self.body, self.headers = method, url, body, headers
        self.once, self.login, self.fresh = once, login, fresh


def _may_be_stale(ask: _Ask, reply: Reply) -> bool:
    if ask.fresh or (reply.status == 404 and ask.method == "GET"):
        return True
    if ask.login and reply.status in (400, 403):
        # A secret id that was made a moment ago is not known to a standby.
        return True
    # 200 is a batch in which single items failed.
    return reply.status in (200, 400) and any(text in reply.data for text in _STALE)


def _trouble(reply: Reply) -> NodeFailure | None:
    """Why another node should be asked, or None if this answer counts."""
    status, data = reply.status, reply.data
    if 300 <= status < 400:
        return NodeFailure("redirect", "it redirects elsewhere", sent=False)
    if status == 503:
        return NodeFailure("sealed", "it is sealed or not initialised", sent=False)
    if status == 429:
        return NodeFailure("limited", "it is over its rate limit or behind the leader", sent=False)
    if status in (412, 472, 473):
        return NodeFailure("status", "it is a standby that cannot answer", sent=False)
    if status == 500 and b"active cluster node not found" in data:
        return NodeFailure("status", "it knows no leader", sent=False)
    if status >= 500:
        return NodeFailure("status", f"it answered with status {status}{_words(data)}")
    return None


def _words(data: bytearray) -> str:
    """The server's own words of an error, short and printable, after a colon."""
    try:
        text = "; ".join(map(str, jsonlib.loads(data)["errors"]))
    except (ValueError, RecursionError, LookupError, TypeError):
        return ""
    return ": " + "".join(char if char.isprintable() else " " for char in text)[:200]


def _decode(ask: _Ask, reply: Reply, *, raise_exception: bool) -> Any:
    try:
        answer = jsonlib.loads(reply.data) if reply.data else None
    except (ValueError, RecursionError) as error:
        if 200 <= reply.status < 300:
            raise ProviderUnavailable(
                "the server's answer is no JSON", hint=HINTS["broken"]
            ) from error
        answer = None
    finally:
        wipe(reply.data)
    if raise_exception and not 200 <= reply.status < 300:
        errors = answer.get("errors") if isinstance(answer, dict) else None
        texts = [str(text) for text in errors] if isinstance(errors, list) else []
        raise exceptions.VaultError.from_status(
            reply.status, "no reason given", errors=texts, method=ask.method, url=ask.url
        )
    return answer
