"""What ``keymgmt doctor`` says of a Vault: each address, the login, the policy, a round trip."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from hvac import exceptions
from hvac.api.auth_methods import Token

from keymgmt.backend import (
    AccessDenied,
    Dek,
    Finding,
    Health,
    KeyInfo,
    KeymgmtError,
)
from keymgmt_vault._cluster import HINTS, UNSEAL
from keymgmt_vault._transport import Node, NodeFailure

if TYPE_CHECKING:
    from keymgmt_vault._client import Client
    from keymgmt_vault._provider import VaultProvider

__all__ = ["check"]

_DAY: Final = 86400
_HEALTH: Final = (
    "/v1/sys/health?standbyok=true&perfstandbyok=true&sealedcode=200&uninitcode=200"
    "&drsecondarycode=200&performancestandbycode=200"
)


def check(provider: VaultProvider, client: Client, key: str | None) -> Health:
    """Look at everything once; what fails becomes a finding, and what hangs on it is left out."""
    return Health(tuple(_findings(provider, client, key)))


def _findings(provider: VaultProvider, client: Client, key: str | None) -> Iterator[Finding]:
    try:
        nodes = client.adapter.nodes.all
    except KeymgmtError as error:
        yield Finding("config", "failed", str(error), error.hint)
        return
    usable = False
    with ThreadPoolExecutor(len(nodes)) as pool:
        looked = list(pool.map(lambda node: (node, list(_node(client, node))), nodes))
    for node, found in looked:
        for finding in found:
            usable = usable or (finding.status == "ok" and finding.name == str(node.address))
            yield finding
    if not usable:
        yield Finding("login", "skipped", "no address can be used")
        return
    try:
        with client.adapter.operation():
            client.login.ensure()
            token = _token(client)
    except KeymgmtError as error:
        yield Finding("login", "failed", str(error), error.hint)
        return
    yield token
    if token.status != "failed" and key is not None:
        yield from _key(provider, client, key)


def _node(client: Client, node: Node) -> Iterator[Finding]:
    name = str(node.address)
    try:
        status, answer = client.adapter.ask_node(node, _HEALTH)
    except NodeFailure as failure:
        yield Finding(name, "failed", str(failure), HINTS[failure.kind])
        return
    except KeymgmtError as error:
        yield Finding(name, "failed", str(error), error.hint)
        return
    health = answer if isinstance(answer, dict) else {}
    version = str(health.get("version", "of unknown version"))[:40]
    if 300 <= status < 400:
        yield Finding(name, "failed", "it redirects elsewhere", HINTS["redirect"])
    elif not health:
        yield Finding(name, "failed", f"it answers with status {status}", HINTS["broken"])
    elif not health.get("initialized"):
        yield Finding(name, "failed", "it is not initialised", "bao operator init")
    elif health.get("sealed"):
        yield Finding(name, "failed", "it is sealed", UNSEAL)
    else:
        role = "standby" if health.get("standby") else "leader"
        yield Finding(name, "ok", f"{role}, {version}")
    yield from _certificate(node, client.settings.call_timeout)


def _certificate(node: Node, seconds: float) -> Iterator[Finding]:
    certificate = node.certificate(seconds)
    if certificate is None:
        return
    days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / _DAY
    yield Finding(
        f"certificate of {node.address}",
        "ok" if days >= 14 else "warning",
        f"expires in {days:.0f} days",
        None if days >= 14 else "renew the server's certificate",
    )


def _token(client: Client) -> Finding:
    if not client.login.needs_token:
        return Finding("login", "ok", "the agent adds its token")
    method = client.settings.auth.method
    try:
        answer = Token(client.adapter).lookup_self()
    except exceptions.VaultError:
        if not client.login.is_dead():
            return Finding("login", "ok", f"by {method}; the token may not look itself up")
        return Finding(
            "login", "failed", "the token has expired or was revoked", "replace it at its source"
        )
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
        hint = "nobody renews it: use an auth method that logs in, or a renewable token"
        return Finding("login", "warning", f"{text}, the token ends in {ttl} s", hint)
    return Finding("login", "ok", f"{text}, the token lives {ttl} s and is renewed or replaced")


def _key(provider: VaultProvider, client: Client, key: str) -> Iterator[Finding]:
    context = os.urandom(32)
    described: KeyInfo | None = None
    try:
        described = provider.describe_key(key)
    except AccessDenied:
        yield Finding("key", "skipped", f"the policy does not let us look at {key}")
    except KeymgmtError as error:
        yield Finding("key", "failed", str(error), error.hint)
        return
    else:
        exportable = "exportable" in described.detail or "plaintext backup" in described.detail
        yield Finding(
            "key",
            "warning" if exportable else "ok",
            f"{key}: {described.kind}, version {described.newest}",
            "the server gives it away; make another that is not exportable" if exportable else None,
        )
        yield from _upsert(client)
    if described is not None and described.purpose == "sign":
        yield _signs(provider, key)
        return
    yield from _grants(client, key)
    with Dek.generate() as dek:
        try:
            wrapped = provider.wrap(key, dek, context)
        except AccessDenied:
            yield Finding("round trip", "skipped", "the policy does not let us wrap; unwrap only")
            return
        except KeymgmtError as error:
            yield Finding("round trip", "failed", str(error), error.hint)
            return
        try:
            with provider.unwrap(wrapped, context) as again:
                same = again == dek
        except AccessDenied:
            yield Finding("round trip", "skipped", "the policy lets us wrap and not unwrap")
        except KeymgmtError as error:
            yield Finding("round trip", "failed", str(error), error.hint)
        else:
            yield Finding(
                "round trip",
                "ok" if same else "failed",
                "wrapped and unwrapped" if same else "another data key came back",
            )


def _signs(provider: VaultProvider, key: str) -> Finding:
    try:
        provider.sign(key, b"keymgmt doctor")
    except AccessDenied:
        return Finding("signature", "skipped", "the policy does not let us sign")
    except KeymgmtError as error:
        return Finding("signature", "failed", str(error), error.hint)
    return Finding("signature", "ok", "signed")


def _grants(client: Client, key: str) -> Iterator[Finding]:
    """What the policy grants on the key, if it lets us ask (the policy ``default`` does)."""
    native, mount = client.settings.native(key), client.settings.mount
    paths = {verb: f"{mount}/{verb}/{native}" for verb in ("encrypt", "decrypt")}
    try:
        data = client.call(
            "read",
            native,
            lambda: client.adapter.post(
                "/v1/sys/capabilities-self", json={"paths": list(paths.values())}
            ),
        )
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


def _upsert(client: Client) -> Iterator[Finding]:
    path = f"/v1/{client.settings.mount}/config/keys"
    try:
        data = client.call("read", "", lambda: client.adapter.get(path))
    except KeymgmtError:
        # Few policies grant this look; the key is looked at before each wrap anyway.
        return
    if data.get("disable_upsert") is False:
        yield Finding(
            "upsert",
            "warning",
            "Transit creates a key that is encrypted with and is not there",
            f"bao write {client.settings.mount}/config/keys disable_upsert=true",
        )
