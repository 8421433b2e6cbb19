"""The commands of ``keymgmt``.

Other distributions add commands by an entry point of group ``keymgmt.commands``: a name and a
``typer.Typer``. It is imported when it is run and never before. Its commands take a
``typer.Context`` whose ``obj`` is a ``State``: ``obj.config()`` is the loaded config, and
``obj.as_json`` whether JSON is to be printed. They raise errors of ``keymgmt.errors``, which are
printed for them, and print with ``keymgmt.console``.
"""

from __future__ import annotations

from typing import Annotated

import typer

from keymgmt.cli._everywhere import state_of
from keymgmt.cli._plugins import CommandGroup
from keymgmt.cli._version import print_version

__all__ = ["app"]

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False)


def _version(value: bool) -> None:
    if value:
        print_version()
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
