"""``[remote]``: how sealed models are read from web servers, buckets and registries."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from keymgmt._providers.contract import Settings
from keymgmt._providers.secret_source import ConfigPath, SecretSource
from keymgmt._system.address import is_loopback
from keymgmt._system.kept import Kept

__all__ = ["Access", "Remote"]

_ORIGIN: Final = re.compile(r"(https?|s3|gs|az|oci)://[^/?#@\s]+")
_WEB: Final = re.compile(r"https?://[^/?#@\s]+")


class Access(Settings):
    """``[remote.access."s3://BUCKET"]``: the login at one web server, bucket or registry.

    The login is sent to that host alone, and never to a host to which it redirects.

    Attributes:
        auth: ``environment`` takes the login of a bucket, and proxies, from the environment or the
            machine's own identity, as the tools of that cloud do; ``docker`` takes the login of a
            registry from ``docker_config``.
        user: user name; for S3 the id of the access key, for Azure the account.
        secret: password; for S3 the secret access key, for Azure the account's key, for
            Google the JSON of a service account's key.
        token: a bearer token; for S3 the session token.
        endpoint: address of a server with the protocol of S3 or Azure.
        region: of an S3 bucket.
        token_server: host, with its port, from which a registry may demand a token, such as
            ``auth.docker.io``; by default only the registry itself.
        docker_config: the file that ``docker login`` writes, by default
            ``~/.docker/config.json``. A credential helper that it names is run.
        ca_file: certificates (PEM) that the server's must come from; else those of the system.
        proxy: address of a proxy, ``http://HOST:PORT``.
        plain_http: the registry is on this machine and has no TLS.
    """

    secret_variables: ClassVar[frozenset[str]] = frozenset(
        {"AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY"}
    )

    auth: Literal["config", "environment", "docker"] = "config"
    user: str | None = None
    secret: SecretSource | None = None
    token: SecretSource | None = None
    endpoint: str | None = None
    region: str = "us-east-1"
    token_server: str | None = None
    docker_config: ConfigPath | None = None
    ca_file: ConfigPath | None = None
    proxy: str | None = None
    plain_http: bool = False

    @field_validator("endpoint", "proxy")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not _WEB.fullmatch(value):
            raise ValueError("write https://HOST:PORT, without a path and a login")
        return value

    @model_validator(mode="after")
    def _one_way_in(self) -> Access:
        if self.auth != "config" and (self.user or self.secret or self.token):
            raise ValueError(f'the login is here, or elsewhere (auth = "{self.auth}"): not both')
        return self


class Remote(Settings):
    """``[remote]``: sealed models on a web server, in a bucket or in a registry.

    Attributes:
        timeout: seconds without a byte, after which a request is made again.
        deadline: seconds for which one model may keep us waiting, in all of its requests together.
            Each MiB that arrives or is sent gives four seconds back.
        cache: folder that keeps parts of payloads, as ciphertext; private to this user. By default
            no parts are kept.
        cache_limit: size of the cache in bytes; the least recently used parts are removed first.
        ca_file: certificates (PEM) that each server's must come from; else those of the system.
        proxy: address of a proxy for all servers, ``http://HOST:PORT``; not used for plain HTTP,
            which is for this machine alone.
        access: the logins, by host or bucket: ``"https://HOST"``, ``"s3://BUCKET"``,
            ``"oci://HOST"``.
    """

    timeout: Annotated[float, Field(gt=0, le=3600, strict=False)] = 30.0
    deadline: Annotated[float, Field(gt=0, le=86400, strict=False)] = 300.0
    cache: ConfigPath | None = None
    cache_limit: Annotated[int, Field(ge=1 << 26)] = 10_000_000_000
    ca_file: ConfigPath | None = None
    proxy: str | None = None
    access: dict[str, Access] = Field(default_factory=dict)
    _kept: Kept = PrivateAttr(default_factory=Kept)

    @property
    def kept(self) -> Kept:
        """What the readers of these settings share, such as connections."""
        return self._kept

    @field_validator("proxy")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not _WEB.fullmatch(value):
            raise ValueError("write http://HOST:PORT, without a path and a login")
        return value

    @field_validator("access")
    @classmethod
    def _origins(cls, value: dict[str, Access]) -> dict[str, Access]:
        for origin, access in value.items():
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f'{origin[:80]!r}: write "https://HOST", "s3://BUCKET" or alike')
            if access.auth == "docker" and not origin.startswith("oci://"):
                raise ValueError(f'{origin}: auth = "docker" is for registries')
            kind, _, host = origin.partition("://")
            if access.plain_http and not (kind == "oci" and is_loopback(host)):
                raise ValueError(f"{origin}: plain_http is for a registry on this machine")
            if kind == "oci" and (access.user is None) != (access.secret is None):
                raise ValueError(f"{origin}: a login is both user and secret")
        return value

    def access_to(self, origin: str) -> Access:
        """The login at an origin, with the proxy and the certificates that are set for all."""
        access = self.access.get(origin, Access())
        missing = {
            name: getattr(self, name)
            for name in ("ca_file", "proxy")
            if getattr(access, name) is None
        }
        return access.model_copy(update=missing)
