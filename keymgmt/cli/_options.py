"""Options and arguments that several commands share, and what the shell completes for them."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final

import typer

from keymgmt.cli._everywhere import state_of
from keymgmt.errors import ConfigError, KeymgmtError

__all__ = [
    "Expires",
    "Fingerprint",
    "Force",
    "Group",
    "Json",
    "Key",
    "Model",
    "ModelOrTree",
    "Name",
    "Provider",
    "Sign",
    "complete_group",
    "complete_key",
    "complete_kind",
    "complete_member",
    "complete_provider",
    "complete_registry",
    "moment",
    "option_pairs",
    "place",
    "utc_time",
]

_COMPLETION_SECONDS: Final = 2.0
_ASKS: Final = {"prompt", "keyring"}


def _names(context: typer.Context, *path: str) -> list[str]:
    """Names in a table of the config: read from the file, since checking it imports pydantic."""
    from keymgmt._config.locate import find_config, read_config

    # While completing, no callback has run, and what is wrong is not said.
    try:
        table: object = read_config(state_of(context).path or find_config())
    except KeymgmtError:
        return []
    for name in path:
        table = table.get(name) if isinstance(table, dict) else None
    return list(table) if isinstance(table, dict) else []


def complete_provider(context: typer.Context, incomplete: str) -> list[str]:
    """Names of configured providers."""
    return [name for name in _names(context, "providers") if name.startswith(incomplete)]


def complete_registry(context: typer.Context, incomplete: str) -> list[str]:
    """Registries that the config has a table of access for, as far as the slash behind them."""
    places = [name for name in _names(context, "remote", "access") if name.startswith("oci://")]
    return [f"{each}/" for each in places if f"{each}/".startswith(incomplete)]


def complete_key(context: typer.Context, incomplete: str) -> list[str]:
    """``provider:key``: providers while there are several, then the keys that the one lists."""
    before, plus, last = incomplete.rpartition("+")
    name, colon, _ = last.partition(":")
    if not colon:
        names = complete_provider(context, last)
        if len(names) != 1:
            return [f"{before}{plus}{each}:" for each in names]
        # At once to its keys: a shell ends the word after a completion that is the only one.
        name = names[0]
    # Where they are not to be had, as far as the colon.
    candidates = [f"{before}{plus}{name}:{key}" for key in _keys_of(context, name) or [""]]
    return [each for each in candidates if each.startswith(incomplete)]


def complete_group(context: typer.Context, incomplete: str) -> list[str]:
    """What ``--to`` takes: keys, and recipient files after an ``@``; joined by ``+``."""
    before, plus, last = incomplete.rpartition("+")
    if not last.startswith("@"):
        return complete_key(context, incomplete)
    folder, slash, name = last[1:].rpartition("/")
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder + slash or "."):
            hidden = entry.name.startswith(".") and not name
            if entry.name.startswith(name) and not hidden:
                end = "/" if entry.is_dir() else ""
                found.append(f"{before}{plus}@{folder}{slash}{entry.name}{end}")
    return sorted(found)


def complete_member(context: typer.Context, incomplete: str) -> list[str]:
    """What ``--drop`` takes: the groups of the model that is named, as ``inspect`` shows them."""
    import keymgmt

    try:
        groups = keymgmt.inspect(_first_word(context)).groups
    except KeymgmtError:
        return complete_key(context, incomplete)
    return sorted(
        each for each in {"+".join(group) for group in groups} if each.startswith(incomplete)
    )


def _first_word(context: typer.Context) -> str:
    # Not among the parameters: the option that is completed lacks its value, and ends the parsing.
    return context.args[0] if context.args else ""


def complete_kind(context: typer.Context, incomplete: str) -> list[str]:
    """Kinds of key that the provider of ``PROVIDER:KEY`` makes; those that sign with ``--sign``."""
    from keymgmt._providers.contract import SupportsKeyManagement

    try:
        name = _first_word(context).partition(":")[0]
        provider = state_of(context).config().provider(name)
    except KeymgmtError:
        return []
    kinds = provider.key_kinds if isinstance(provider, SupportsKeyManagement) else {}
    wanted = {"sign"} if context.params.get("sign") else {"wrap", "sign"}
    return [kind for kind, use in kinds.items() if use in wanted and kind.startswith(incomplete)]


def _keys_of(context: typer.Context, name: str) -> list[str]:
    from keymgmt._providers.contract import SupportsKeyManagement
    from keymgmt._system.deadline import within

    try:
        provider = state_of(context).config().provider(name)
        # A key service is not logged in to, and nobody is asked for a secret, while he types.
        if (
            not provider.local
            or not isinstance(provider, SupportsKeyManagement)
            or _asks(provider.settings.model_dump())
        ):
            return []
        found = within(_COMPLETION_SECONDS, f"completion from {name}", provider.list_keys)
    except KeymgmtError:
        return []
    return [info.key for info in found]


def _asks(settings: object) -> bool:
    if isinstance(settings, dict):
        return any((key in _ASKS and value) or _asks(value) for key, value in settings.items())
    return False


def place(text: str) -> str:
    """A path as pathlib writes it; or a location, of whose slashes pathlib would lose one."""
    from keymgmt._remote.location import is_location

    return text if is_location(text) else str(Path(text))


def option_pairs(texts: list[str]) -> dict[str, str]:
    """Read ``NAME=VALUE`` options; ConfigError where one is not that, or comes twice."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or name in pairs:
            raise ConfigError(f"not an option: {text!r}", hint="write NAME=VALUE, each name once")
        pairs[name] = value
    return pairs


