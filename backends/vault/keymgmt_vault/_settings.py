"""The ``[providers.NAME]`` table of a Vault provider: where it is, how to log in, which keys.

Addresses come from here and from nowhere else. TLS is required, except on loopback and on sockets
of this machine.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from keymgmt.backend import (
    RSA_OAEP_256,
    ConfigPath,
    KeyName,
    SecretSource,
    Settings,
    is_key,
)

__all__ = [
    "AEAD",
    "INNER",
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
INNER: Final = "rsa-oaep-sha256+inner"
MECHANISMS: Final = (*AEAD, INNER, RSA_OAEP_256)
KINDS: Final[Mapping[str, Literal["wrap", "sign"]]] = {
    **dict.fromkeys(AEAD, "wrap"),
    **dict.fromkeys(RSA, "wrap"),
    "ed25519": "sign",
    "ecdsa-p256": "sign",
    "ecdsa-p384": "sign",
}
"""Transit key types that are of use: what each is for, if the config says nothing else."""

# Each of these becomes part of a URL, in which a client or server may collapse dot segments.
_SEGMENT: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.)){0,126}[A-Za-z0-9_-]|[A-Za-z0-9_]"
_PATH: Final = rf"^(?:{_SEGMENT})(?:/(?:{_SEGMENT})){{0,7}}$"
_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


def _no_slash_at_the_end(value: object) -> object:
    # As `vault secrets list` shows a mount.
    return value.strip("/") if isinstance(value, str) else value


Mount = Annotated[str, BeforeValidator(_no_slash_at_the_end), Field(max_length=256)]
Role = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def is_path(text: str) -> bool:
    """Whether ``text`` may stand in a URL as a mount or namespace: no dots in a row."""
    return bool(re.fullmatch(_PATH, text))


class Address(NamedTuple):
    """One configured address: scheme ``https``, ``http`` (loopback only) or ``unix``.

    ``path`` is what a gateway has before ``/v1``.
    """

    scheme: Literal["https", "http", "unix"]
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address; ValueError says what is wrong with it, ready to be shown."""
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{text[:200]!r} is no address: {error}") from None
        if parts.username is not None or parts.password is not None:
            # Not repeated: what stands before the @ may be a password.
            raise ValueError("an address holds no user name or password; use auth")
        if parts.query or parts.fragment:
            raise ValueError(f"{text[:200]!r} has more than scheme, host, port and path")
        if parts.scheme == "unix":
            if parts.netloc or not parts.path.startswith("/"):
                raise ValueError(f"{text[:200]!r} is no socket: write unix:/path/of/the/socket")
            return cls("unix", parts.path, 0)
        if parts.scheme not in ("https", "http") or not parts.hostname:
            raise ValueError(f"{text[:200]!r} is no address: write https://host:8200")
        path = parts.path.strip("/")
        if path and not is_path(path):
            raise ValueError(f"{text[:200]!r} has a path that is none")
        if path == "v1" or path.endswith("/v1"):
            raise ValueError(f"{text[:200]!r} ends in /v1, which is added: leave it out")
        if parts.scheme == "http" and not _is_loopback(parts.hostname):
            raise ValueError(
                f"{text[:200]!r} is not protected: use https, http is for loopback addresses only"
            )
        secure = parts.scheme == "https"
        return cls(
            "https" if secure else "http",
            parts.hostname,
            port or (443 if secure else 80),
            f"/{path}" if path else "",
        )

    @property
    def netloc(self) -> str:
        """Host and port as HTTP's ``Host`` has them."""
        if self.scheme == "unix":
            return "localhost"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix:{self.host}"
        return f"{self.scheme}://{self.netloc}{self.path}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # What the name resolves to is checked again when it is connected to.
        return host == "localhost"


class TokenAuth(Settings):
    """``{ method = "token", token = SECRET }``: a token that somebody else made.

    It is renewed in time, which costs it a use or two; ``renew = false`` leaves it alone.
    """

    method: Literal["token"]
    token: SecretSource
    renew: bool = True


class SecretId(SecretSource):
    """A secret id: where it is, or ``{ wrapped = SECRET }`` where a token that wraps it is.

    Such a token serves once (Vault's response wrapping), as in Vault's agent.
    """

    wrapped: SecretSource | None = None


class AppRoleAuth(Settings):
    """``{ method = "approle", role_id = SECRET, secret_id = SECRET }``; ``mount`` as enabled.

    ``secret_id = { wrapped = SECRET }`` has it from a token that wraps it and serves once.
    """

    method: Literal["approle"]
    role_id: SecretSource
    secret_id: SecretId | None = None
    mount: Mount = "approle"


class CertAuth(Settings):
    """``{ method = "cert" }``: the client certificate of the provider; ``role`` narrows it."""

    method: Literal["cert"]
    role: Role | None = None
    mount: Mount = "cert"


