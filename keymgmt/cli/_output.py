"""What the command line prints: errors, tables, JSON. Results go to stdout, all else to stderr.

Names come from files that others wrote, so a control character never reaches the terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keymgmt._files import replace_file
from keymgmt.errors import CannotUnlock, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from keymgmt.errors import KeymgmtError

__all__ = ["clean", "console", "print_error", "print_json", "table", "write_result"]

_PIPE_WIDTH: Final = 160


def console(*, stderr: bool = False) -> Console:
    """A rich console that does not guess: no markup, no highlighting, room enough in a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, markup=False, highlight=False, width=width)


def clean(text: object) -> str:
    """``text`` with what is not printable shown as an escape; line ends are kept."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in str(text)
    )


def print_error(error: KeymgmtError) -> None:
    """Print ``error:`` and ``hint:``; for CannotUnlock also what was tried, one by one."""
    out = console(stderr=True)
    out.print(Text.assemble(("error: ", "bold red"), clean(error)), soft_wrap=True)
    if isinstance(error, CannotUnlock) and error.attempts:
        rows = [
            (
                attempt.group + 1,
                attempt.recipient,
                attempt.provider or "-",
                type(attempt.error).__name__,
                "\n".join(filter(None, [str(attempt.error), attempt.error.hint])),
            )
            for attempt in error.attempts
        ]
        out.print(table(["group", "recipient", "provider", "error", "reason"], rows))
    if error.hint:
        out.print(Text.assemble(("hint: ", "bold cyan"), clean(error.hint)), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=True))  # noqa: T201


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table whose cells are cleaned."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(clean(cell)) for cell in row))
    return made


def write_result(content: bytes, path: Path | None, *, force: bool) -> None:
    """Write ``content`` to a new file or to stdout; ConfigError where it exists."""
    if path is None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    try:
        replace_file(path, content, exclusive=not force)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists", hint="name another file, or --force") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
