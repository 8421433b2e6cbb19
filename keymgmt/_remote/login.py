"""Logins to registries: the token protocol, and the credentials that the config allows.

https://github.com/distribution/distribution/blob/v2.8.2/docs/spec/auth/token.md. A registry names
the server that issues tokens. A login is sent there only if that server is the registry itself or
the ``token_server`` of the config.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from keymgmt._remote.http import Http, basic
from keymgmt._remote.url import origin_of, shown
from keymgmt._system.address import is_loopback
from keymgmt._system.home import expand_home
from keymgmt._system.strict_json import load_json
from keymgmt._system.trusted_file import read_file
from keymgmt.errors import FormatError, StorageDenied, StorageUnavailable

if TYPE_CHECKING:
    from keymgmt._config.remote import Access, Remote
    from keymgmt._remote.location import Location
    from keymgmt._remote.patience import Patience

__all__ = ["Login"]

_LIMIT: Final = 1 << 20
_SECONDS: Final = 60
_HUB: Final = "https://index.docker.io/v1/"  # the name of Docker Hub in docker's own config
_HUB_HOSTS: Final = {"docker.io", "index.docker.io", "registry-1.docker.io"}
_TOKEN_USER: Final = "<token>"  # noqa: S105 - as helpers say that the secret is a refresh token


@dataclass(frozen=True)
class _Credentials:
    user: str
    secret: str = field(repr=False)


class Login:
    """Makes the ``Authorization`` for one repository."""

    def __init__(
        self,
        location: Location,
        settings: Remote,
        access: Access,
        patience: Patience,
        scope: str,
    ) -> None:
        """``scope`` is the permission to request: ``pull``, or ``pull,push``."""
        self._location, self._settings, self._access = location, settings, access
        self._patience = patience
        self._scope = f"repository:{location.path}:{scope}"

    def __call__(self, challenge: str) -> str:
        """Answer a ``WWW-Authenticate``.

        Raises:
            StorageDenied: there is no login that may be sent, or it is refused.
            StorageUnavailable: the token server issues no token.
            ProviderUnavailable: the secret is missing.
        """
        with self._patience.paused():  # a person may be asked
            token = self._access.token.read_text() if self._access.token is not None else ""
            credentials = self._credentials() if not token else None
        if token:
            return f"Bearer {token}"
        kind, _, fields = challenge.partition(" ")
        parameters = dict(re.findall(r'(\w+)="([^"]*)"', fields))
        if kind.lower() == "bearer" and "realm" in parameters:
            realm, service = parameters["realm"], parameters.get("service", "")
            return f"Bearer {self._token(realm, service, credentials)}"
        if kind.lower() != "basic":
            raise StorageDenied(
                f"{self._location.origin} asks for a login of another kind: {kind[:40]!r}",
                hint="registries that ask for Basic or Bearer are understood",
            )
        if credentials is None:
            raise StorageDenied(
                f"{self._location.origin} asks for a login",
                hint=f'name it in the config: [remote.access."{self._location.origin}"]',
            )
        return basic(credentials.user, credentials.secret)

    def _token(self, realm: str, service: str, credentials: _Credentials | None) -> str:
        self._check_realm(realm)
        http = Http(realm, self._settings, self._access, self._patience)
        common = {"service": service, "scope": self._scope}
        if credentials is not None and credentials.user == _TOKEN_USER:
            form = {
                "grant_type": "refresh_token",
                "client_id": "keymgmt",
                "refresh_token": credentials.secret,
            }
            reply = http.request(
                "POST",
                realm,
                headers={"Content-Type": "application/x-www-form-urlencoded"},
                body=urlencode(common | form).encode(),
                limit=_LIMIT,
            )
        else:
            if credentials is not None:
                http.authorization = basic(credentials.user, credentials.secret)
            joint = "&" if "?" in realm else "?"
            reply = http.request("GET", f"{realm}{joint}{urlencode(common)}", limit=_LIMIT)
        try:
            token_reply = load_json(bytes(reply.body), "the token", _LIMIT, canonical=False).rest()
        except FormatError:
            token_reply = {}
        token = token_reply.get("token") or token_reply.get("access_token")
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
            # The reply is not repeated in the message: a part of it may be a token.
            raise StorageUnavailable(
                f"{shown(realm)} gave no token", hint="look at the log of the server of tokens"
            )
        return token

    def _check_realm(self, realm: str) -> None:
        home = self._location
        named = (home.host, self._access.token_server or home.host)
        host = ""
        with contextlib.suppress(ValueError):
            scheme, host, _ = origin = origin_of(realm)
            plain = scheme == "http" and self._access.plain_http and is_loopback(host)
            names = [origin_of(f"{scheme}://{name}") for name in named]
            if origin in names and (scheme == "https" or plain):
                return
        raise StorageDenied(
            f"{home.origin} sends us to {shown(realm) if host else 'no address'} for a token, and "
            "a login is told to nobody whom the config does not name",
            hint=f'if that is right: token_server = "{host}" in [remote.access."{home.origin}"]',
        )

    def _credentials(self) -> _Credentials | None:
        access = self._access
        if access.auth == "docker":
            return _docker_login(access.docker_config, self._location.host)
        if access.user is None or access.secret is None:
            return None
        return _Credentials(access.user, access.secret.read_text())


def _docker_login(file: Path | None, host: str) -> _Credentials | None:
    """The login that ``docker login`` keeps for a host, in its file or with a credential helper."""
    name = _HUB if host in _HUB_HOSTS else host
    file = file or expand_home("~/.docker/config.json", StorageDenied)
    hint = f"docker login {host}, or name the file that it wrote: docker_config"
    content = read_file(
        file, label="docker config", limit=_LIMIT, access="private", error=StorageDenied, hint=hint
    )
    try:
        settings = load_json(content, str(file), _LIMIT, canonical=False).rest()
        helper = _table(settings, "credHelpers").get(name) or settings.get("credsStore")
        if helper:
            return _ask_helper(str(helper), name)
        entries = {_host(key): value for key, value in _table(settings, "auths").items()}
        entry = entries.get(_host(name), {})
        if entry.get("identitytoken"):
            return _Credentials(_TOKEN_USER, str(entry["identitytoken"]))
        if not entry.get("auth"):
            return None
        user, colon, secret = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
    except (FormatError, AttributeError, TypeError, ValueError, binascii.Error):
        colon = ""
    if not colon:
        # Without the content and without the error, which may quote the content.
        raise StorageDenied(f"{file} has no login that can be read for {host}", hint=hint) from None
    return _Credentials(user, secret.rstrip("\0"))


def _table(settings: dict[str, Any], name: str) -> dict[str, Any]:
    value = settings.get(name) or {}
    if not isinstance(value, dict):
        raise TypeError
    return value


def _host(name: str) -> str:
    return name.partition("://")[2].partition("/")[0] if "://" in name else name.partition("/")[0]


def _ask_helper(helper: str, host: str) -> _Credentials | None:
    hint = f"docker login {host}, or name user and secret in the config"
    program = shutil.which(f"docker-credential-{helper}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", helper) or program is None:
        raise StorageDenied(
            f"docker's config keeps the login with docker-credential-{helper[:40]}, which is not "
            "installed",
            hint=hint,
        )
    try:
        done = subprocess.run(
            [program, "get"], input=host.encode(), capture_output=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise StorageDenied(
            f"{program} did not answer within {_SECONDS} seconds", hint=hint
        ) from None
    if done.returncode:
        if b"credentials not found" in done.stdout:
            return None
        raise StorageDenied(
            f"{program} gave no login for {host}: exit code {done.returncode}", hint=hint
        )
    try:
        credentials = json.loads(done.stdout)
        return _Credentials(str(credentials["Username"]), str(credentials["Secret"]))
    except (ValueError, KeyError, TypeError):
        raise StorageDenied(
            f"{program} gave no login for {host} that can be read", hint=hint
        ) from None