def moment(text: str) -> datetime:
    """``30d``, ``12h``, or a UTC time as manifest.json has it; ConfigError for anything else."""
    unit = {"d": "days", "h": "hours"}.get(text[-1:])
    if unit and text[:-1].isascii() and text[:-1].isdigit() and len(text) <= 6:
        return datetime.now(UTC) + timedelta(**{unit: int(text[:-1])})
    return utc_time(text, ways="30d, 12h, or ")


def utc_time(text: str, *, ways: str = "") -> datetime:
    """A UTC time as manifest.json has it; ConfigError for anything else but, it says, ``ways``."""
    from keymgmt.sealed.times import is_time

    try:
        if is_time(text):
            return datetime.fromisoformat(text)
    except ValueError:
        pass  # the 31st of February
    raise ConfigError(f"no time: {text!r}", hint=f"write it as {ways}2027-01-31T00:00:00Z")


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace what exists.")]
Key = Annotated[
    str,
    typer.Argument(metavar="PROVIDER:KEY", help="A key.", autocompletion=complete_key),
]
Provider = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PROVIDER]...", help="Providers; else all.", autocompletion=complete_provider
    ),
]
Model = Annotated[str, typer.Argument(metavar="MODEL.sealed", help="A sealed model.", parser=place)]
ModelOrTree = Annotated[
    str,
    typer.Argument(
        metavar="MODEL.sealed|TREE", help="A sealed model, or many below.", parser=place
    ),
]
Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Refuse a model of another name.")
]
Group = Annotated[
    list[str] | None,
    typer.Option(
        "--to",
        metavar="GROUP",
        help="Who opens it: PROVIDER:KEY or @FILE (a recipient file); joined by '+', all of them "
        "together. Again for another group that opens it alone.",
        autocompletion=complete_group,
    ),
]

Sign = Annotated[
    str | None,
    typer.Option(
        "--sign",
        metavar="PROVIDER:KEY",
        help="The publisher's key; else that of the config.",
        autocompletion=complete_key,
    ),
]
Expires = Annotated[
    str | None,
    typer.Option(
        "--expires",
        metavar="30d|12h|TIME",
        help="Until when the signature counts; `sign` says so again, until when from now on.",
    ),
]
Fingerprint = Annotated[
    list[str] | None,
    typer.Option(
        "--fingerprint",
        metavar="HEX",
        help="Of a recipient file that no trusted signer vouches for; may come again.",
    ),
]
