"""RFC 7512 ``pkcs11:`` URIs, read strictly: what the grammar does not allow is an error.

Attribute names are case-sensitive, none occurs twice, text is UTF-8, ``id`` is bytes. Attributes
of vendors are read and kept, so that the caller can refuse them by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote_to_bytes

from keymgmt.backend import ConfigError

__all__ = ["Pkcs11Uri"]

_PATH_TEXT: Final = frozenset(
    {
        "token",
        "manufacturer",
        "serial",
        "model",
        "library-manufacturer",
        "library-description",
        "library-version",
        "object",
        "type",
        "id",
        "slot-manufacturer",
        "slot-description",
        "slot-id",
    }
)
_QUERY: Final = frozenset({"pin-source", "pin-value", "module-name", "module-path"})
_TYPES: Final = frozenset({"public", "private", "cert", "secret-key", "data"})
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
# pk11-pchar and pk11-qchar of RFC 7512, section 2.3.
_ESCAPE: Final = r"%[0-9A-Fa-f]{2}"
_PATH_VALUE: Final = re.compile(rf"(?:[A-Za-z0-9._~:\[\]@!$'()*+,=&-]|{_ESCAPE})*")
_QUERY_VALUE: Final = re.compile(rf"(?:[A-Za-z0-9._~:\[\]@!$'()*+,=/?|-]|{_ESCAPE})*")
MAX_LENGTH: Final = 4096


@dataclass(frozen=True)
class Pkcs11Uri:
    """The attributes of one URI, decoded.

    Attributes:
        path: name -> text of the attributes before ``?``, without ``id``.
        id: CKA_ID, or None where the URI has none.
        query: name -> text of the attributes after ``?``.
        vendor: attributes that RFC 7512 does not know, from both parts; a name may have several
            values in the query.
    """

    path: Mapping[str, str] = field(default_factory=dict)
    id: bytes | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    vendor: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Pkcs11Uri:
        """Read a URI; ConfigError says what is not of the grammar, and never repeats a PIN."""
        if len(text) > MAX_LENGTH:
            raise _wrong(f"it is longer than {MAX_LENGTH} characters")
        scheme, colon, rest = text.partition(":")
        if not colon or scheme.lower() != "pkcs11":
            raise _wrong("it does not begin with 'pkcs11:'")
        before, mark, after = rest.partition("?")
        path: dict[str, str] = {}
        query: dict[str, str] = {}
        vendor: dict[str, tuple[str, ...]] = {}
        identifier: bytes | None = None
        for name, raw in _attributes(before, ";", _PATH_VALUE):
            if name == "id":
                if identifier is not None:
                    raise _wrong("'id' occurs twice")
                identifier = unquote_to_bytes(raw)
            elif name in _PATH_TEXT:
                if name in path:
                    raise _wrong(f"{name!r} occurs twice")
                path[name] = _text(name, raw)
            elif name in _QUERY:
                raise _wrong(f"{name!r} belongs after '?'")
            elif name in vendor:
                raise _wrong(f"{name!r} occurs twice")
            else:
                vendor[name] = (_text(name, raw),)
        for name, raw in _attributes(after, "&", _QUERY_VALUE) if mark else ():
            if name in _QUERY:
                if name in query:
                    raise _wrong(f"{name!r} occurs twice")
                query[name] = _text(name, raw)
            elif name in _PATH_TEXT or name == "id":
                raise _wrong(f"{name!r} belongs before '?'")
            else:
                vendor[name] = (*vendor.get(name, ()), _text(name, raw))
        _check_values(path)
        if "pin-source" in query and "pin-value" in query:
            raise _wrong("it has both 'pin-source' and 'pin-value'")
        return cls(path, identifier, query, vendor)


def _attributes(part: str, separator: str, grammar: re.Pattern[str]) -> list[tuple[str, str]]:
    found = []
    for attribute in part.split(separator) if part else ():
        name, equals, raw = attribute.partition("=")
        if not _NAME.fullmatch(name):
            raise _wrong(f"an attribute has no valid name: {name[:40]!r}")
        if not equals:
            raise _wrong(f"{name!r} has no '='")
        # The value may be a PIN, so it is not shown.
        if not grammar.fullmatch(raw):
            raise _wrong(f"the value of {name!r} has a character that must be written as %XX")
        found.append((name, raw))
    return found


def _text(name: str, raw: str) -> str:
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise _wrong(f"the value of {name!r} is not UTF-8") from None


def _check_values(path: Mapping[str, str]) -> None:
    if path.get("type", "data") not in _TYPES:
        raise _wrong(f"'type' is none of {', '.join(sorted(_TYPES))}")
    if not re.fullmatch(r"[0-9]{1,20}", path.get("slot-id", "0")):
        raise _wrong("'slot-id' is no number")
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,3})?", path.get("library-version", "0")):
        raise _wrong("'library-version' is not like 3 or 3.1")


def _wrong(reason: str) -> ConfigError:
    return ConfigError(
        f"not a pkcs11: URI (RFC 7512): {reason}",
        hint="such as pkcs11:token=Model%20Keys;serial=0123456789abcdef",
    )
