"""Locations: addresses that a person may write in place of a folder.

A location is always an argument, and never read from a model. It contains no login, which would
stand in the list of processes and in every message.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from keymgmt._system.address import is_loopback
from keymgmt.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BUCKETS", "DIGEST", "Location", "has_location", "is_location", "need_folder"]

BUCKETS: Final = ("s3", "gs", "az")
_SCHEMES: Final = ("https", "http", *BUCKETS, "oci")
_ADDRESS: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_LOST: Final = re.compile(rf"({'|'.join(_SCHEMES)}):/[^/]")
_HOST: Final = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])")
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_PATH: Final = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%/ -]*")
# Names and tags as the OCI distribution specification defines them.
_REPOSITORY: Final = re.compile(
    r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*"
)
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Location:
    """Where a sealed model is that is not in a folder of this machine.

    Attributes:
        scheme: ``https``, ``http``, ``s3``, ``gs``, ``az`` or ``oci``.
        host: the host, with a port if one was given; for a bucket its name.
        path: the path on the host, without a slash at either end; for a registry the repository.
        reference: for a registry the tag or digest.
    """

    scheme: str
    host: str
    path: str
    reference: str = ""

    @classmethod
    def parse(cls, text: str) -> Location:
        """Read a location; ConfigError where it has no scheme or form that is supported."""
        match = _ADDRESS.fullmatch(text)
        scheme = match[1].lower() if match else ""
        if not match or scheme not in _SCHEMES:
            raise _refused(text, f"it begins with none of {', '.join(f'{s}://' for s in _SCHEMES)}")
        host, _, path = match[2].partition("/")
        path = path.strip("/")
        if "@" in host:
            raise ConfigError(
                f"a location holds no login, and this one of {scheme}:// does",
                hint='name where it is in the config: [remote.access."SCHEME://HOST"]',
            )
        _check_host(text, scheme, host)
        if scheme == "oci":
            return cls(scheme, host.lower(), *_reference(text, path))
        if "?" in path or "#" in path:
            raise ConfigError(
                f"the location {text.partition('?')[0]} has more than a path",
                hint="name the folder: an address with a query is that of one file",
            )
        if not _PATH.fullmatch(path) or any(p in ("", ".", "..") for p in path.split("/") if path):
            raise _refused(text, "its path is not a plain one")
        return cls(scheme, host if scheme in BUCKETS else host.lower(), path)

    @property
    def origin(self) -> str:
        """Scheme and host, as in the config: ``[remote.access."ORIGIN"]``."""
        return f"{self.scheme}://{self.host}"

    def __str__(self) -> str:
        joint = "@" if self.reference.startswith("sha256:") else ":" if self.reference else ""
        path = f"/{self.path}" if self.path else ""
        return f"{self.origin}{path}{joint}{self.reference}"


def is_location(path: str | os.PathLike[str]) -> bool:
    """Whether a path is meant as a location.

    Raises:
        ConfigError: it was a location until pathlib took one of its two slashes.
    """
    text = os.fspath(path)
    if isinstance(path, str):
        return _ADDRESS.fullmatch(text) is not None
    if _has_lost_a_slash(text):
        raise ConfigError(
            f"{text} was a location before it became a path: a slash is lost",
            hint="give it as a str, and not as a pathlib.Path",
        )
    return False


def has_location(paths: Iterable[str | os.PathLike[str]]) -> bool:
    """Whether one of some paths is a location."""
    return any(isinstance(path, str) and is_location(path) for path in paths)


def _has_lost_a_slash(text: str) -> bool:
    return bool(_LOST.match(text)) and not os.path.lexists(text)


def need_folder(path: str | os.PathLike[str], *, new: bool = False) -> None:
    """ConfigError where a path is a location, or was one before pathlib took a slash.

    ``new``: a model is written there, and not read.
    """
    if _has_lost_a_slash(os.fspath(path)) or is_location(path):
        raise ConfigError(
            f"{os.fspath(path)} is not a folder of this machine, which this needs",
            hint="name a folder here, and copy it there, or push it, afterwards"
            if new
            else "copy the model to a folder first",
        )


def _check_host(text: str, scheme: str, host: str) -> None:
    if scheme in BUCKETS:
        if not _BUCKET.fullmatch(host):
            raise _refused(text, f"{host[:80]!r} is no name of a bucket")
        return
    name, port = re.fullmatch(r"(.*?)(?::([0-9]{0,5}))?", host, re.DOTALL).groups()  # type: ignore[union-attr]
    if not _HOST.fullmatch(name) or (port is not None and not (port and 0 < int(port) < 65536)):
        raise _refused(text, f"{host[:80]!r} is no host")
    if scheme == "http" and not is_loopback(host):
        raise ConfigError(
            f"{text} is read over plain HTTP, which is for this machine alone",
            hint=f"write https://{host}, or for this machine http://127.0.0.1",
        )


def _reference(text: str, path: str) -> tuple[str, str]:
    repository, at, digest = path.partition("@")
    tag = ""
    if not at:
        repository, _, tag = path.partition(":")
    if not _REPOSITORY.fullmatch(repository) or len(repository) > 255:
        raise _refused(text, f"{repository[:80]!r} is no name of a repository")
    if not (DIGEST.fullmatch(digest) if at else _TAG.fullmatch(tag)):
        raise ConfigError(
            f"{text} names no tag and no digest that there can be",
            hint="write oci://HOST/REPOSITORY:TAG or oci://HOST/REPOSITORY@sha256:DIGEST",
        )
    return repository, digest or tag


def _refused(text: str, why: str) -> ConfigError:
    return ConfigError(
        f"the location {text[:200]} is refused: {why}",
        hint="https://HOST/PATH, s3://BUCKET/PATH or oci://HOST/REPOSITORY:TAG; a folder of this "
        "name: ./" + text[:200],
    )
