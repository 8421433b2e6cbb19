"""Commands of other distributions: entry points of group ``keymgmt.commands``.

A command is imported when it is run, and never for ``--help``, which shows the summary of its
distribution. They cannot shadow a command of keymgmt. A broken command is reported when it is run,
and harms no other.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import typer
from typer.core import TyperGroup

from keymgmt.cli._commands import own_commands
from keymgmt.cli._everywhere import adopt
from keymgmt.cli._lazy import LazyCommand
from keymgmt.errors import ConfigError, printable

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["GROUP", "CommandGroup", "announced"]

GROUP: Final = "keymgmt.commands"
_OTHERS: Final = "From other distributions"
# Commands of our own distributions, by the extra that brings them.
_EXTRAS: Final = {
    **{name: name for name in ("aws", "demo", "file", "pkcs11", "vault")},
    "broker": "service",
    "leakcheck": "demo",
    "run": "openvino",
    "tpm": "tpm2",
}


def announced() -> dict[str, list[EntryPoint]]:
    """Announced commands by name; a name with more than one entry is ambiguous."""
    # Imported here, since it imports the package email, and most runs need no other distribution.
    from keymgmt._system import entry_points

    return entry_points.announced(GROUP)


class CommandGroup(TyperGroup):
    """Our commands, then those of other distributions; each is loaded when it is run."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        adopt(self)
        self.commands = {str(command.name): command for command in own_commands()}
        self._looked = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Name every command: ours in our order, then the others in theirs."""
        self._look_for_others()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, as help and completion need it; None if it is unknown."""
        if cmd_name not in self.commands:
            self._look_for_others()
        return super().get_command(ctx, cmd_name)

    def _look_for_others(self) -> None:
        """Add the commands of other distributions, once and only if needed, since it is slow."""
        if not self._looked:
            self._looked = True
            for name, entries in announced().items():
                other = LazyCommand(name, _line(entries[0]), _OTHERS, partial(_load, entries))
                self.commands.setdefault(name, other)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands by panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            rows = panels.setdefault(command.rich_help_panel, [])
            rows.append((name, command.get_short_help_str()))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)

    def invoke(self, ctx: Any) -> None:
        """Run the named command; the value that its function returns is not an exit code."""
        super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that runs, or is completed, and load it."""
        if args and args[0] in _EXTRAS and self.get_command(ctx, args[0]) is None:
            raise ConfigError(
                f"the command {args[0]!r} is not installed",
                hint=f'pip install "keymgmt[{_EXTRAS[args[0]]}]"',
            )
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and cast("LazyCommand", command).load(), rest


def _load(entries: list[EntryPoint]) -> typer.Typer:
    from keymgmt._system.entry_points import source_of

    entry = entries[0]
    if len(entries) > 1:
        names = " and ".join(source_of(each) for each in entries)
        raise ConfigError(
            f"the command {entry.name!r} is provided twice, by {names}", hint="uninstall one"
        )
    source = f"the command {entry.name!r} of {source_of(entry)}"
    try:
        loaded = entry.load()
    except Exception as error:
        raise ConfigError(
            f"{source} fails to import: {type(error).__name__}: {error}",
            hint=f"repair it with: pip install --force-reinstall {source_of(entry)}",
        ) from error
    if not isinstance(loaded, typer.Typer):
        raise ConfigError(f"{source} is not a typer.Typer", hint="report it to its author")
    return loaded


def _line(entry: EntryPoint) -> str:
    from keymgmt._system.entry_points import source_of

    summary = entry.dist and entry.dist.metadata.json.get("summary")
    return printable(f"From {source_of(entry)}" + (f": {summary}" if summary else "."))
