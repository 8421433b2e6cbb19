"""The ``[providers.NAME]`` table of an AWS KMS provider: its region, login and keys.

Region, keys and endpoints come from this table only, and not from the environment or ``~/.aws``.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Final, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from keymgmt.backend import (
    RSA_OAEP_256,
    ConfigPath,
    KeyName,
    SecretSource,
    Settings,
    is_key,
    split_address,
)

__all__ = ["CONTEXT", "MECHANISMS", "SYMMETRIC", "Auth", "AwsSettings", "key_id"]

SYMMETRIC: Final = "SYMMETRIC_DEFAULT"
MECHANISMS: Final = (SYMMETRIC, RSA_OAEP_256)
CONTEXT: Final = "keymgmt-context"
"""The name in the encryption context of AWS under which keymgmt's context stands, as SHA-256."""

_ALIAS: Final = r"alias/[A-Za-z0-9_-][A-Za-z0-9/_-]{0,249}"
_KEY_ID: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,126}[A-Za-z0-9])?"
_ARN: Final = re.compile(
    rf"arn:aws[a-z-]{{0,16}}:kms:([a-z0-9-]{{1,32}}):[0-9]{{12}}:(?:key/{_KEY_ID}|{_ALIAS})"
)
# The environment variables in which AWS tools find credentials, or the place of credentials.
_VARIABLES: Final = frozenset(
    f"AWS_{name}"
    for name in (
        *("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "SECURITY_TOKEN"),
        *("WEB_IDENTITY_TOKEN_FILE", "CONTAINER_AUTHORIZATION_TOKEN"),
        *("CONTAINER_AUTHORIZATION_TOKEN_FILE", "CONTAINER_CREDENTIALS_FULL_URI"),
        "CONTAINER_CREDENTIALS_RELATIVE_URI",
    )
)


def key_id(arn: str) -> str | None:
    """The id of the KMS key that an ARN names; None for an alias and for other text."""
    match = _ARN.fullmatch(arn)
    return arn.rpartition(":key/")[2] if match and ":key/" in arn else None


def _key_reference(text: str) -> str:
    if not _ARN.fullmatch(text) and not re.fullmatch(_ALIAS, text):
        raise ValueError(f"{text[:200]!r} is neither an ARN of AWS KMS nor alias/NAME")
    return text


def _endpoint(text: str, *others: str) -> str:
    """An endpoint without a slash at its end; ``others`` are hosts for which http is allowed."""
    parts = split_address(text, "an endpoint holds no user name or password; use auth", others)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ValueError(f"{text[:200]!r} is not an endpoint: write https://host")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"{text[:200]!r} has more than scheme, host and port")
    return text.rstrip("/")


def _metadata_endpoint(text: str) -> str:
    return _endpoint(text, "169.254.169.254", "fd00:ec2::254")


def _not_asked_for(source: SecretSource) -> SecretSource:
    if source.prompt is not None:
        # A call that ran out of time would leave the question on the terminal.
        raise ValueError(
            "a prompt is not possible within a call's time limit: name a file, a credential, "
            "an environment variable or an entry of the keyring"
        )
    return source


StoredSecret = Annotated[SecretSource, AfterValidator(_not_asked_for)]
Endpoint = Annotated[str, AfterValidator(_endpoint)]
RoleArn = Annotated[
    str, StringConstraints(pattern=r"^arn:aws[a-z-]{0,16}:iam::[0-9]{12}:role/\S+$")
]
SessionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_+=,.@-]{2,64}$")]


class StaticAuth(Settings):
    """``{ method = "static", access_key_id = SECRET, secret_access_key = SECRET }``.

    ``session_token = SECRET`` for temporary credentials. They are read again when AWS says that
    they have expired, so another program may replace them while a process runs.
    """

    method: Literal["static"]
    access_key_id: StoredSecret
    secret_access_key: StoredSecret
    session_token: StoredSecret | None = None


class ProfileAuth(Settings):
    """``{ method = "profile", profile = "NAME" }``: a profile of the AWS command line.

    ``config_file`` and ``credentials_file`` are by default those of ``~/.aws``. The profile may
    name another profile, a role, a login by SSO, or a program to run. The address of AWS STS and
    the way to it are still those of these settings.
    """

    # A profile may name the environment as the source of its credentials.
    secret_variables: ClassVar = _VARIABLES

    method: Literal["profile"]
    profile: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    config_file: ConfigPath | None = None
    credentials_file: ConfigPath | None = None


class WebIdentityAuth(Settings):
    """``{ method = "web-identity", role_arn = "ARN", token_file = "PATH" }``: an OIDC token.

    For a Kubernetes pod. The token is replaced while the pod runs, so it is read again for each
    login; the file is refused only if others can write it.
    """

    method: Literal["web-identity"]
    role_arn: RoleArn
    token_file: ConfigPath
    session_name: SessionName = "keymgmt"


class InstanceAuth(Settings):
    """``{ method = "instance" }``: the role of this EC2 instance, by IMDSv2 only.

    ``endpoint``: the metadata service, if it is not at 169.254.169.254.
    """

    method: Literal["instance"]
    endpoint: Annotated[str, AfterValidator(_metadata_endpoint)] = "http://169.254.169.254"


