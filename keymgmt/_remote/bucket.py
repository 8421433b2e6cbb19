"""Files in a bucket, which is read like a web server with signed addresses.

obstore signs the addresses, for S3, Google and Azure, and our own HTTP client makes the requests:
obstore's client follows a redirect to any host, and sends the session token to that host.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode, urlsplit

from keymgmt._remote.http import Http
from keymgmt._remote.patience import Patience
from keymgmt._remote.web import WebStorage
from keymgmt._system.address import is_loopback
from keymgmt.errors import ConfigError, StorageDenied

if TYPE_CHECKING:
    from keymgmt._config.remote import Access, Remote
    from keymgmt._remote.location import Location

__all__ = ["bucket_query", "bucket_storage"]

Address = Callable[[Any, str], str]


def bucket_storage(location: Location, settings: Remote, patience: Patience) -> WebStorage:
    """The files below a path of a bucket.

    Raises:
        ConfigError: obstore is not installed, or the login of the config is missing or impossible.
    """
    http, address = _opened(location, settings, patience)

    def below(method: str, name: str) -> str:
        return address(method, f"{location.path}/{name}".lstrip("/"))

    return WebStorage(http, below, replaces=location.scheme == "s3")


def bucket_query(location: Location, settings: Remote, query: dict[str, str]) -> tuple[Http, str]:
    """A client, and the signed address of a query to a bucket of S3 itself.

    Raises as ``bucket_storage``.
    """
    http, address = _opened(location, settings, Patience(settings.deadline, location.origin))
    base = address("GET", "x").partition("?")[0].removesuffix("/x")
    # obstore signs names of files alone. What it takes for the address of the bucket may have a
    # query, to which it adds a slash: the last parameter is one that S3 ignores.
    at = f"{base}?{urlencode(query, quote_via=quote, safe='')}&x-keymgmt="
    return http, _address(location, settings, at)[0]("GET", "")


def _opened(location: Location, settings: Remote, patience: Patience) -> tuple[Http, Address]:
    """A client for a bucket, and what signs the addresses of its files; models share the latter."""
    url, address = settings.kept.get(
        ("bucket", location.origin), _secrets(location, settings), lambda: _find(location, settings)
    )
    return Http(url, settings, settings.access_to(location.origin), patience), address


def _secrets(location: Location, settings: Remote) -> tuple[str | None, ...]:
    """Secret and token of a bucket, as they are now; a person is asked for them once."""
    access = settings.access_to(location.origin)
    secret, token = access.secret, access.token

    def read() -> tuple[str | None, ...]:
        return secret.read().decode() if secret else None, token.read_text() if token else None

    if (secret and secret.prompt) or (token and token.prompt):
        return settings.kept.get(("secrets", location.origin), None, read)
    return read()


def _find(location: Location, settings: Remote) -> tuple[str, Address]:
    """Where a bucket is, and what signs the addresses of its files."""
    access = settings.access_to(location.origin)
    where = f'[remote.access."{location.origin}"]'
    address, origin = _address(location, settings)
    url = address("GET", "manifest.json").partition("?")[0]
    if access.auth == "config" and not url.startswith(f"{origin}/"):
        raise ConfigError(
            f"{location.origin} is at {origin}, and a variable of the environment leads elsewhere",
            hint=f'unset it, or write auth = "environment" in {where}',
        )
    parts = urlsplit(url)
    if parts.scheme != "https" and not is_loopback(parts.netloc):
        raise ConfigError(
            f"{parts.scheme}://{parts.netloc} is plain HTTP, which is for this machine alone",
            hint=f"write the endpoint in {where} with https://",
        )
    return url, address


def _address(location: Location, settings: Remote, at: str = "") -> tuple[Address, str]:
    """What signs the address of a file, and where it is; for S3 ``at`` another address."""
    try:
        import obstore
        import obstore.exceptions
    except ImportError as error:
        raise ConfigError(
            "models in buckets are read with a package that is not installed: obstore",
            hint='pip install "keymgmt[remote]"',
        ) from error
    access = settings.access_to(location.origin)
    where = f'[remote.access."{location.origin}"]'
    if access.auth == "config" and access.secret is None:
        raise ConfigError(
            f"{location.origin} is a bucket, and the config says no login for it",
            hint=f'name it in {where}: user and secret, or auth = "environment"; '
            "what everybody may read has an https:// address",
        )
    try:
        secrets = _secrets(location, settings)
        store, origin = _MADE[location.scheme](location.host, access, *secrets, at)
    except obstore.exceptions.BaseError:
        # The message of the library could repeat the secret.
        raise ConfigError(
            f"the login in {where} is none of {location.scheme}://, "
            "or a variable of the environment for this service is wrong",
        ) from None
    signed = timedelta(seconds=settings.deadline + 60)

    def address(method: Any, path: str) -> str:
        try:
            return str(obstore.sign(store, method, path, signed))
        except obstore.exceptions.BaseError:
            raise StorageDenied(
                f"no login is found for {location.origin}",
                hint=f"see whether the login in {where} is complete",
            ) from None

    return address, origin


# Each store begins with the environment: a value of the config replaces all its spellings there.


def _s3(
    bucket: str, access: Access, secret: str | None, token: str | None, at: str
) -> tuple[Any, str]:
    from obstore.store import S3Store

    if access.auth == "environment":
        said: Any = {"region": access.region} if "region" in access.model_fields_set else {}
        if access.endpoint:
            said["endpoint"] = access.endpoint
        if at:
            said |= {"endpoint": at, "aws_endpoint_url_s3": at}
            said["virtual_hosted_style_request"] = True  # the bucket is in the address
        return S3Store(bucket, config=said, client_options={"allow_http": True}), ""
    own_host = not access.endpoint and "." not in bucket  # certificates cover no second dot
    amazon = f"https://{bucket + '.' if own_host else ''}s3.{access.region}.amazonaws.com"
    origin = access.endpoint or amazon
    credential: Any = {
        "access_key_id": access.user or "",
        "secret_access_key": secret,
        "token": token,
        "expires_at": None,
    }
    config: Any = {
        "endpoint": at or origin,
        "aws_endpoint_url_s3": at or origin,
        "region": access.region,
        "virtual_hosted_style_request": own_host or bool(at),
        "skip_signature": False,
        "s3_express": False,
    }
    store = S3Store(
        bucket,
        config=config,
        client_options={"allow_http": True},
        credential_provider=lambda: credential,
    )
    return store, origin


def _gs(bucket: str, access: Access, secret: str | None, *_: object) -> tuple[Any, str]:
    from obstore.store import GCSStore

    if access.auth == "environment":
        return GCSStore(bucket), ""
    config: Any = {"service_account_key": secret, "skip_signature": False}
    return GCSStore(bucket, config=config), "https://storage.googleapis.com"


def _az(container: str, access: Access, secret: str | None, *_: object) -> tuple[Any, str]:
    from obstore.store import AzureStore

    if access.auth == "environment":
        return AzureStore(container), ""
    origin = access.endpoint or f"https://{access.user}.blob.core.windows.net"
    config: Any = {
        "account_name": access.user or "",
        "account_key": secret,
        "endpoint": origin,
        "use_emulator": False,
        "skip_signature": False,
    }
    return AzureStore(container, config=config), origin


_MADE: Final[dict[str, Callable[..., tuple[Any, str]]]] = {"s3": _s3, "gs": _gs, "az": _az}
