"""The sealed models below a path of a bucket, found page by page (ListObjectsV2 of S3).

All objects are listed, 1000 in an answer, and not folder by folder: a folder would cost a request
of its own, and there are as many as models. One page is held at a time. What a server lists is
untrusted: it names objects of the bucket that was asked, below the path that was asked, or nothing.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET  # ruled out before: entities, and more than a page
from typing import TYPE_CHECKING, Final

from keymgmt._remote.bucket import bucket_query
from keymgmt._remote.folder import has_model
from keymgmt._remote.location import BUCKETS, Location
from keymgmt._remote.url import shown
from keymgmt.errors import ConfigError, SealedModelError, StorageUnavailable
from keymgmt.sealed.folder import KEYS, MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keymgmt._config.remote import Remote

__all__ = ["LISTED", "is_remote_tree", "list_models"]

LISTED: Final = "s3"  # the scheme of the buckets that are listed
_KEYS: Final = 1000  # in a page; S3 gives no more
_MAX_PAGE: Final = 16 << 20  # a key has up to 1024 bytes, of which each may be written with six
_MAX_TOKEN: Final = 4096


def is_remote_tree(location: Location, settings: Remote) -> bool:
    """Whether what lies at a location is no model, so that models are looked for below it.

    Raises:
        ConfigError: it is a bucket that is not listed, and has no model there; or as
            ``bucket_storage``.
        StorageError: nobody knows.
    """
    if location.scheme not in BUCKETS:
        return False
    if has_model(location, settings):
        return False
    _need_listed(location, f"there is no {MANIFEST} at {location}, and ")
    return True


def list_models(
    location: Location, settings: Remote, etags: dict[str, str] | None = None
) -> Iterator[str | SealedModelError]:
    """The locations at or below ``location`` that have a ``manifest.json``, as pages come.

    Before a location is given, the ETag of its keys.json is put into ``etags``. That file comes
    before the manifest: it is known if it was on the same page, or on the one before. A name that
    is none of a location is an error that is given, and ends nothing.

    Raises:
        ConfigError: its scheme is not listed; or as ``bucket_storage``.
        StorageError: a page is not to be had, or not what a server of S3 answers. What was given
            before is then not all there is.
    """
    _need_listed(location)
    prefix = f"{location.path}/" if location.path else ""
    query = {"list-type": "2", "max-keys": str(_KEYS), "prefix": prefix}
    token, before = "", dict[str, str]()
    while True:
        if token:
            query["continuation-token"] = token
        http, url = bucket_query(location, settings, query)
        reply = http.request("GET", url, limit=_MAX_PAGE)
        if not reply.whole:
            raise _no_page(url, f"it is longer than {_MAX_PAGE} bytes")
        listed, following = _parse(bytes(reply.body), url, prefix)
        for name in listed:
            if name == prefix + MANIFEST or name.endswith(f"/{MANIFEST}"):
                folder = name.removesuffix(MANIFEST)
                model = _model(location, folder.rstrip("/"), name)
                etag = listed.get(folder + KEYS) or before.get(folder + KEYS)
                if etags is not None and etag and isinstance(model, str):
                    etags[model] = etag
                yield model
        before = listed
        if not following:
            return
        if following == token:
            raise _no_page(url, "the same page would come again and again")
        token = following


def _model(location: Location, path: str, name: str) -> str | SealedModelError:
    found = Location(location.scheme, location.host, path)
    try:
        if Location.parse(str(found)) == found and f"{path}/{MANIFEST}".lstrip("/") == name:
            return str(found)
    except ConfigError:
        pass
    return SealedModelError(
        f"{location.origin} lists {name[:200]!r}, which is no location of a model",
        hint="a path has letters, digits, spaces and plain punctuation, and no empty part",
    )


def _parse(body: bytes, url: str, prefix: str) -> tuple[dict[str, str], str]:
    """The names and ETags of a page, and what to ask for the next with; empty after the last."""
    try:
        text = body.decode()
        if "<!" in text:  # entities; S3 writes none, and no comments
            raise _no_page(url, "it declares a document type")
        root = ET.fromstring(text)  # noqa: S314 - see above
    except (UnicodeDecodeError, ValueError, ET.ParseError) as error:
        raise _no_page(url, "it is no XML, or not all of it") from error
    space = root.tag.removesuffix("ListBucketResult")
    if space == root.tag:
        raise _no_page(url, "it is no ListBucketResult")
    items = root.findall(f"{space}Contents")
    names = {item.findtext(f"{space}Key", ""): item.findtext(f"{space}ETag", "") for item in items}
    more = root.findtext(f"{space}IsTruncated", "")
    token = root.findtext(f"{space}NextContinuationToken", "") if more == "true" else ""
    if more not in ("true", "false") or (more == "true") != (0 < len(token) <= _MAX_TOKEN):
        raise _no_page(url, "it does not say whether it is the last, and what comes next")
    if root.findtext(f"{space}KeyCount", str(len(items))) != str(len(items)):
        raise _no_page(url, "it has another number of names than it says")
    if not all(name.startswith(prefix) and name for name in names):
        raise _no_page(url, "it has names that were not asked for")
    return names, token


def _need_listed(location: Location, why: str = "") -> None:
    if location.scheme != LISTED:
        raise ConfigError(
            f"{why}trees of models are found in folders and in {LISTED}://, and not in "
            f"{location.scheme}://: {location} is not looked through",
            hint="name each model by its own location, or copy the tree to a folder",
        )


def _no_page(url: str, why: str) -> StorageUnavailable:
    return StorageUnavailable(
        f"{shown(url)} does not list its objects as S3 does: {why}",
        hint="look whether the endpoint is that of S3 itself, and what a proxy on the way does",
    )
