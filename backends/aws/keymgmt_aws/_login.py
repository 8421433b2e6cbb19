"""Logging in: botocore's credentials for each method, and from no source that it does not name.

A call that finds temporary credentials near their end gets new ones, within its time limit. Files
and other secret sources are read at each login, and not kept.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import ProviderUnavailable, check_trusted, expand_home, read_projected
from keymgmt_aws._settings import (
    Auth,
    ContainerAuth,
    EnvironmentAuth,
    InstanceAuth,
    ProfileAuth,
    RoleAuth,
    StaticAuth,
    WebIdentityAuth,
)
from keymgmt_aws._transport import Client, http_session, new_session

if TYPE_CHECKING:
    from keymgmt_aws._settings import AwsSettings

__all__ = ["log_in"]

_POD_AGENT: Final = "http://169.254.170.23/v1/credentials"
_POD_TOKEN: Final = Path(
    "/var/run/secrets/pods.eks.amazonaws.com/serviceaccount/eks-pod-identity-token"
)
# Sources by which botocore would complete a profile that has no credentials.
_BEYOND_THE_PROFILE: Final = ("ec2-credentials-file", "boto-config", "container-role", "iam-role")


def log_in(auth: Auth, settings: AwsSettings) -> Any:
    """The credentials of ``auth``; expiring credentials are renewed when a request is signed.

    Raises:
        ProviderUnavailable: a file, secret, profile or variable is missing.
        Exception: any error of botocore for a login that happens now; a later login raises it when
            the credentials are used.
    """
    from botocore.credentials import Credentials, DeferredRefreshableCredentials

    if isinstance(auth, StaticAuth):
        token = auth.session_token.read_text() if auth.session_token else None
        secret = auth.secret_access_key.read_text()
        return Credentials(auth.access_key_id.read_text(), secret, token)
    if isinstance(auth, ProfileAuth | EnvironmentAuth):
        return _by_botocore(auth, settings)
    source = log_in(auth.source, settings) if isinstance(auth, RoleAuth) else None

    def renew() -> dict[str, str]:
        if isinstance(auth, InstanceAuth):
            return _of_instance(auth, settings)
        if isinstance(auth, ContainerAuth):
            return _of_container(auth, settings)
        return _assumed(auth, settings, source)

    return DeferredRefreshableCredentials(renew, auth.method)


def _by_botocore(auth: ProfileAuth | EnvironmentAuth, settings: AwsSettings) -> Any:
    """The credentials that botocore finds: by a profile, or in the environment."""
    from botocore.credentials import create_credential_resolver
    from botocore.session import Session

    if isinstance(auth, EnvironmentAuth):
        credentials, label = Session().get_credentials(), "the environment"
        hint = "name a method in auth"
    else:
        files = {
            "config_file": auth.config_file or expand_home("~/.aws/config", ProviderUnavailable),
            "credentials_file": auth.credentials_file
            or expand_home("~/.aws/credentials", ProviderUnavailable),
        }
        for name, file in files.items():
            if file.exists():
                # A profile may name a program that is run, so others must not write these files.
                private = name == "credentials_file"
                check_trusted(file, label=name, private=private, error=ProviderUnavailable)
        variables = {name: str(file) for name, file in files.items()}
        http = http_session(settings)
        variables |= {"profile": auth.profile, "region": settings.region}
        session = new_session(settings, lambda request, **_: http.send(request), **variables)
        resolver = create_credential_resolver(session, region_name=settings.region)
        for name in _BEYOND_THE_PROFILE:
            resolver.remove(name)
        _bound_programs(resolver, session, settings.timeout)
        credentials, label = resolver.load_credentials(), f"the profile {auth.profile!r}"
        hint = "look at " + " and ".join(map(str, files.values()))
    if credentials is None:
        raise ProviderUnavailable(f"{label} has no AWS credentials", hint=hint)
    return credentials


def _bound_programs(resolver: Any, session: Any, seconds: float) -> None:
    """End a program of a profile, or of a profile that it is based on, after ``seconds``."""
    from botocore.credentials import ProcessProvider

    class Program(subprocess.Popen[bytes]):
        def communicate(self, *_: object, **__: object) -> tuple[bytes, bytes]:
            try:
                return super().communicate(timeout=seconds)
            finally:
                self.kill()
                self.wait()

    resolver.get_provider("custom-process")._popen = Program
    builder = resolver.get_provider("assume-role")._profile_provider_builder
    builder._create_process_provider = lambda profile_name: ProcessProvider(
        profile_name, lambda: session.full_config, popen=Program
    )


def _assumed(
    auth: RoleAuth | WebIdentityAuth, settings: AwsSettings, source: Any
) -> dict[str, str]:
    request = {"RoleArn": auth.role_arn, "RoleSessionName": auth.session_name}
    operation = "assume_role"
    if isinstance(auth, WebIdentityAuth):
        operation = "assume_role_with_web_identity"
        request["WebIdentityToken"] = read_projected(auth.token_file, "token")
    elif auth.external_id is not None:
        request["ExternalId"] = auth.external_id
    with contextlib.closing(Client("sts", settings, source)) as sts:
        return _temporary(sts(operation, **request).get("Credentials"), "SessionToken")


def _of_instance(auth: InstanceAuth, settings: AwsSettings) -> dict[str, str]:
    from botocore.awsrequest import AWSRequest

    http, header = http_session(settings), "x-aws-ec2-metadata-token"
    roles = "meta-data/iam/security-credentials/"

    def ask(method: str, path: str, headers: dict[str, str]) -> str:
        request = AWSRequest(method, f"{auth.endpoint}/latest/{path}", headers)
        answer = http.send(request.prepare())
        if answer.status_code != 200:
            raise ConnectionError
        return str(answer.text)

    def fetch() -> Any:
        token = {header: ask("PUT", "api/token", {f"{header}-ttl-seconds": "300"})}
        role = ask("GET", roles, token).split("\n")[0]
        credentials = json.loads(ask("GET", roles + role, token))
        # In an outage EC2 returns credentials that have expired, and AWS accepts them (its "static
        # stability"). They are used, and asked for again after 20 minutes.
        soon = f"{datetime.now(UTC) + timedelta(minutes=20):%Y-%m-%dT%H:%M:%SZ}"
        return credentials | {"Expiration": max(credentials["Expiration"], soon)}

    label = f"the IMDSv2 service at {auth.endpoint}"
    return _from_service(
        fetch, label, "is this an EC2 instance with a role, and can this process reach the service?"
    )


def _of_container(auth: ContainerAuth, settings: AwsSettings) -> dict[str, str]:
    from botocore.utils import ContainerMetadataFetcher

    fetcher = ContainerMetadataFetcher(http_session(settings))
    uri = auth.uri.read_text() if auth.uri else _POD_AGENT
    file = auth.token_file or (None if auth.uri else _POD_TOKEN)
    headers = {"Authorization": read_projected(file, "token")} if file else {}

    def fetch() -> Any:
        url = fetcher.full_url(uri) if uri.startswith("/") else uri
        return fetcher.retrieve_full_uri(url, headers)

    hint = "look at uri and token_file, and whether this container has a role"
    return _from_service(fetch, "the container's service", hint)


def _from_service(fetch: Callable[[], Any], label: str, hint: str) -> dict[str, str]:
    """The credentials from a metadata service of this machine.

    An error shows only the class of botocore's error, since its text repeats the address: in ECS
    whoever knows the address can get the credentials.
    """
    try:
        return _temporary(fetch(), "Token")
    except ProviderUnavailable:
        why = "an answer without them"
    except Exception as error:  # noqa: BLE001 - see above
        why = type(error).__name__
    raise ProviderUnavailable(f"no credentials from {label} ({why})", hint=hint)


def _temporary(answer: Any, token: str) -> dict[str, str]:
    """The credentials in a service's answer, under botocore's names."""
    names = {"access_key": "AccessKeyId", "secret_key": "SecretAccessKey", "token": token}
    if not isinstance(answer, dict) or not all(answer.get(name) for name in names.values()):
        raise ProviderUnavailable("the answer to the login has no credentials")
    ends = answer.get("Expiration")
    expiry = ends.isoformat() if isinstance(ends, datetime) else str(ends)
    return {ours: str(answer[name]) for ours, name in names.items()} | {"expiry_time": expiry}
