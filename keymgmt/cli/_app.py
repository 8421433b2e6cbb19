"""The commands of ``keymgmt``.

Other distributions add commands by an entry point of group ``keymgmt.commands``: a name and a
``typer.Typer``. It is imported when it is run and never before. Its commands take a
``typer.Context`` whose ``obj`` is a ``State``: ``obj.config()`` is the loaded config, and
``obj.as_json`` whether JSON is to be printed. They raise errors of ``keymgmt.errors``, which are
printed for them, and print with ``keymgmt.console``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

import typer

import keymgmt
from keymgmt.cli import backends, doctor, exec, init, inspect, keys, plugin, rewrap, seal  # noqa: A004
from keymgmt.cli._completion import completion
from keymgmt.cli._everywhere import state_of
from keymgmt.cli._help import help_command
from keymgmt.cli._plugins import CommandGroup

__all__ = ["app"]

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"keymgmt {keymgmt.__version__}")
        raise typer.Exit


@app.callback()
def _keymgmt(
    context: typer.Context,
    _show_version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Ship models to machines you do not control: sealed at rest, opened in memory."""
    context.obj = state_of(context)
    context.call_on_close(context.obj.close)


SETUP: Final[list[Callable[..., None]]] = [init.init, backends.backends, doctor.doctor]
MODELS: Final[list[Callable[..., None]]] = [
    seal.seal,
    inspect.inspect,
    inspect.verify,
    seal.unseal,
    seal.sign,
    rewrap.rewrap,
    rewrap.reseal,
]
for command in SETUP:
    app.command(rich_help_panel="Keys and set-up")(command)
app.add_typer(keys.app, name="keys", rich_help_panel="Keys and set-up")
app.add_typer(plugin.app, name="plugin", rich_help_panel="Keys and set-up")
app.command("exec", rich_help_panel="Sealed models")(exec.exec_)
for command in MODELS:
    app.command(rich_help_panel="Sealed models")(command)
app.command("help", rich_help_panel="This program")(help_command)
app.command(rich_help_panel="This program")(completion)
