"""The ``[providers.NAME]`` table of a Vault provider: its addresses, login and keys.

Addresses come from this table only. TLS is required, except on loopback and on Unix sockets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from keymgmt.backend import (
    RSA_OAEP_256,
    ConfigPath,
    KeyName,
    SecretSource,
    Settings,
    is_key,
    is_loopback,
    split_address,
)

__all__ = [
    "AEAD",
    "KINDS",
    "MECHANISMS",
    "RSA",
    "Address",
    "AgentAuth",
    "AppRoleAuth",
    "Auth",
    "CertAuth",
    "JwtAuth",
    "KubernetesAuth",
    "SecretId",
    "TokenAuth",
    "VaultSettings",
]

AEAD: Final = ("aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305")
RSA: Final = ("rsa-2048", "rsa-3072", "rsa-4096")
MECHANISMS: Final = (*AEAD, RSA_OAEP_256)
KINDS: Final[Mapping[str, Literal["wrap", "sign"]]] = {
    **dict.fromkeys(AEAD, "wrap"),
    **dict.fromkeys(RSA, "wrap"),
    "ed25519": "sign",
    "ecdsa-p256": "sign",
    "ecdsa-p384": "sign",
}
"""The Transit key types that keymgmt uses, and the purpose of each, which the config may change."""

# A segment becomes part of a URL, where a client or server may collapse ``..``: so no two dots.
_SEGMENT: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.)){0,126}[A-Za-z0-9_-]|[A-Za-z0-9_]"
_PATH: Final = rf"^(?:{_SEGMENT})(?:/(?:{_SEGMENT})){{0,7}}$"
_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def _no_slash_at_the_end(value: object) -> object:
    # `vault secrets list` shows a mount as "transit/".
    return value.strip("/") if isinstance(value, str) else value


Mount = Annotated[str, BeforeValidator(_no_slash_at_the_end), Field(max_length=256)]
Role = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def is_path(text: str) -> bool:
    """Whether ``text`` may stand in a URL as a mount or namespace: no dots in a row."""
    return bool(re.fullmatch(_PATH, text))


class Address(NamedTuple):
    """One configured address: scheme ``https``, ``http`` (loopback only) or ``unix``.

    ``path`` is the prefix of a gateway before ``/v1``.
    """

    scheme: Literal["https", "http", "unix"]
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address; the message of the ValueError is ready to be shown."""
        parts = split_address(text, "an address holds no user name or password; use auth")
        if parts.query or parts.fragment:
            raise ValueError(f"{text[:200]!r} has more than scheme, host, port and path")
        if parts.scheme == "unix":
            if parts.netloc or not parts.path.startswith("/"):
                raise ValueError(f"{text[:200]!r} is not a socket: write unix:/path/of/the/socket")
            return cls("unix", parts.path, 0)
        if parts.scheme not in ("https", "http") or not parts.hostname:
            raise ValueError(f"{text[:200]!r} is not an address: write https://host:8200")
        path = parts.path.strip("/")
        if path and not is_path(path):
            raise ValueError(f"{text[:200]!r} has a path with other than letters, digits, _ - / .")
        if path == "v1" or path.endswith("/v1"):
            raise ValueError(f"{text[:200]!r} ends in /v1, which keymgmt adds: leave it out")
        secure = parts.scheme == "https"
        return cls(
            "https" if secure else "http",
            parts.hostname,
            parts.port or (443 if secure else 80),
            f"/{path}" if path else "",
        )

    @property
    def netloc(self) -> str:
        """Host and port in the form of HTTP's ``Host`` header."""
        if self.scheme == "unix":
            return "localhost"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix:{self.host}"
        return f"{self.scheme}://{self.netloc}{self.path}"


class TokenAuth(Settings):
    """``{ method = "token", token = SECRET }``: a token that was issued outside of keymgmt.

    It is renewed before it ends, which costs it a use or two; ``renew = false`` does not renew it.
    """

    method: Literal["token"]
    token: SecretSource
    renew: bool = True


class SecretId(SecretSource):
    """The source of a secret id, or ``{ wrapped = SECRET }``, that of a token that wraps it.

    Such a token can be used once (Vault's response wrapping), as in Vault's agent.
    """

    wrapped: SecretSource | None = None


class AppRoleAuth(Settings):
    """``{ method = "approle", role_id = SECRET, secret_id = SECRET }``; ``mount`` as enabled.

    ``secret_id = { wrapped = SECRET }`` gets it from a wrapping token, which can be used once.
    """

    method: Literal["approle"]
    role_id: SecretSource
    secret_id: SecretId | None = None
    mount: Mount = "approle"


class CertAuth(Settings):
    """``{ method = "cert" }``: by ``client_cert`` and ``client_key``; ``role`` picks one role."""

    method: Literal["cert"]
    role: Role | None = None
    mount: Mount = "cert"


class JwtAuth(Settings):
    """``{ method = "jwt", role = "NAME", jwt = SECRET }``; for OIDC's mount, ``mount = "oidc"``.

    Other users may read a file with it, since a pod's volume has that mode, as for ``kubernetes``.
    """

    method: Literal["jwt"]
    role: Role
    jwt: SecretSource
    mount: Mount = "jwt"


class KubernetesAuth(Settings):
    """``{ method = "kubernetes", role = "NAME" }``: the service account of this pod.

    The kubelet writes ``token_file`` with the mode that the pod asked for (0440 or 0644, in a
    folder of this pod alone), so it is refused only if others can write it. The kubelet replaces it
    while the pod runs, so it is read again for each login.
    """

    method: Literal["kubernetes"]
    role: Role
    token_file: ConfigPath = _SERVICE_ACCOUNT
    mount: Mount = "kubernetes"


