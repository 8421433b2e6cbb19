"""RFC 7512 ``pkcs11:`` URIs that name a token, read strictly: anything else is an error.

Attribute names are case-sensitive, none occurs twice, and text is UTF-8. What names a key, holds a
PIN or belongs to a vendor is refused by name.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

__all__ = ["parse_uri"]

MAX_LENGTH: Final = 4096
_TOKEN: Final = frozenset(
    {
        *("token", "manufacturer", "serial", "model", "library-manufacturer"),
        *("library-description", "library-version"),
        *("slot-manufacturer", "slot-description", "slot-id"),
    }
)
_KEY: Final = "it must name the token only; name keys in the table keys"
_PIN: Final = 'it must not hold a PIN; set pin = { file = "PATH" }'
_REFUSED: Final = {
    **dict.fromkeys(("object", "type", "id"), _KEY),
    **dict.fromkeys(("pin-value", "pin-source"), _PIN),
    "module-name": "module-name is not a path; use module-path, or the setting module",
}
# The grammar of a value, and an example of it.
_VALUES: Final = {
    "slot-id": ("[0-9]{1,20}", "7"),
    "library-version": (r"[0-9]{1,3}(\.[0-9]{1,3})?", "3.1"),
    "module-path": ("/.*", "an absolute path"),
}
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
# The separator of two attributes, and pk11-pchar or pk11-qchar (RFC 7512, section 2.3).
_ESCAPE: Final = r"%[0-9A-Fa-f]{2}"
_PATH: Final = (";", re.compile(rf"(?:[A-Za-z0-9._~:\[\]@!$'()*+,=&-]|{_ESCAPE})*"))
_QUERY: Final = ("&", re.compile(rf"(?:[A-Za-z0-9._~:\[\]@!$'()*+,=/?|-]|{_ESCAPE})*"))


def parse_uri(text: str) -> dict[str, str]:
    """Read a URI: name -> text of the attributes of the token, and ``module-path``.

    Raises:
        ValueError: it is no such URI; the message never repeats a value, which may be a PIN.
    """
    try:
        return _parse(text)
    except ValueError as error:
        raise ValueError(
            f"not a pkcs11: URI of a token (RFC 7512): {error}; an example is "
            "pkcs11:token=Model%20Keys;serial=6f181d4b43e4b153"
        ) from None


def _parse(text: str) -> dict[str, str]:
    if len(text) > MAX_LENGTH:
        raise ValueError(f"it is longer than {MAX_LENGTH} characters")
    scheme, colon, rest = text.partition(":")
    if not colon or scheme.lower() != "pkcs11":
        raise ValueError("it does not begin with 'pkcs11:'")
    before, _, after = rest.partition("?")
    found: dict[str, str] = {}
    for where, part, (separator, grammar), known in (
        ("before", before, _PATH, _TOKEN),
        ("after", after, _QUERY, {"module-path"}),
    ):
        for attribute in part.split(separator) if part else ():
            name, equals, raw = attribute.partition("=")
            if not _NAME.fullmatch(name):
                raise ValueError(f"an attribute has no valid name: {name[:40]!r}")
            if name in _REFUSED:
                raise ValueError(_REFUSED[name])
            if name not in known:
                raise ValueError(f"the attribute {name[:40]!r} is not known {where} '?'")
            if name in found:
                raise ValueError(f"{name!r} occurs twice")
            if not equals:
                raise ValueError(f"{name!r} has no '='")
            if not grammar.fullmatch(raw):
                raise ValueError(
                    f"the value of {name!r} has a character that must be written as %XX"
                )
            found[name] = _decoded(name, raw)
    return found


def _decoded(name: str, raw: str) -> str:
    try:
        value = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise ValueError(f"the value of {name!r} is not UTF-8") from None
    grammar, words = _VALUES.get(name, (".*", ""))
    if not re.fullmatch(grammar, value, re.DOTALL):
        raise ValueError(f"{name!r} is not like {words}")
    return value
