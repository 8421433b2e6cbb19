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
    "Shard",
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

    # While completing, no callback has run, and errors are not shown.
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
    """``provider:key``: providers while several fit, then the keys of the only one."""
    before, plus, last = incomplete.rpartition("+")
    name, colon, _ = last.partition(":")
    if not colon:
        names = complete_provider(context, last)
        if len(names) != 1:
            return [f"{before}{plus}{each}:" for each in names]
        # A shell ends the word after the only completion, so go on to the keys at once.
        name = names[0]
    # If the keys cannot be listed, complete as far as the colon.
    candidates = [f"{before}{plus}{name}:{key}" for key in _keys_of(context, name) or [""]]
    return [each for each in candidates if each.startswith(incomplete)]


def complete_group(context: typer.Context, incomplete: str) -> list[str]:
    """Values of ``--to``: keys, and recipient files after an ``@``; joined by ``+``."""
    before, plus, last = incomplete.rpartition("+")
    if not last.startswith("@"):
        return complete_key(context, incomplete)
    folder, slash, name = last[1:].rpartition("/")
    files = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder + slash or "."):
            hidden = entry.name.startswith(".") and not name
            if entry.name.startswith(name) and not hidden:
                end = "/" if entry.is_dir() else ""
                files.append(f"{before}{plus}@{folder}{slash}{entry.name}{end}")
    return sorted(files)


def complete_member(context: typer.Context, incomplete: str) -> list[str]:
    """Values of ``--drop``: the groups of the named model, as ``inspect`` shows them."""
    import keymgmt
    from keymgmt._remote.location import need_folder

    try:
        model = _first_word(context)
        need_folder(model)  # no server is asked while somebody types
        groups = keymgmt.inspect(model).groups
    except KeymgmtError:
        return []
    return sorted(
        each for each in {"+".join(group) for group in groups} if each.startswith(incomplete)
    )


def _first_word(context: typer.Context) -> str:
    # The word is not among the parsed parameters yet: parsing ended at the option that lacks its
    # value.
    return context.args[0] if context.args else ""


def complete_kind(context: typer.Context, incomplete: str) -> list[str]:
    """Kinds of keys that the provider of ``PROVIDER:KEY`` can create; with ``--sign``, to sign."""
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
        # While a person types, no key service is logged in to and no secret is asked for.
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
    """Read ``NAME=VALUE`` options; ConfigError for other text and for a repeated name."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or name in pairs:
            raise ConfigError(f"not an option: {text!r}", hint="write NAME=VALUE, each name once")
        pairs[name] = value
    return pairs


def moment(text: str) -> datetime:
    """``30d``, ``12h``, or a UTC time in the form of manifest.json; else ConfigError."""
    unit = {"d": "days", "h": "hours"}.get(text[-1:])
    if unit and text[:-1].isascii() and text[:-1].isdigit() and len(text) <= 6:
        return datetime.now(UTC) + timedelta(**{unit: int(text[:-1])})
    return utc_time(text, ways="30d, 12h, or ")


def utc_time(text: str, *, ways: str = "") -> datetime:
    """A UTC time in the form of manifest.json; else ConfigError, with ``ways`` in its hint."""
    from keymgmt.sealed.times import is_time

    try:
        if is_time(text):
            return datetime.fromisoformat(text)
    except ValueError:
        pass  # the 31st of February
    raise ConfigError(f"not a time: {text!r}", hint=f"write it as {ways}2027-01-31T00:00:00Z")


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
        help="Who opens the model: PROVIDER:KEY or @FILE (a recipient file); several joined by '+' "
        "open it only together. Repeat it for another group that opens the model alone.",
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
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Of a tree, only the I-th of N parts; the others run elsewhere, or later.",
    ),
]
Expires = Annotated[
    str | None,
    typer.Option(
        "--expires",
        metavar="30d|12h|TIME",
        help="Until when the signature counts; `sign` can set a new time later.",
    ),
]
Fingerprint = Annotated[
    list[str] | None,
    typer.Option(
        "--fingerprint",
        metavar="HEX",
        help="Fingerprint of a recipient file that no trusted signer vouches for; may be repeated.",
    ),
]
