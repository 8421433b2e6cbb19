"""The findings of ``keymgmt doctor`` about a Vault: addresses, login, policy, round trip."""

from __future__ import annotations

import itertools
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from hvac.api.auth_methods import Token

from keymgmt.backend import (
    AccessDenied,
    Finding,
    KeyInfo,
    KeymgmtError,
    KeyProvider,
    check_key,
    try_key,
)
from keymgmt_vault._errors import NodeFailure, Refusal
from keymgmt_vault._settings import Address

if TYPE_CHECKING:
    from keymgmt_vault._keys import Keys
    from keymgmt_vault._session import Session
    from keymgmt_vault._transport import Node

__all__ = ["findings"]

_DAY: Final = 86400
_CERTIFICATE: Final = "certificate of "
_HEALTH: Final = (
    "/v1/sys/health?standbyok=true&perfstandbyok=true&sealedcode=200&uninitcode=200"
    "&drsecondarycode=200&performancestandbycode=200"
)


def findings(
    provider: KeyProvider[Any], session: Session, keys: Keys, key: str | None
) -> Iterator[Finding]:
    """Check everything once; after a failure the checks that depend on it are skipped."""
    nodes = session.connection.nodes.candidates()
    with ThreadPoolExecutor(len(nodes)) as pool:
        per_node = list(itertools.chain(*pool.map(lambda node: list(_node(session, node)), nodes)))
    yield from sorted(per_node, key=lambda finding: finding.name.startswith(_CERTIFICATE))
    if not any(f.status == "ok" and not f.name.startswith(_CERTIFICATE) for f in per_node):
        yield Finding("login", "skipped", "no address can be used")
        return
    try:
        with session.connection.operation():
            session.log_in()
            token = _token(session)
    except KeymgmtError as error:
        yield Finding.failure("login", error)
        return
    yield token
    if token.status != "failed" and key is not None:
        yield from _key(provider, session, keys, key)


def _failed(name: str, failure: NodeFailure) -> Finding:
    return Finding(name, "failed", str(failure), failure.hint)


def _node(session: Session, node: Node | Address) -> Iterator[Finding]:
    connection, seconds = session.connection, session.settings.call_timeout
    try:
        if isinstance(node, Address):
            for each in connection.nodes.look_up(node, seconds):
                yield from _node(session, each)
            return
        status, answer = connection.ask_node(node, _HEALTH)
    except NodeFailure as failure:
        yield _failed(str(node), failure)
        return
    except KeymgmtError as error:
        yield Finding.failure(str(node), error)
        return
    health = answer if isinstance(answer, dict) else {}
    version = str(health.get("version", "of unknown version"))[:40]
    if 300 <= status < 400:
        yield _failed(str(node), NodeFailure("redirect"))
    elif not health:
        yield _failed(str(node), NodeFailure("page", status))
    elif not health.get("initialized"):
        yield Finding(str(node), "failed", "it is not initialised", "bao operator init")
    elif health.get("sealed"):
        yield Finding(str(node), "failed", "it is sealed", NodeFailure("sealed").hint)
    else:
        role = "standby" if health.get("standby") else "leader"
        yield Finding(str(node), "ok", f"{role}, {version}")
    yield from _certificate(node, seconds)


def _certificate(node: Node, seconds: float) -> Iterator[Finding]:
    if (certificate := node.certificate(seconds)) is None:
        return
    days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / _DAY
    yield Finding(
        f"{_CERTIFICATE}{node}",
        "ok" if days >= 14 else "warning",
        f"expires in {days:.0f} days",
        None if days >= 14 else "renew the server's certificate",
    )


def _token(session: Session) -> Finding:
    method = session.settings.auth.method
    try:
        answer = Token(session.connection).lookup_self()
    except Refusal as refusal:
        if refusal.code == "dead token" and not session.needs_token:
            return Finding("login", "failed", "the agent has not logged in", "look at its log")
        if refusal.code == "dead token":
            text = "the token has expired or was revoked"
            return Finding("login", "failed", text, "replace it at its source")
        return Finding("login", "ok", f"by {method}; the token may not look itself up")
    data: dict[str, Any] = (answer.get("data") or {}) if isinstance(answer, dict) else {}
    policies = ", ".join(str(policy) for policy in data.get("policies") or [])[:200]
    ttl = data.get("ttl")
    text = f"by {method}, policies {policies or 'none'}"
    if "root" in (data.get("policies") or []):
        return Finding(
            "login", "warning", text, "a root token can do anything: use a policy of docs/backends"
        )
    if not ttl:
        return Finding("login", "ok", f"{text}, the token does not expire")
    if method == "token" and not data.get("renewable"):
        hint = "it cannot be renewed: use an auth method that logs in, or a renewable token"
        return Finding("login", "warning", f"{text}, the token ends in {ttl} s", hint)
    return Finding("login", "ok", f"{text}, the token lives {ttl} s and is renewed or replaced")


def _key(provider: KeyProvider[Any], session: Session, keys: Keys, key: str) -> Iterator[Finding]:
    described: KeyInfo | None = None
    try:
        described = keys.read(check_key(key)).info
    except AccessDenied:
        yield Finding("key", "skipped", f"the policy does not allow to read the key {key}")
    except KeymgmtError as error:
        yield Finding.failure("key", error)
        return
    else:
        exportable = "exportable" in described.detail or "plaintext backup" in described.detail
        yield Finding(
            "key",
            "warning" if exportable else "ok",
            f"{key}: {described.kind}, version {described.newest}",
            "the server lets the key out; create another key that is not exportable"
            if exportable
            else None,
        )
        yield from _upsert(session)
    name, purpose, good = "round trip", "wrap", "wrapped and unwrapped"
    if described is not None and described.purpose == "sign":
        name, purpose, good = "signature", "sign", "signed"
    else:
        yield from _grants(session, key)
    try:
        try_key(provider, key, purpose)
    except KeymgmtError as error:
        yield Finding.failure(name, error, may_lack=True)
    else:
        yield Finding(name, "ok", good)


def _grants(session: Session, key: str) -> Iterator[Finding]:
    """The policy's grants on the key; none where it does not allow to ask (``default`` does)."""
    native, mount = session.settings.native(key), session.settings.mount
    paths = {verb: f"{mount}/{verb}/{native}" for verb in ("encrypt", "decrypt")}
    try:
        body = {"paths": list(paths.values())}
        data = session.call("read", native, "post", "/v1/sys/capabilities-self", json=body)
    except KeymgmtError:
        return
    for verb, path in paths.items():
        have = data.get(path)
        granted = isinstance(have, list) and bool({"update", "root"} & set(map(str, have)))
        word = {"encrypt": "wrap", "decrypt": "unwrap"}[verb]
        yield Finding(
            word,
            "ok" if granted else "skipped",
            f"the policy {'grants' if granted else 'does not grant'} update on {path}",
        )
        if verb == "encrypt" and isinstance(have, list) and "create" in have:
            yield Finding(
                "policy",
                "warning",
                f"the policy grants create on {path}: encrypting can create a mistyped key",
                "grant update only",
            )


def _upsert(session: Session) -> Iterator[Finding]:
    try:
        data = session.transit("read", "", "get", "config/keys")
    except KeymgmtError:
        # Few policies grant this. It is not needed, since each wrap reads the key first.
        return
    if data.get("disable_upsert") is False:
        yield Finding(
            "upsert",
            "warning",
            "Transit creates a key that does not exist when something is encrypted with it",
            f"bao write {session.settings.mount}/config/keys disable_upsert=true",
        )
