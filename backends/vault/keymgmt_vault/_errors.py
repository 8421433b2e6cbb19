"""Two tables of faults: failures of a node, and refusals of the service.

The table of node failures says whether waiting may help (``passing``); another node is asked after
any failure. Vault refuses with a status and a sentence; the sentences here were seen from OpenBao
2.7, whose Transit engine comes from HashiCorp Vault. An answer that does not come from a Vault is
never taken for a refusal, whatever its status is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from keymgmt.backend import (
    AccessDenied,
    Fault,
    FaultTable,
    KeyNotFound,
    KeyRetired,
    ProviderError,
    ProviderUnavailable,
    UnsupportedOperation,
    UnwrapFailed,
    WrongKey,
)

if TYPE_CHECKING:
    from keymgmt_vault._settings import VaultSettings

__all__ = ["NODE_FAULTS", "NodeFailure", "Operation", "Refusal", "Verb", "refused"]

Operation = Literal["ask", "change", "login", "single-use login"]
"""Whether a request may be repeated: ``ask`` changes nothing; ``change`` and a login with a
credential for a single use are never repeated if the node may have carried them out."""

Verb = Literal["encrypt", "decrypt", "sign", "rotate", "read", "create", "retire", "list", "delete"]


def _node(message: str, hint: str, *, passing: bool = True) -> Fault:
    return Fault(ProviderUnavailable, message, hint, passing)


_NO_VAULT: Final = "look whether this is the address of a Vault or OpenBao server, with its path"

NODE_FAULTS: Final = FaultTable[str](
    {
        "name": _node(
            "its name cannot be resolved",
            "look at the address, and at the name service",
            passing=False,
        ),
        "look-up": _node("the name service gives no answer", "look at this machine's name service"),
        "refused": _node("no connection: {}", "look whether the server runs, and at the address"),
        "stalled": _node(
            "no answer in {} s", "look whether the server hangs, or a firewall drops packets"
        ),
        "certificate": _node(
            "its certificate is refused: {}",
            "name in ca_file the authority that issued the server's certificate",
            passing=False,
        ),
        "expired": _node(
            "its certificate is refused: {}",
            "renew the server's certificate, or set this machine's clock",
            passing=False,
        ),
        "clock": _node(
            "its certificate is refused: {}", "set this machine's clock: it is late", passing=False
        ),
        "tls": _node(
            "no TLS: {}", "look at the address, and whether client_cert is asked for", passing=False
        ),
        "https": _node(
            "it speaks https, and the address says http", "write https:// in address", passing=False
        ),
        "broken": _node("the connection broke", "look at the log of the server or its balancer"),
        "oversized": _node("an answer of more than {} bytes", _NO_VAULT, passing=False),
        "json": _node("the server's answer is not JSON", _NO_VAULT, passing=False),
        "sealed": _node(
            "it is sealed or not initialised", "unseal it, with vault or with: bao operator unseal"
        ),
        "redirect": _node(
            "it redirects elsewhere",
            "redirects are never followed: add the leader's address to the config",
        ),
        "limited": _node(
            "it is over its rate limit or behind the leader",
            "the server limits its load; try again later",
        ),
        "standby": _node("it is a standby and knows no leader", "look at the cluster's health"),
        "status": _node("it answered with status {}", "look at the server's log"),
        "page": _node(
            "a proxy answered in place of Vault, with status {}",
            "look whether the server behind the proxy or balancer runs",
        ),
        "stranger": _node(
            "another service than Vault answered with status {}",
            f"a proxy, a gateway or another service is at this address: {_NO_VAULT}",
            passing=False,
        ),
    },
    unknown=_node("it failed in an unknown way", "look at the server's log", passing=False),
    operations={
        ("change", "lost"): _node(
            "the change may have been carried out",
            "look with: keymgmt keys show PROVIDER:KEY",
            passing=False,
        ),
        ("single-use login", "lost"): _node(
            "the login may have used up the secret id",
            "give this machine a new secret id",
            passing=False,
        ),
    },
)


class NodeFailure(Exception):
    """One node gave no usable answer.

    Attributes:
        kind: the fault, a key of NODE_FAULTS.
        sent: whether the node may have carried out the request.
        seconds: how long the node was tried.
        after: seconds that the node asks to wait (RFC 9110, Retry-After).
    """

    seconds = 0.0

    def __init__(
        self, kind: str, detail: object = "", *, sent: bool = True, after: float = 0.0
    ) -> None:
        self.fault: Final = NODE_FAULTS.find(kind)
        self.hint: Final = self.fault.hint
        super().__init__(self.fault.message.format(detail))
        self.kind: Final = kind
        self.sent: Final = sent
        self.after: Final = after


class Refusal(Exception):
    """The service refused; ``words`` are its reasons, without secrets of the request."""

    def __init__(self, status: int, words: Sequence[str]) -> None:
        self.words: Final = "; ".join(words)
        super().__init__(f"status {status}: {self.words}")
        self.status: Final = status
        self.code: Final = _code(status, self.words.lower())


_WORDS: Final = (
    ("no handler for route", "no mount"),
    ("namespace not found", "no namespace"),
    ("key not found", "no key"),
    ("version is too new", "no version"),
    ("too old", "retired"),
    ("disallowed by policy", "retired"),
    ("soft-deleted", "soft-deleted"),
    ("invalid token", "dead token"),
    ("bad token", "dead token"),
    ("missing client token", "dead token"),
    ("non-aead", "other type"),
    ("not supported for key type", "other type"),
    ("does not support", "other type"),
    ("authentication failed", "tampered"),
    ("ciphertext", "tampered"),
    ("decryption error", "tampered"),
    ("not support", "unable"),
    ("context", "unable"),
)


def _code(status: int, words: str) -> str:
    if status in (401, 403) and words == "permission denied":
        # Vault says "permission denied" alone for a token that it does not know. A refusal by a
        # policy is a list: "1 error occurred: * permission denied".
        return "dead token"
    for text, code in _WORDS:
        if text in words:
            return code
    return {401: "denied", 403: "denied", 404: "absent"}.get(status, "unknown")


_NO_MOUNT: Final = Fault(
    ProviderUnavailable,
    "no Transit engine is mounted at {mount}",
    "bao secrets enable -path={mount} transit; or set mount and namespace",
)
_NO_KEY: Final = Fault(
    KeyNotFound, "there is no Transit key {place}", "make it with: keymgmt keys create PROVIDER:KEY"
)
_REFUSALS: Final = FaultTable[str](
    {
        "dead token": Fault(
            AccessDenied,
            "the token has expired, was revoked, or is of another server or namespace",
            "replace it at the source that the config names, or use an auth method that logs in by "
            "itself; if the token is still valid, look at the addresses that it is bound to",
        ),
        "denied": Fault(
            AccessDenied,
            "the policy does not allow {capability} on {path}",
            'if it should, grant it: path "{path}" {{ capabilities = ["{capability}"] }}; where '
            "it is granted, look at allowed_parameters, the mount, the key name and the "
            "namespace: Vault uses the same words for a path that does not exist",
        ),
        "no mount": _NO_MOUNT,
        "absent": _NO_MOUNT,
        "no namespace": Fault(
            ProviderUnavailable, "the server has no namespace {namespace}", "look at namespace"
        ),
        "no key": _NO_KEY,
        "no version": Fault(WrongKey, "the Transit key {place} has no such version"),
        "retired": Fault(
            KeyRetired,
            "that version of the Transit key {place} is retired",
            "rewrap the model where another group opens it, or lower min_decryption_version for a "
            "while",
        ),
        "soft-deleted": Fault(
            KeyRetired,
            "the Transit key {place} is soft-deleted",
            "bao write -f {mount}/keys/{native}/soft-delete-restore",
        ),
        "other type": Fault(UnsupportedOperation, "the Transit key {place} cannot {verb}: {words}"),
        "unable": Fault(UnsupportedOperation, "the Transit key {place} cannot {verb}: {words}"),
    },
    unknown=Fault(ProviderError, "the server refused to {verb} with {place}: {words}"),
    operations={
        ("read", "absent"): _NO_KEY,
        ("decrypt", "no key"): Fault(WrongKey, "there is no Transit key {place}"),
        ("decrypt", "other type"): Fault(
            WrongKey, "the Transit key {place} is of another type than the wrapped key needs"
        ),
        ("decrypt", "tampered"): Fault(
            UnwrapFailed,
            "the wrapped key does not authenticate: another context, a damaged blob, "
            "or another key called {place}",
        ),
    },
)
_CAPABILITY: Final = {"read": "read", "create": "create", "list": "list", "delete": "delete"}


def refused(
    code: str, verb: Verb, native: str, settings: VaultSettings, words: str, path: str
) -> ProviderError:
    """The error for a refusal of ``verb`` on the Transit key ``native``, asked at ``path``."""
    mount = settings.mount
    place = f"{mount}/{native}" if native else mount
    fault = _REFUSALS.find(code, verb)
    fields = {
        "capability": _CAPABILITY.get(verb, "update"),
        "mount": mount,
        "namespace": settings.namespace,
        "native": native,
        "path": path.removeprefix("/v1/"),
        "place": place,
        "verb": verb,
        "words": words or "no reason given",
    }
    return fault.error(
        fault.message.format(**fields), hint=fault.hint and fault.hint.format(**fields)
    )
