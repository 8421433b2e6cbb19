"""Printing for commands: tables, clean text, JSON.

Results go to stdout, and everything else to stderr. Names come from files that others wrote, so
each text is cleaned: a control character never reaches the terminal.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from keymgmt.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

__all__ = ["clean", "console", "print_json", "print_line", "say", "table"]

_PIPE_WIDTH: Final = 160


def console(*, stderr: bool = False) -> Console:
    """A rich console without markup, emoji or highlighting; in a pipe it is 160 columns wide."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return _console_class()(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


@functools.cache
def _console_class() -> type[Console]:
    # rich is imported only when something is printed, so that completing a word stays fast.
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            """Raise the BrokenPipeError, where rich would end the process with exit code 1.

            The command line catches it and ends quietly.
            """
            raise

    return _Console


def clean(text: object) -> str:
    """``text`` in one line, with what is not printable shown as an escape."""
    return printable(str(text))


def say(text: object, *, stderr: bool = False) -> None:
    """Print a line for people, cleaned, and never broken: it may hold a path or a command."""
    console(stderr=stderr).print(clean(text), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=True))  # noqa: T201


def print_line(value: object) -> None:
    """Print one JSON object on one line of stdout: a step of a long run."""
    print(json.dumps(value, ensure_ascii=True), flush=True)  # noqa: T201


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table whose cells are cleaned; where it is too wide, each row as lines of its own."""
    from rich.cells import cell_len
    from rich.text import Text

    texts = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *texts, strict=True)]
    # Only the widest column is wrapped, and no word in it is broken: so its least width is that of
    # its longest word.
    widest = widths.index(max(widths))
    words = [word for row in (columns, *texts) for word in row[widest].split()]
    widths[widest] = max(map(cell_len, words), default=0)
    drawn: Any = _table_class()(box=None, pad_edge=False, header_style="bold")
    drawn.needs = sum(widths) + 2 * (len(widths) - 1)
    for number, column in enumerate(columns):
        drawn.add_column(column, overflow="fold", no_wrap=number != widest)
    for row in texts:
        drawn.add_row(*map(Text, row))
    return cast("Table", drawn)


@functools.cache
def _table_class() -> Any:
    from rich.table import Table

    class _Table(Table):
        needs = 0

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            if self.needs <= options.max_width:
                yield from super().__rich_console__(console, options)
                return
            for number, cells in enumerate(zip(*(c.cells for c in self.columns), strict=True)):
                record = Table.grid(padding=(0, 2, 0, 0))
                record.add_column(style="bold", no_wrap=True)
                record.add_column(overflow="fold")
                for column, cell in zip(self.columns, cells, strict=True):
                    record.add_row(column.header, cell)
                if number:
                    yield ""
                yield record

    return _Table
