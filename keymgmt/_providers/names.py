"""Key names: one strict grammar, checked before a name reaches a URL, a path or a token.

A key is written ``provider:key``, and a version of that key ``provider:key@version``. No part has a
slash or ``..`` in it: the key name ``../../auth/token/revoke-self``, which a client put into a URL
of a Vault server, really revoked the client's token when that was tried.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from keymgmt.errors import ConfigError

__all__ = ["KEY", "VERSION", "KeyRef", "check_key", "is_key", "is_name", "is_version"]

KEY: Final = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
VERSION: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?"
_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,30}[a-z0-9])?")
_KEY: Final = re.compile(KEY)
_VERSION: Final = re.compile(VERSION)
_KEY_HELP: Final = (
    "lower-case letters, digits, '.', '_' and '-', at most 64, "
    "beginning and ending with a letter or digit, without '..'"
)


def is_key(text: object) -> bool:
    """Whether ``text`` is a key name."""
    return isinstance(text, str) and bool(_KEY.fullmatch(text)) and ".." not in text


def is_version(text: object) -> bool:
    """Whether ``text`` is a key version as a provider reports it, at most 128 characters."""
    return isinstance(text, str) and bool(_VERSION.fullmatch(text)) and ".." not in text


def is_name(text: object) -> bool:
    """Whether ``text`` is the name of a provider or backend, at most 32 characters."""
    return isinstance(text, str) and bool(_NAME.fullmatch(text))


def check_key(text: str) -> str:
    """Return ``text`` if it is a key name, else raise ConfigError.

    Every provider calls this before it uses a name, whoever gave it.
    """
    if not is_key(text):
        raise ConfigError(f"not a key name: {text[:80]!r}", hint=f"a key name has {_KEY_HELP}")
    return text


class KeyRef(NamedTuple):
    """``provider:key`` or ``provider:key@version``, as an operator writes it."""

    provider: str
    key: str
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> KeyRef:
        """Read ``provider:key[@version]``; ConfigError for any other text."""
        provider, colon, rest = text.partition(":")
        key, at, version = rest.partition("@")
        if not colon or not is_name(provider) or (at and not is_version(version)):
            raise ConfigError(
                f"not a key reference: {text[:120]!r}",
                hint="write provider:key or provider:key@version, such as local:release@2",
            )
        return cls(provider, check_key(key), version if at else None)

    def __str__(self) -> str:
        return f"{self.provider}:{self.key}" + (f"@{self.version}" if self.version else "")


def check_model_name(name: str) -> str:
    """Return ``name`` if it is a valid model name (the grammar of key names), else ConfigError."""
    if not is_key(name):
        raise ConfigError(
            f"not a model name: {name[:80]!r}",
            hint="lower-case letters, digits, '.', '_' and '-', at most 64",
        )
    return name


def parse_group(text: str) -> tuple[str, ...]:
    """Split one ``--to`` group, ``a:x+b:y+@file``, into its members; ConfigError if malformed."""
    members = tuple(text.split("+"))
    for member in members:
        if not member.startswith("@"):
            KeyRef.parse(member)
        elif member == "@":
            raise ConfigError(f"{text!r} names no recipient file after '@'")
    if len(set(members)) != len(members):
        raise ConfigError(
            f"{text!r} names the same key twice",
            hint="the shares of a group go to different keys; name each once",
        )
    return members
