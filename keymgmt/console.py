"""What commands print with: tables, clean text, one JSON object.

Results go to stdout, all else to stderr.
Names come from files that others wrote, so a control character never reaches the terminal.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from keymgmt.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["clean", "console", "print_json", "print_line", "table"]

_PIPE_WIDTH: Final = 160


def console(*, stderr: bool = False) -> Console:
    """A rich console that does not guess: no markup, emoji or highlighting, and room in a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return _kind()(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


@functools.cache
def _kind() -> type[Console]:
    # Imported when something is printed: completing a word prints nothing of this.
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            """Leave it to the command line, which ends quietly and says so by its exit code."""
            raise

    return _Console


def clean(text: object, *, lines: bool = False) -> str:
    """``text`` in one line, with what is not printable shown as an escape.

    ``lines`` keeps its line ends, for a text of ours that has several.
    """
    parts = str(text).split("\n") if lines else [str(text)]
    return "\n".join(map(printable, parts))


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=True))  # noqa: T201


def print_line(value: object) -> None:
    """Print one JSON object on one line of stdout: a step of a long run."""
    print(json.dumps(value, ensure_ascii=True), flush=True)  # noqa: T201


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table whose cells are cleaned."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(clean(cell)) for cell in row))
    return made
