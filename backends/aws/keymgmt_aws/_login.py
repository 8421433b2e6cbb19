"""Logging in: botocore's credentials for each method, and nothing that the method does not name.

Temporary credentials are made anew by the call that finds them near their end, within its time.
What is read from a file or another secret source is read at each login, and not kept beside.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import ProviderUnavailable, check_trusted, read_projected
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
# Where a profile that has no credentials would be completed from elsewhere.
_BEYOND_THE_PROFILE: Final = ("ec2-credentials-file", "boto-config", "container-role", "iam-role")


def log_in(auth: Auth, settings: AwsSettings) -> Any:
    """The credentials of ``auth``; those that expire renew themselves when a request is signed.

    Raises:
        ProviderUnavailable: a file, secret, profile or variable that it needs is not here.
        Exception: what botocore raises; of a login that is made here, or later where it is used.
    """
    from botocore.credentials import Credentials, DeferredRefreshableCredentials

    if isinstance(auth, StaticAuth):
        token = auth.session_token.read_text() if auth.session_token else None
        secret = auth.secret_access_key.read_text()
        return Credentials(auth.access_key_id.read_text(), secret, token)
    if isinstance(auth, ProfileAuth | EnvironmentAuth):
        return _found(auth, settings)
    source = log_in(auth.source, settings) if isinstance(auth, RoleAuth) else None

    def renew() -> dict[str, str]:
        if isinstance(auth, InstanceAuth):
            return _of_instance(auth, settings)
        if isinstance(auth, ContainerAuth):
            return _of_container(auth, settings)
        return _assumed(auth, settings, source)

    return DeferredRefreshableCredentials(renew, auth.method)


def _found(auth: ProfileAuth | EnvironmentAuth, settings: AwsSettings) -> Any:
    """What botocore itself finds: for a profile in its files, else in whatever is around."""
    from botocore.credentials import create_credential_resolver
    from botocore.session import Session

    if isinstance(auth, EnvironmentAuth):
        found, label, hint = Session().get_credentials(), "the environment", "name a method in auth"
    else:
        files = {
            "config_file": auth.config_file or Path("~/.aws/config").expanduser(),
            "credentials_file": auth.credentials_file or Path("~/.aws/credentials").expanduser(),
        }
        for name, file in files.items():
            if file.exists():
                # It may name a program that is run.
                private = name == "credentials_file"
                check_trusted(file, label=name, private=private, error=ProviderUnavailable)
        given = {name: str(file) for name, file in files.items()}
        http = http_session(settings)
        given |= {"profile": auth.profile, "region": settings.region}
        session = new_session(settings, lambda request, **_: http.send(request), **given)
        resolver = create_credential_resolver(session, region_name=settings.region)
        for name in _BEYOND_THE_PROFILE:
            resolver.remove(name)
        _bound_programs(resolver, session, settings.timeout)
        found, label = resolver.load_credentials(), f"the profile {auth.profile!r}"
        hint = "look at " + " and ".join(map(str, files.values()))
    if found is None:
        raise ProviderUnavailable(f"{label} has no AWS credentials", hint=hint)
    return found


def _bound_programs(resolver: Any, session: Any, seconds: float) -> None:
    """End every program of a profile, or of one that it builds on, that goes on for ``seconds``."""
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

    http, words = http_session(settings), "x-aws-ec2-metadata-token"
    place = "meta-data/iam/security-credentials/"

    def ask(method: str, path: str, headers: dict[str, str]) -> str:
        request = AWSRequest(method, f"{auth.endpoint}/latest/{path}", headers)
        answer = http.send(request.prepare())
        if answer.status_code != 200:
            raise ConnectionError
        return str(answer.text)

    def fetch() -> Any:
        token = {words: ask("PUT", "api/token", {f"{words}-ttl-seconds": "300"})}
        role = ask("GET", place, token).split("\n")[0]
        found = json.loads(ask("GET", place + role, token))
        # In an outage EC2 tells old ones, and AWS takes them; they are asked for again in a while.
        soon = datetime.now(UTC) + timedelta(minutes=20)
        return found | {"Expiration": max(found["Expiration"], f"{soon:%Y-%m-%dT%H:%M:%SZ}")}

    label = f"the IMDSv2 service at {auth.endpoint}"
    return _told(
        fetch, label, "is this an EC2 instance with a role, and is that reached from here?"
    )


def _of_container(auth: ContainerAuth, settings: AwsSettings) -> dict[str, str]:
    from botocore.utils import ContainerMetadataFetcher

    fetcher = ContainerMetadataFetcher(http_session(settings))
    uri = auth.uri.read_text() if auth.uri else _POD_AGENT
    file = auth.token_file or (None if auth.uri else _POD_TOKEN)
    headers = {"Authorization": read_projected(file, "token")} if file else {}

    def fetch() -> Any:
        place = fetcher.full_url(uri) if uri.startswith("/") else uri
        return fetcher.retrieve_full_uri(place, headers)

    hint = "look at uri and token_file, and whether this container has a role"
    return _told(fetch, "the container's service", hint)


def _told(fetch: Callable[[], Any], label: str, hint: str) -> dict[str, str]:
    """What a service beside this machine tells of its role.

    Of a failure its kind alone is said: in ECS whoever knows the address has the credentials, and
    botocore's errors repeat it.
    """
    try:
        return _temporary(fetch(), "Token")
    except ProviderUnavailable:
        why = "an answer without them"
    except Exception as error:  # noqa: BLE001 - see above
        why = type(error).__name__
    raise ProviderUnavailable(f"no credentials from {label} ({why})", hint=hint)


def _temporary(found: Any, token: str) -> dict[str, str]:
    """Credentials as a service tells them, in botocore's words."""
    names = {"access_key": "AccessKeyId", "secret_key": "SecretAccessKey", "token": token}
    if not isinstance(found, dict) or not all(found.get(name) for name in names.values()):
        raise ProviderUnavailable("the answer to the login has no credentials")
    ends = found.get("Expiration")
    told = ends.isoformat() if isinstance(ends, datetime) else str(ends)
    return {ours: str(found[name]) for ours, name in names.items()} | {"expiry_time": told}