class AgentAuth(Settings):
    """A Vault agent (or proxy) on this machine logs in.

    ``{ method = "agent", sink = { file = "PATH" } }`` reads the token that its sink writes.
    ``{ method = "agent" }`` sends no token: the address is the agent's own listener on this
    machine, which adds its token (``use_auto_auth_token``).
    """

    method: Literal["agent"]
    sink: SecretSource | None = None


Auth = Annotated[
    TokenAuth | AppRoleAuth | CertAuth | JwtAuth | KubernetesAuth | AgentAuth,
    Field(discriminator="method"),
]


class KeyEntry(Settings):
    """The name of one key in Transit, and the mechanisms by which it may unwrap.

    Attributes:
        name: the name in Transit, where it is not the key name.
        purpose: what an RSA key is for, which Transit does not know; ``wrap`` if left out.
        mechanisms: the only mechanisms that unwrap; all that this backend knows, if empty.
    """

    name: str | None = None
    purpose: Literal["wrap", "sign"] | None = None
    mechanisms: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _known(self) -> KeyEntry:
        if self.name is not None and not re.fullmatch(_SEGMENT, self.name):
            raise ValueError(f"name {self.name[:80]!r} is not a possible name in Transit")
        for mechanism in self.mechanisms:
            if mechanism not in MECHANISMS:
                raise ValueError(f"no mechanism {mechanism!r}; known: {', '.join(MECHANISMS)}")
        return self


class VaultSettings(Settings):
    """Settings of the backend ``vault``.

    Attributes:
        address: one address, or the list of all nodes of a cluster.
        auth: how to log in.
        ca_file: PEM of the authorities that may issue the server's certificate; without it, the
            public authorities of ``certifi``.
        client_cert: PEM of the client certificate (and its chain), where the server requires one.
        client_key: PEM of its private key, in a private file.
        client_key_password: the password of that private key.
        server_name: the name that the server's certificate must have, if not the host of the
            address.
        namespace: the namespace in Vault Enterprise or OpenBao.
        mount: where the Transit engine is mounted.
        timeout: seconds for a whole operation, with its retries and logins.
        call_timeout: seconds for one call to one node.
        keys: key -> name in Transit and mechanisms, for keys with another name in Transit.
        keys_prefix: how the names of this provider's keys begin; no request is made for any other
            key.
    """

    address: str | list[str]
    auth: Auth
    ca_file: ConfigPath | None = None
    client_cert: ConfigPath | None = None
    client_key: ConfigPath | None = None
    client_key_password: SecretSource | None = None
    server_name: str | None = None
    namespace: Mount | None = None
    mount: Mount = "transit"
    timeout: Annotated[float, Field(gt=0, le=600)] = 10.0
    call_timeout: Annotated[float, Field(gt=0, le=60)] = 3.0
    keys: dict[KeyName, KeyEntry] = Field(default_factory=dict)
    keys_prefix: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> VaultSettings:
        addresses = self.addresses
        if not 1 <= len(addresses) <= 16:
            raise ValueError("address names 1 to 16 nodes")
        if len(set(addresses)) != len(addresses):
            raise ValueError("address names the same node twice")
        for label, path in (
            ("mount", self.mount),
            ("namespace", self.namespace),
            ("auth mount", getattr(self.auth, "mount", None)),
        ):
            if path is not None and not is_path(path):
                raise ValueError(
                    f"{label} {path[:80]!r} is not a path: letters, digits, '_', '-', '/'"
                )
        if (self.client_cert is None) != (self.client_key is None):
            raise ValueError("client_cert and client_key go together")
        if isinstance(self.auth, CertAuth) and self.client_cert is None:
            raise ValueError("auth by certificate needs client_cert and client_key")
        if isinstance(self.auth, AgentAuth) and self.auth.sink is None:
            for address in addresses:
                if address.scheme == "https" and not is_loopback(address.host):
                    raise ValueError(f"{address} is not an agent of this machine; name its sink")
        if self.keys_prefix is not None and not is_key(f"{self.keys_prefix}0"):
            raise ValueError(f"no key name can begin with keys_prefix {self.keys_prefix!r}")
        return self

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The configured addresses in their order."""
        texts = [self.address] if isinstance(self.address, str) else self.address
        return tuple(Address.parse(text) for text in texts)

    def native(self, key: str) -> str:
        """The name of ``key`` in Transit; ``key`` has matched its grammar."""
        entry = self.keys.get(key)
        return entry.name if entry and entry.name else key

    def ours(self, native: str) -> str | None:
        """The key whose name in Transit is ``native``, or None where no key can have it."""
        for key, entry in self.keys.items():
            if entry.name == native:
                return key
        # If the table gives a key another name in Transit, its key name reaches no other key there.
        shadowed = native in self.keys and self.keys[native].name not in (None, native)
        return native if is_key(native) and not shadowed else None

    def may_hold(self, key: str) -> bool:
        """Whether ``key`` may be a key of this provider, by ``keys_prefix``."""
        return key.startswith(self.keys_prefix or "")

    def allowed(self, key: str) -> tuple[str, ...]:
        """The mechanisms whose blobs may be unwrapped with ``key``."""
        entry = self.keys.get(key)
        return tuple(entry.mechanisms) if entry and entry.mechanisms else MECHANISMS