class ContainerAuth(Settings):
    """``{ method = "container" }``: the role of this pod, by the EKS Pod Identity agent.

    In ECS the address is a secret of the task, which only the environment has:
    ``uri = { env = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI" }``. ``token_file`` holds the
    authorization token, if the service requires one.
    """

    method: Literal["container"]
    uri: StoredSecret | None = None
    token_file: ConfigPath | None = None


class EnvironmentAuth(Settings):
    """``{ method = "environment" }``: the credentials that the AWS tools would find, in order.

    That is variables, ``~/.aws``, container, instance. Only with this method does the environment
    decide which identity this process has, and where a role is assumed. The keys and their address
    are still those of the config.
    """

    secret_variables: ClassVar = _VARIABLES

    method: Literal["environment"]


_Source = (
    StaticAuth | ProfileAuth | WebIdentityAuth | InstanceAuth | ContainerAuth | EnvironmentAuth
)


class RoleAuth(Settings):
    """``{ method = "role", role_arn = "ARN", source = AUTH }``: a role that another login assumes.

    ``external_id`` is the external id that the role's owner requires (it is not a secret);
    CloudTrail shows ``session_name``.
    """

    method: Literal["role"]
    role_arn: RoleArn
    source: Annotated[_Source, Field(discriminator="method")]
    external_id: Annotated[str, StringConstraints(min_length=2, max_length=1224)] | None = None
    session_name: SessionName = "keymgmt"


Auth = Annotated[_Source | RoleAuth, Field(discriminator="method")]


class KeyEntry(Settings):
    """The ARN or alias of one key, and the mechanisms by which it may unwrap.

    Attributes:
        arn: the ARN of a key or an alias, or ``alias/NAME`` of this account; a multi-Region key's
            replica by its ARN in this region.
        mechanisms: the only mechanisms that unwrap; all that this backend knows, if empty.
    """

    arn: Annotated[str, AfterValidator(_key_reference)]
    mechanisms: list[Literal["SYMMETRIC_DEFAULT", "RSA-OAEP-256"]] = Field(default_factory=list)


class AwsSettings(Settings):
    """Settings of the backend ``aws``.

    Attributes:
        region: the region of the keys, such as ``eu-central-1``.
        auth: how to log in.
        keys: key -> its ARN or alias, and mechanisms.
        alias_prefix: a key that is not in ``keys`` has the alias ``alias/PREFIXKEY``, with a slash
            for each dot of its name; ``keys create`` and ``keys list`` use these aliases.
        context: further pairs in the encryption context of symmetric keys, for conditions in
            policies; a wrap with other pairs does not open.
        endpoint: the endpoint of AWS KMS, if not the region's public endpoint (a private link).
        sts_endpoint: the endpoint of AWS STS, likewise.
        ca_file: PEM of the authorities that may issue the certificate of an endpoint; without it,
            the public authorities of botocore.
        timeout: seconds for a whole operation, with its retries and logins.
        call_timeout: seconds for one connection, and for one answer.
    """

    region: Annotated[
        str, StringConstraints(pattern=r"^[a-z]{2,8}(?:-[a-z]{1,16}){1,3}-[0-9]{1,2}$")
    ]
    auth: Auth
    keys: dict[KeyName, KeyEntry] = Field(default_factory=dict)
    alias_prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_/-]{1,120}$")] = "keymgmt/"
    context: Annotated[dict[str, str], Field(max_length=8)] = Field(default_factory=dict)
    endpoint: Endpoint | None = None
    sts_endpoint: Endpoint | None = None
    ca_file: ConfigPath | None = None
    timeout: Annotated[float, Field(gt=0, le=600)] = 10.0
    call_timeout: Annotated[float, Field(gt=0, le=60)] = 3.0

    @model_validator(mode="after")
    def _fits_together(self) -> AwsSettings:
        for key, entry in self.keys.items():
            match = _ARN.fullmatch(entry.arn)
            if match and match[1] != self.region:
                raise ValueError(
                    f"keys: {key} is in {match[1]}, and region is {self.region!r}; for a "
                    "multi-Region key write the ARN of its replica in that region"
                )
        if self.alias_prefix.startswith("aws/"):
            raise ValueError("alias_prefix: aliases under aws/ belong to keys that AWS manages")
        for name, value in self.context.items():
            if name == CONTEXT or name.startswith("aws:") or not 1 <= len(name) <= 128:
                raise ValueError(f"context: {name[:80]!r} is not a possible name of a pair")
            if not 1 <= len(value) <= 512 or not (name + value).isprintable():
                raise ValueError(f"context: {name} must have 1 to 512 printable characters")
        return self

    def native(self, key: str) -> str:
        """The ARN or alias of ``key``, which has matched its grammar."""
        entry = self.keys.get(key)
        return entry.arn if entry else f"alias/{self.alias_prefix}{key.replace('.', '/')}"

    def ours(self, alias: str) -> str | None:
        """The key that has this alias by its prefix, or None where no key can have it."""
        start = f"alias/{self.alias_prefix}"
        key = alias.removeprefix(start).replace("/", ".")
        # If the table gives a key another ARN or alias, its key name reaches no other key.
        return key if alias.startswith(start) and is_key(key) and key not in self.keys else None

    def allowed(self, key: str) -> tuple[str, ...]:
        """The mechanisms whose blobs may be unwrapped with ``key``."""
        entry = self.keys.get(key)
        return tuple(entry.mechanisms) if entry and entry.mechanisms else MECHANISMS