class JwtAuth(Settings):
    """``{ method = "jwt", role = "NAME", jwt = SECRET }``; for OIDC's mount, ``mount = "oidc"``.

    A file that others can read is taken too: that is how pods have it, as for ``kubernetes``.
    """

    method: Literal["jwt"]
    role: Role
    jwt: SecretSource
    mount: Mount = "jwt"


class KubernetesAuth(Settings):
    """``{ method = "kubernetes", role = "NAME" }``: the service account of this pod.

    ``token_file`` is written by the kubelet, with the mode that the pod asked for (0440 or 0644,
    in a folder of this pod alone); it is refused only where others can write it. It is read anew
    for each login because it is replaced while the pod runs.
    """

    method: Literal["kubernetes"]
    role: Role
    token_file: ConfigPath = _SERVICE_ACCOUNT
    mount: Mount = "kubernetes"


class AgentAuth(Settings):
    """A Vault agent (or proxy) logs in for us.

    ``{ method = "agent", sink = { file = "PATH" } }`` reads the token that its sink writes.
    ``{ method = "agent" }`` sends no token: the address is the agent's own listener on this
    machine, which adds it (``use_auto_auth_token``).
    """

    method: Literal["agent"]
    sink: SecretSource | None = None


Auth = Annotated[
    TokenAuth | AppRoleAuth | CertAuth | JwtAuth | KubernetesAuth | AgentAuth,
    Field(discriminator="method"),
]


class KeyEntry(Settings):
    """What one key is called in Transit, and how it may have been wrapped.

    Attributes:
        name: the native name, where it is not the key's own.
        purpose: what an RSA key is for, which Transit does not know; ``wrap`` if not said.
        mechanisms: the only mechanisms that unwrap; all that this backend knows, if empty.
    """

    name: str | None = None
    purpose: Literal["wrap", "sign"] | None = None
    mechanisms: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _known(self) -> KeyEntry:
        if self.name is not None and not re.fullmatch(_SEGMENT, self.name):
            raise ValueError(f"name {self.name[:80]!r} is none that Transit has")
        for mechanism in self.mechanisms:
            if mechanism not in MECHANISMS:
                raise ValueError(f"no mechanism {mechanism!r}; known: {', '.join(MECHANISMS)}")
        return self


class VaultSettings(Settings):
    """Settings of the backend ``vault``.

    Attributes:
        address: one address, or the list of all nodes of a cluster.
        auth: how to log in.
        ca_file: PEM of the authorities that may vouch for the server; without it, the public ones
            of ``certifi``.
        client_cert: PEM of our certificate (and its chain), where the server asks for one.
        client_key: PEM of its private key, a private file.
        client_key_password: of that key.
        server_name: what the server's certificate must be for, if not the host of the address.
        namespace: of Vault Enterprise or OpenBao.
        mount: where the Transit engine is mounted.
        timeout: seconds for a whole operation, with its retries and logins.
        call_timeout: seconds for one call to one node.
        keys: key -> native name and mechanisms, for keys that are called otherwise in Transit.
        keys_prefix: how the names of our keys begin; all others are other machines', and cost no
            request.
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
                    f"{label} {path[:80]!r} is no path: letters, digits, '_', '-', '/'"
                )
        if (self.client_cert is None) != (self.client_key is None):
            raise ValueError("client_cert and client_key go together")
        if isinstance(self.auth, CertAuth) and self.client_cert is None:
            raise ValueError("auth by certificate needs client_cert and client_key")
        if isinstance(self.auth, AgentAuth) and self.auth.sink is None:
            for address in addresses:
                if address.scheme == "https" and not _is_loopback(address.host):
                    raise ValueError(f"{address} is no agent of this machine; name its sink")
        if self.keys_prefix is not None and not is_key(f"{self.keys_prefix}0"):
            raise ValueError(f"keys_prefix {self.keys_prefix!r} begins no key name")
        return self

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The configured addresses in their order."""
        texts = [self.address] if isinstance(self.address, str) else self.address
        return tuple(Address.parse(text) for text in texts)

    def native(self, key: str) -> str:
        """What ``key`` is called in Transit; ``key`` has matched its grammar."""
        entry = self.keys.get(key)
        return entry.name if entry and entry.name else key

    def ours(self, native: str) -> str | None:
        """The key that is called ``native`` in Transit, or None where no key can be."""
        for key, entry in self.keys.items():
            if entry.name == native:
                return key
        # A key that the table calls otherwise is not reached by its own name.
        shadowed = native in self.keys and self.keys[native].name not in (None, native)
        return native if is_key(native) and not shadowed else None

    def may_hold(self, key: str) -> bool:
        """Whether ``key`` may be one of ours, by ``keys_prefix``."""
        return key.startswith(self.keys_prefix or "")

    def allows(self, key: str, mechanism: str) -> bool:
        """Whether a blob of ``mechanism`` may be unwrapped with ``key``."""
        entry = self.keys.get(key)
        return mechanism in (entry.mechanisms if entry and entry.mechanisms else MECHANISMS)
