"""Commands of other distributions: entry points of group ``keymgmt.commands``.

Imported when run and never for ``--help``, whose line is the first of the module's docstring, read
from its source. Ours cannot be shadowed. A broken one is explained and harms no other.
"""

from __future__ import annotations

import ast
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Final

import typer
from typer.core import TyperGroup

from keymgmt._registry import installed_entry_points
from keymgmt.errors import ConfigError

__all__ = ["GROUP", "CommandGroup", "announced"]

GROUP: Final = "keymgmt.commands"


def announced() -> dict[str, list[EntryPoint]]:
    """Announced commands by name; a name with more than one entry is ambiguous."""
    found: dict[str, dict[tuple[str, str], EntryPoint]] = {}
    for entry in installed_entry_points(GROUP):
        found.setdefault(entry.name, {}).setdefault((_source(entry), entry.value), entry)
    return {name: list(found[name].values()) for name in sorted(found)}


class CommandGroup(TyperGroup):
    """Our commands, then those of other distributions, which load when they are run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Name every command: ours in our order, then the others in theirs."""
        ours = super().list_commands(ctx)
        return [*ours, *(name for name in announced() if name not in ours)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Ours, or a stand-in that has only a help line; None for an unknown name."""
        command: Any = super().get_command(ctx, cmd_name)
        if command is None and (entries := announced().get(cmd_name)):
            stand_in = typer.Typer(name=cmd_name, help=_summary(entries[0]))
            stand_in.callback()(lambda: None)
            command = typer.main.get_command(stand_in)
            command.rich_help_panel = "From other distributions"
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that runs, and import it if it is another distribution's."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and super().get_command(ctx, name) is None:
            command = typer.main.get_command(_load(announced()[name]))
            command.name = name
        return name, command, rest


def _load(entries: list[EntryPoint]) -> typer.Typer:
    entry = entries[0]
    if len(entries) > 1:
        names = " and ".join(_source(each) for each in entries)
        raise ConfigError(
            f"the command {entry.name!r} is provided twice, by {names}", hint="uninstall one"
        )
    source = f"the command {entry.name!r} of {_source(entry)}"
    try:
        loaded = entry.load()
    except Exception as error:
        raise ConfigError(
            f"{source} fails to import: {type(error).__name__}: {error}",
            hint=f"repair it with: pip install --force-reinstall {_source(entry)}",
        ) from error
    if not isinstance(loaded, typer.Typer):
        raise ConfigError(f"{source} is no typer.Typer", hint="report it to its author")
    return loaded


def _source(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "an unknown distribution"


def _summary(entry: EntryPoint) -> str:
    line = (_docstring(entry.module) or "").partition("\n")[0]
    return f"{line} ({_source(entry)})" if line else f"From {_source(entry)}."


def _docstring(module: str) -> str | None:
    # PathFinder is asked part by part, because importlib.util.find_spec imports the parents.
    path: list[str] | None = None
    origin: str | None = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return None
        path, origin = list(spec.submodule_search_locations or []), spec.origin
    if origin is None or not origin.endswith(".py"):
        return None
    try:
        return ast.get_docstring(ast.parse(Path(origin).read_bytes()))
    except (OSError, SyntaxError, ValueError):
        return None
