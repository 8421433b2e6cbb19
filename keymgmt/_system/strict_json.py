"""JSON that is bounded and has no duplicate members, no floats and no surprises.

Where it is canonical (RFC 8785), a reader accepts exactly the bytes that a writer makes, so what
was signed or hashed is what was read.
"""

from __future__ import annotations

import binascii
import json
import re
from typing import Any, Final, NoReturn

import rfc8785

from keymgmt.errors import FormatError

__all__ = ["MAX_INTEGER", "JsonReader", "base64_bytes", "dump_json", "load_json"]

MAX_INTEGER: Final = (1 << 53) - 1
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})*")


def dump_json(value: Any) -> bytes:
    """Encode objects, arrays, strings, integers and null as RFC 8785; FormatError for odd text."""
    text = _ENCODER.encode(value)
    if text.isascii():
        # Of strings in ASCII, integers and null this is RFC 8785 already (a test compares), and
        # a policy of ten thousand recipients is read ten times as fast.
        return text.encode()
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeError) as error:
        raise FormatError(f"the value cannot be written as canonical JSON: {error}") from error


class _Refused(ValueError):
    """What is wrong in a file, whose name is not known here."""


def _integer(text: str) -> int:
    # The length is looked at first: converting a long number takes quadratic time.
    if len(text) > 17 or abs(int(text)) > MAX_INTEGER:
        raise _Refused("holds an integer of 2^53 or more")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise _Refused(f"holds {text[:20]!r}, and only integers are numbers here")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    object_ = dict(pairs)
    if len(object_) != len(pairs):
        raise _Refused("has a member twice")
    return object_


# Made once, because making them takes as long as reading a small file.
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
_DECODER: Final = json.JSONDecoder(
    parse_int=_integer,
    parse_float=_refuse,
    parse_constant=_refuse,
    object_pairs_hook=_members,
)


def load_json(
    data: bytes | bytearray,
    label: str,
    limit: int,
    parts: int = MAX_INTEGER,
    *,
    canonical: bool = True,
) -> JsonReader:
    """Decode one JSON object of at most ``limit`` bytes.

    Args:
        data: the bytes as read.
        label: name of the file, for messages.
        limit: bound in bytes, looked at before anything is parsed.
        parts: bound of its members and elements (an empty array or object counts as one), looked at
            before anything is parsed.
        canonical: whether only its one spelling of RFC 8785 is accepted.

    Raises:
        FormatError: the file is too large, not UTF-8, not JSON, not an object, or not spelled as
            RFC 8785 spells it.
    """
    if len(data) > limit:
        raise FormatError(f"{label} is larger than {limit} bytes")
    if _has_more_parts(data, parts):
        raise FormatError(f"{label} has more than {parts} members and elements")

    try:
        value = _DECODER.decode(data.decode("utf-8", "strict"))
        spelled = dump_json(value) if canonical else data
    except FormatError:
        raise
    except _Refused as error:
        raise FormatError(f"{label} {error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{label} is not JSON: {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{label} is not a JSON object")
    if spelled != data:
        raise FormatError(
            f"{label} is not in its canonical form (RFC 8785)",
            hint="it was edited or reformatted; fetch it again as it was published",
        )
    return JsonReader(value, label)


def _has_more_parts(data: bytes | bytearray, parts: int) -> bool:
    """Whether JSON has more members and elements: each is an object, of many times its bytes.

    Outside of strings each begins after a comma or bracket, and it has at most two strings.
    """
    plain = data.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > 4 * parts:
        return True
    outside = b"".join(plain.split(b'"')[::2])
    return sum(map(outside.count, (b",", b"[", b"{"))) > parts


def base64_bytes(text: str, label: str) -> bytes:
    """Decode standard base64 with padding, in its one canonical spelling; else FormatError."""
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{label} is not base64") from error
    if binascii.b2a_base64(data, newline=False) != text.encode():
        raise FormatError(f"{label} is not canonical base64")
    return data


