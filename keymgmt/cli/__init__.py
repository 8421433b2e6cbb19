"""The command line. Errors are ``error:`` and ``hint:`` on stderr, and the exit code says whose.

0 ok, 2 usage, 3 config, 4 damaged or untrusted, 5 denied, 6 unavailable, 1 anything else.

Other distributions add commands by an entry point of group ``keymgmt.commands``: a name and a
``typer.Typer``. It is imported when it is run and never before. Its commands take a
``typer.Context`` whose ``obj`` is a ``State``: ``obj.config()`` is the loaded config. They raise
errors of ``keymgmt.errors``, which are printed here, and print with ``console``, ``table``,
``clean`` and ``print_json``.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer

from keymgmt.cli import backends, doctor, init, inspect, keys, plugin, rewrap, seal
from keymgmt.cli._output import clean, console, print_error, print_json, table
from keymgmt.cli._plugins import CommandGroup
from keymgmt.cli._state import State
from keymgmt.errors import KeymgmtError

__all__ = ["State", "app", "clean", "console", "main", "print_json", "table"]

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"keymgmt {version('keymgmt')}")
        raise typer.Exit


@app.callback()
def _keymgmt(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="Config file; else $KEYMGMT_CONFIG, ./keymgmt.toml, the user's, the machine's.",
        ),
    ] = None,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            show_default=False,
            help="Show audit events; -vv debugs.",
        ),
    ] = 0,
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Ship models to machines you do not control: sealed at rest, opened in memory."""
    context.obj = State(config, verbose)
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
for command in MODELS:
    app.command(rich_help_panel="Sealed models")(command)


def main() -> None:
    """Run the command line and exit: the console script ``keymgmt``."""
    # As an exception, so that what is half done is cleared away, as it is for Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        app(prog_name="keymgmt")
    except KeymgmtError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except OSError as error:
        # A full disk or a missing directory is the world's doing, not a bug to trace.
        print_error(KeymgmtError(str(error)))
        sys.exit(1)
