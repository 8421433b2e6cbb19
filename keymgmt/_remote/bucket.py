"""Files in a bucket, which is read like a web server with signed addresses.

obstore signs the addresses, for S3, Google and Azure, and our own HTTP client makes the requests:
obstore's client follows a redirect to any host, and sends the session token to that host.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from keymgmt._remote.http import Http
from keymgmt._remote.location import Location
from keymgmt._remote.web import WebStorage
from keymgmt._system.address import is_loopback
from keymgmt.errors import ConfigError, StorageDenied

if TYPE_CHECKING:
    from keymgmt._config.remote import Access, Remote

__all__ = ["bucket_pages", "bucket_storage"]

Address = Callable[[Any, str], str]


def bucket_storage(location: Location, settings: Remote) -> WebStorage:
    """The files below a path of a bucket.

    Raises:
        ConfigError: obstore is not installed, or the login of the config is missing or impossible.
    """
    http, address = _opened(location, settings)
    return WebStorage(http, address, replaces=location.scheme == "s3")


def bucket_pages(
    location: Location, settings: Remote
) -> tuple[Http, Callable[[dict[str, str]], str]]:
    """A client for a bucket of S3, and the signed address of a query to the bucket itself.

    Raises as ``bucket_storage``, and so does what makes the address.
    """
    root = Location(location.scheme, location.host, "")
    http, address = _opened(root, settings)
    base = address("GET", "x").partition("?")[0].removesuffix("/x")

    def signed(query: dict[str, str]) -> str:
        # obstore signs names of files alone. What it takes for the address of the bucket may have
        # a query, to which it adds a slash: the last parameter is one that S3 ignores.
        at = f"{base}?{urlencode(query, quote_via=quote, safe='')}&x-keymgmt="
        return _address(root, settings, at)[0]("GET", "")

    return http, signed


def _opened(location: Location, settings: Remote) -> tuple[Http, Address]:
    access = settings.access_to(location.origin)
    where = f'[remote.access."{location.origin}"]'
    address, origin = _address(location, settings)
    url = address("GET", "manifest.json")
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
    return Http(url, settings, access), address


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
        store, origin = (
            _s3(location.host, access, at) if at else _MADE[location.scheme](location.host, access)
        )
    except obstore.exceptions.BaseError:
        # The message of the library could repeat the secret.
        raise ConfigError(
            f"the login in {where} is none of {location.scheme}://, "
            "or a variable of the environment for this service is wrong",
        ) from None
    signed = timedelta(seconds=settings.deadline + 60)

    def address(method: Any, name: str) -> str:
        path = f"{location.path}/{name}".lstrip("/")
        try:
            return str(obstore.sign(store, method, path, signed))
        except obstore.exceptions.BaseError:
            raise StorageDenied(
                f"no login is found for {location.origin}",
                hint=f"see whether the login in {where} is complete",
            ) from None

    return address, origin


def _secret(access: Access) -> str:
    return access.secret.read().decode() if access.secret is not None else ""


# Each store begins with the environment: a value of the config replaces all its spellings there.


def _s3(bucket: str, access: Access, at: str = "") -> tuple[Any, str]:
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
        "secret_access_key": _secret(access),
        "token": access.token.read_text() if access.token is not None else None,
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


def _gs(bucket: str, access: Access) -> tuple[Any, str]:
    from obstore.store import GCSStore

    if access.auth == "environment":
        return GCSStore(bucket), ""
    config: Any = {"service_account_key": _secret(access), "skip_signature": False}
    return GCSStore(bucket, config=config), "https://storage.googleapis.com"


def _az(container: str, access: Access) -> tuple[Any, str]:
    from obstore.store import AzureStore

    if access.auth == "environment":
        return AzureStore(container), ""
    origin = access.endpoint or f"https://{access.user}.blob.core.windows.net"
    config: Any = {
        "account_name": access.user or "",
        "account_key": _secret(access),
        "endpoint": origin,
        "use_emulator": False,
        "skip_signature": False,
    }
    return AzureStore(container, config=config), origin


_MADE = {"s3": _s3, "gs": _gs, "az": _az}
