"""``keymgmt help``."""

from __future__ import annotations

import contextlib
import io
from typing import Annotated, Any

import typer

from keymgmt.cli._options import Json
from keymgmt.console import print_json

__all__ = ["help_command"]


def help_command(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND]...", help="Such as: keys create.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the help of a command.

    Example:
        keymgmt help keys create
    """
    root: Any = context.find_root().command
    said = io.StringIO()
    # As if `--help` had been typed: then a command of another distribution is loaded as well.
    with contextlib.redirect_stdout(said), contextlib.suppress(typer.Exit):
        root.invoke(root.make_context("keymgmt", [*(words or []), "--help"]))
    if as_json:
        print_json({"format": "keymgmt-help/1", "help": said.getvalue()})
    else:
        typer.echo(said.getvalue(), nl=False)
