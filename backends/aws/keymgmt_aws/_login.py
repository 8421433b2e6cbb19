"""Logging in: botocore's credentials for each method, and nothing that the method does not name.

Temporary credentials are made anew by the call that finds them near their end, within its time.
What is read from a file or another secret source is read at each login, and not kept beside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keymgmt.backend import ProviderUnavailable, check_trusted, read_projected
from keymgmt_aws._settings import (
    Auth,
    ContainerAuth,
    InstanceAuth,
    ProfileAuth,
    RoleAuth,
    StaticAuth,
    WebIdentityAuth,
)
from keymgmt_aws._transport import Client, bind, http_session, new_session

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
        return Credentials(
            auth.access_key_id.read_text(), auth.secret_access_key.read_text(), token
        )
    if isinstance(auth, ProfileAuth):
        return _of_profile(auth, settings)
    makers = {
        WebIdentityAuth: _by_web_identity,
        RoleAuth: _by_role,
        InstanceAuth: _of_instance,
        ContainerAuth: _of_container,
    }
    make: Any = makers.get(type(auth))
    if make is not None:
        source = log_in(auth.source, settings) if isinstance(auth, RoleAuth) else None
        return DeferredRefreshableCredentials(lambda: make(auth, settings, source), auth.method)
    # The one method that asks for what is around.
    from botocore.session import Session

    found = Session().get_credentials()
    if found is None:
        raise ProviderUnavailable(
            "the environment has no AWS credentials", hint="name a method in auth"
        )
    return found


def _of_profile(auth: ProfileAuth, settings: AwsSettings) -> Any:
    from botocore.credentials import create_credential_resolver

    files = {
        "config_file": auth.config_file or Path("~/.aws/config").expanduser(),
        "credentials_file": auth.credentials_file or Path("~/.aws/credentials").expanduser(),
    }
    for name, file in files.items():
        if file.exists():
            # It may name a program that is run.
            check_trusted(
                file,
                what=name,
                private=name == "credentials_file",
                error=ProviderUnavailable,
            )
    session = new_session(
        profile=auth.profile,
        region=settings.region,
        **{name: str(file) for name, file in files.items()},
    )
    bind(session, settings)
    resolver = create_credential_resolver(session, region_name=settings.region)
    for name in _BEYOND_THE_PROFILE:
        resolver.remove(name)
    found = resolver.load_credentials()
    if found is None:
        raise ProviderUnavailable(
            f"the profile {auth.profile!r} has no credentials",
            hint="look at " + " and ".join(map(str, files.values())),
        )
    return found


def _by_role(auth: RoleAuth, settings: AwsSettings, source: Any) -> dict[str, str]:
    request = {"RoleArn": auth.role_arn, "RoleSessionName": auth.session_name}
    if auth.external_id is not None:
        request["ExternalId"] = auth.external_id
    return _ask_sts(settings, source, "assume_role", request)


def _by_web_identity(auth: WebIdentityAuth, settings: AwsSettings, _: None) -> dict[str, str]:
    request = {"RoleArn": auth.role_arn, "RoleSessionName": auth.session_name}
    request["WebIdentityToken"] = read_projected(auth.token_file, "token")
    return _ask_sts(settings, None, "assume_role_with_web_identity", request)


def _ask_sts(
    settings: AwsSettings, source: Any, operation: str, request: Mapping[str, str]
) -> dict[str, str]:
    with contextlib.closing(Client("sts", settings, source)) as sts:
        found = sts(operation, **request).get("Credentials")
    return _temporary(found, "SessionToken")


def _of_instance(auth: InstanceAuth, settings: AwsSettings, _: None) -> dict[str, str]:
    from botocore.utils import InstanceMetadataFetcher

    fetcher = InstanceMetadataFetcher(
        settings.call_timeout,
        base_url=auth.endpoint,
        env={},
        config={"ec2_metadata_v1_disabled": True},
    )
    # botocore's own would go through the proxy that the environment names.
    fetcher._session = http_session(settings.call_timeout)
    found: dict[str, str] = fetcher.retrieve_iam_role_credentials()
    if not found:
        raise ProviderUnavailable(
            f"no metadata service at {auth.endpoint} gives a role's credentials",
            hint="is this an EC2 instance with a role, and IMDSv2 reached from here?",
        )
    return {name: value for name, value in found.items() if name != "role_name"}


def _of_container(auth: ContainerAuth, settings: AwsSettings, _: None) -> dict[str, str]:
    from botocore.utils import ContainerMetadataFetcher

    fetcher = ContainerMetadataFetcher(http_session(settings.call_timeout))
    uri = auth.uri.read_text() if auth.uri else _POD_AGENT
    file = auth.token_file or (None if auth.uri else _POD_TOKEN)
    headers = {"Authorization": read_projected(file, "token")} if file else {}
    # In ECS whoever knows the address has the credentials, and botocore's errors repeat it.
    found, why = None, ""
    try:
        place = fetcher.full_url(uri) if uri.startswith("/") else uri
        found = fetcher.retrieve_full_uri(place, headers)
    except Exception as error:  # noqa: BLE001 - what it is, and nothing of what it says, is told
        why = type(error).__name__
    if why:
        raise ProviderUnavailable(
            f"no credentials from the container's service ({why})",
            hint="look at uri and token_file, and whether this container has a role",
        )
    return _temporary(found, "Token")


def _temporary(found: Any, token: str) -> dict[str, str]:
    """Credentials as a service tells them, in botocore's words."""
    names = {"access_key": "AccessKeyId", "secret_key": "SecretAccessKey", "token": token}
    if not isinstance(found, dict) or not all(found.get(name) for name in names.values()):
        raise ProviderUnavailable("the answer to the login has no credentials")
    ends = found.get("Expiration")
    told = ends.isoformat() if isinstance(ends, datetime) else str(ends)
    return {ours: str(found[name]) for ours, name in names.items()} | {"expiry_time": told}
