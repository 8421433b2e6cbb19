"""The global options, and help in plain lines, for every command, also of other distributions.

The options may stand anywhere on the command line; of a repeated option the last value counts. A
command that has an option of the same name keeps its own.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import typer
from typer.core import TyperArgument, TyperGroup

from keymgmt.cli._state import State
from keymgmt.errors import ConfigError

__all__ = ["adopt", "shown", "state_of"]

# The metavar of an option without one; typer's own would be such as <int range>.
_VALUES: Final = {Path: "PATH", int: "N", float: "NUMBER", str: "TEXT"}
_SENTENCE: Final = 120
_EXAMPLES: Final = re.compile(r"^Examples?:$", re.MULTILINE)


def state_of(context: typer.Context) -> State:
    """The State of a run, which commands get as ``context.obj``."""
    state: State = context.meta.setdefault(State.__qualname__, State())
    return state


def _everywhere(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="Config file; else $KEYMGMT_CONFIG, the user's, the machine's.",
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
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Show audit events, each as one line of JSON.")
    ] = False,
    show_help: Annotated[
        bool, typer.Option("--help", "-h", is_eager=True, help="Show this message and exit.")
    ] = False,
) -> None:
    """Never called: its parameters are the global options."""


@cache
def _options() -> list[Any]:
    app = typer.Typer(add_completion=False)
    app.command()(_everywhere)
    command: Any = typer.main.get_command(app)
    return list(command.params)


def _process(param: Any, process: Callable[..., Any], context: typer.Context, value: Any) -> Any:
    """The value of a parameter, converted to its type; ConfigError for an empty path.

    While a shell completes a word nothing is converted, since that would import pydantic.
    """
    if context.resilient_parsing:
        return value
    annotation = param.type_descriptor.annotation
    # The only parser of our options is that of a path or a location.
    is_path = param.type_descriptor.parameter_info.parser or Path in (
        annotation,
        *get_args(annotation),
    )
    if is_path and "" in (value, *_several(value)):
        # In Python an empty path is the working directory: `rewrap "$NOT_SET"` would change that.
        raise ConfigError(f"{shown(param)} is empty", hint="is a variable empty that holds it?")
    return process(context, value)


def _several(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def shown(param: Any) -> str:
    """The name of a parameter for people: its option, or the argument's name in the help."""
    return str(param.opts[0] if param.opts[0].startswith("-") else param.metavar or param.name)


def _store(option: Any, context: typer.Context, value: Any) -> Any:
    if value and option.name == "show_help" and not context.resilient_parsing:
        typer.echo(context.get_help())
        raise typer.Exit
    # An empty text counts as given: it comes from a variable that is not set, and must not silently
    # mean the default.
    if value or (value == "" and not context.resilient_parsing):
        getattr(state_of(context), f"set_{option.name}")(value)
    return value


def _json(context: typer.Context, _option: Any, value: bool) -> bool:
    """A command's own ``--json``: also true if it stood before the command."""
    state = state_of(context)
    if value:
        state.set_as_json(value)
    return state.as_json


def adopt(command: Any) -> Any:
    """Give a command, and all its subcommands, the global options and our help; returns it."""
    if getattr(command, "adopted", False):
        return command
    command.adopted = True
    command.rich_markup_mode = None
    command.add_help_option = False  # --help is a global option
    if command.help:
        # Lists of commands, also those of a shell, show the whole first sentence.
        command.short_help = command.get_short_help_str(limit=_SENTENCE)
        # Click keeps the lines of a paragraph that begins with a backspace.
        command.help = _EXAMPLES.sub("\b\nExamples:", inspect.cleandoc(command.help))
    taken: dict[str, Any] = {}
    for param in command.params:
        taken |= dict.fromkeys((*param.opts, *param.secondary_opts), param)
        param.process_value = partial(_process, param, param.process_value)
        if isinstance(param, TyperArgument):
            _plain_argument(param)
        elif param.metavar is None and not param.count:
            param.metavar = _value(param.type_descriptor.annotation)
    for option in _options():
        names = [name for name in option.opts if name not in taken]
        if "--json" in option.opts and not names:
            taken["--json"].callback = _json
        elif names:
            ours = copy.copy(option)
            ours.opts, ours.expose_value = names, False
            ours.process_value = partial(_store, ours)
            command.params.append(ours)
    if isinstance(command, TyperGroup):
        for each in command.commands.values():
            adopt(each)
    return command


def _value(annotation: Any) -> str | None:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    kinds = (annotation, *get_args(annotation))
    return next((_VALUES[kind] for kind in kinds if kind in _VALUES), None)


def _plain_argument(param: Any) -> None:
    """Show an argument by its name alone: no braces, no type, and in brackets if optional."""
    name = str(param.metavar or param.name.upper())
    if not param.required and not name.startswith("["):
        name = f"[{name}]"
    if param.nargs != 1 and not name.endswith("..."):
        name += "..."
    record: Callable[[typer.Context], tuple[str, str] | None] = param.get_help_record

    def plain(context: typer.Context) -> tuple[str, str] | None:
        found = record(context)
        return found and (name, found[1].removesuffix("[required]").rstrip())

    param.get_usage_pieces = lambda _context: [name]
    param.get_help_record = plain
