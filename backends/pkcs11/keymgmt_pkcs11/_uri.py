"""RFC 7512 ``pkcs11:`` URIs, read strictly: anything outside of the grammar is an error.

Attribute names are case-sensitive, none occurs twice, text is UTF-8, ``id`` is bytes. Attributes
of vendors are kept, so that the caller can refuse them by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote_to_bytes

from keymgmt.backend import ConfigError

__all__ = ["TOKEN", "Pkcs11Uri"]

TOKEN: Final = frozenset(
    {
        *("token", "manufacturer", "serial", "model", "library-manufacturer"),
        *("library-description", "library-version"),
        *("slot-manufacturer", "slot-description", "slot-id"),
    }
)
"""Attributes that select a token."""
_PATH: Final = TOKEN | {"object", "type", "id"}
_QUERY: Final = frozenset({"pin-source", "pin-value", "module-name", "module-path"})
# The grammar of a value, and an example of it.
_VALUES: Final = {
    "type": ("public|private|cert|secret-key|data", "private"),
    "slot-id": ("[0-9]{1,20}", "7"),
    "library-version": (r"[0-9]{1,3}(\.[0-9]{1,3})?", "3.1"),
}
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
# The separator of two attributes, and pk11-pchar or pk11-qchar (RFC 7512, section 2.3).
_ESCAPE: Final = r"%[0-9A-Fa-f]{2}"
_PARTS: Final = {
    "path": (";", re.compile(rf"(?:[A-Za-z0-9._~:\[\]@!$'()*+,=&-]|{_ESCAPE})*")),
    "query": ("&", re.compile(rf"(?:[A-Za-z0-9._~:\[\]@!$'()*+,=/?|-]|{_ESCAPE})*")),
}
MAX_LENGTH: Final = 4096


@dataclass(frozen=True)
class Pkcs11Uri:
    """The attributes of one URI, decoded.

    Attributes:
        path: name -> text of the attributes before ``?``, without ``id``.
        id: CKA_ID, or None where the URI has none.
        query: name -> text of the attributes after ``?``.
        vendor: attributes that RFC 7512 does not define, from both parts; in the query a name may
            have several values.
    """

    path: Mapping[str, str] = field(default_factory=dict)
    id: bytes | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    vendor: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Pkcs11Uri:
        """Read a URI; the ConfigError for a wrong URI never repeats a value, which may be a PIN."""
        if len(text) > MAX_LENGTH:
            raise _wrong(f"it is longer than {MAX_LENGTH} characters")
        scheme, colon, rest = text.partition(":")
        if not colon or scheme.lower() != "pkcs11":
            raise _wrong("it does not begin with 'pkcs11:'")
        before, _, after = rest.partition("?")
        values: dict[str, dict[str, str]] = {"path": {}, "query": {}}
        identifier: bytes | None = None
        vendor: dict[str, tuple[str, ...]] = {}
        for part, name, raw in (*_attributes("path", before), *_attributes("query", after)):
            home = "path" if name in _PATH else "query" if name in _QUERY else None
            if home not in (part, None):
                raise _wrong(f"{name!r} belongs {'before' if home == 'path' else 'after'} '?'")
            # RFC 7512 lets a vendor's attribute occur several times in the query.
            if name in values[part] or (home is None and part == "path" and name in vendor):
                raise _wrong(f"{name!r} occurs twice")
            if name == "id":
                identifier = unquote_to_bytes(raw)
                values[part][name] = ""
            elif home is None:
                vendor[name] = (*vendor.get(name, ()), _text(name, raw))
            else:
                values[part][name] = _text(name, raw)
        path, query = values["path"], values["query"]
        path.pop("id", None)
        for name, (grammar, words) in _VALUES.items():
            if not re.fullmatch(grammar, path.get(name, words)):
                raise _wrong(f"{name!r} is not like {words}")
        if "pin-source" in query and "pin-value" in query:
            raise _wrong("it has both 'pin-source' and 'pin-value'")
        return cls(path, identifier, query, vendor)


def _attributes(part: str, text: str) -> Iterator[tuple[str, str, str]]:
    separator, grammar = _PARTS[part]
    for attribute in text.split(separator) if text else ():
        name, equals, raw = attribute.partition("=")
        if not _NAME.fullmatch(name):
            raise _wrong(f"an attribute has no valid name: {name[:40]!r}")
        if not equals:
            raise _wrong(f"{name!r} has no '='")
        # The value may be a PIN, so it is not shown.
        if not grammar.fullmatch(raw):
            raise _wrong(f"the value of {name!r} has a character that must be written as %XX")
        yield part, name, raw


def _text(name: str, raw: str) -> str:
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise _wrong(f"the value of {name!r} is not UTF-8") from None


def _wrong(reason: str) -> ConfigError:
    return ConfigError(
        f"not a pkcs11: URI (RFC 7512): {reason}",
        hint="an example is pkcs11:token=Model%20Keys;serial=0123456789abcdef",
    )