class JsonReader:
    """Takes members out of one JSON object, each once and of one type; the rest is refused."""

    def __init__(self, value: Any, label: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{label} is not a JSON object")
        self._left: dict[str, Any] = dict(value)
        self._label = label

    def _take(self, name: str, kind: type[Any], called: str) -> Any:
        if name not in self._left:
            raise FormatError(f"{self._label} has no {name}")
        value = self._left.pop(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FormatError(f"{name} in {self._label} is not {called}")
        return value

    def text(self, name: str, *, limit: int) -> str:
        """A string of at most ``limit`` characters."""
        value: str = self._take(name, str, "a string")
        if len(value) > limit:
            raise FormatError(f"{name} in {self._label} is longer than {limit} characters")
        return value

    def text_or_none(self, name: str, *, limit: int) -> str | None:
        """A string of at most ``limit`` characters, or null."""
        if name in self._left and self._left[name] is None:
            del self._left[name]
            return None
        return self.text(name, limit=limit)

    def integer(self, name: str, *, least: int = 0, most: int = MAX_INTEGER) -> int:
        """An integer from ``least`` to ``most``."""
        value: int = self._take(name, int, "an integer")
        if not least <= value <= most:
            raise FormatError(f"{name} in {self._label} is not between {least} and {most}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._left.pop(name, None)
        if not isinstance(value, bool):
            raise FormatError(f"{name} in {self._label} is not true or false")
        return value

    def hex(self, name: str, *, length: int) -> bytes:
        """Exactly ``length`` bytes as lower-case hexadecimal."""
        value = self.text(name, limit=2 * length)
        if len(value) != 2 * length or not _HEX.fullmatch(value):
            raise FormatError(f"{name} in {self._label} is not {length} bytes in lower-case hex")
        return bytes.fromhex(value)

    def base64(self, name: str, *, limit: int) -> bytes:
        """At most ``limit`` bytes as canonical base64."""
        text = self.text(name, limit=(limit + 2) // 3 * 4)
        data = base64_bytes(text, f"{name} in {self._label}")
        if len(data) > limit:
            raise FormatError(f"{name} in {self._label} is longer than {limit} bytes")
        return data

    def array(self, name: str, *, least: int, most: int) -> list[Any]:
        """An array of ``least`` to ``most`` elements."""
        value: list[Any] = self._take(name, list, "an array")
        if not least <= len(value) <= most:
            raise FormatError(
                f"{name} in {self._label} has {len(value)} elements, not {least} to {most}"
            )
        return value

    def texts(self, name: str, *, most: int, key_limit: int, limit: int) -> dict[str, str]:
        """An object of at most ``most`` strings, each at most ``limit`` characters."""
        value = self.members(name)
        if len(value) > most:
            raise FormatError(f"{name} in {self._label} has more than {most} members")
        for key, text in value.items():
            if len(key) > key_limit or not isinstance(text, str) or len(text) > limit:
                raise FormatError(
                    f"{name} in {self._label} has a member that is not a string of at most {limit} "
                    f"characters, with a name of at most {key_limit}"
                )
        return value

    def members(self, name: str) -> dict[str, Any]:
        """An object; its members are not checked."""
        value: dict[str, Any] = self._take(name, dict, "an object")
        return value

    def object_or_none(self, name: str) -> JsonReader | None:
        """An object, to be read the same way, or null."""
        if name in self._left and self._left[name] is None:
            del self._left[name]
            return None
        return JsonReader(self.members(name), f"{name} of {self._label}")

    def names(self) -> list[str]:
        """The members that nobody took yet."""
        return list(self._left)

    def rest(self) -> dict[str, Any]:
        """The members that nobody took, for a file that others may add to; nobody takes them."""
        value, self._left = self._left, {}
        return value

    def version(self, expected: str, hint: str) -> None:
        """The member ``format``, which must equal ``expected``."""
        value = self.text("format", limit=64)
        if value != expected:
            raise FormatError(
                f"{self._label} has the format {value!r}; this reader knows {expected!r}", hint=hint
            )

    def end(self) -> None:
        """Refuse members that nobody took."""
        if self._left:
            name = min(self._left)
            raise FormatError(f"{self._label} has an unknown member: {name[:40]!r}")
