"""What the command line prints: errors, tables, JSON. Results go to stdout, all else to stderr.

Names come from files that others wrote, so a control character never reaches the terminal.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from keymgmt._files import replace_file
from keymgmt.errors import CannotUnlock, ConfigError, WrongKey

if TYPE_CHECKING:
    from pathlib import Path

    from keymgmt._provider import Finding
    from keymgmt.errors import KeymgmtError

__all__ = [
    "clean",
    "console",
    "counter",
    "print_error",
    "print_finding",
    "print_json",
    "progress",
    "table",
    "write_result",
]

_PIPE_WIDTH: Final = 160
_STYLES: Final = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
_LINE_SECONDS: Final = 10.0
_MANY: Final = 100


def console(*, stderr: bool = False) -> Console:
    """A rich console that does not guess: no markup, emoji or highlighting, and room in a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


def clean(text: object) -> str:
    """``text`` with what is not printable shown as an escape; line ends are kept."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in str(text)
    )


def print_error(error: KeymgmtError) -> None:
    """Print ``error:`` and ``hint:``; for CannotUnlock also what was tried."""
    out = console(stderr=True)
    out.print(Text.assemble(("error: ", "bold red"), clean(error)), soft_wrap=True)
    if isinstance(error, CannotUnlock) and error.attempts:
        # Those that this config might hold come first.
        attempts = sorted(error.attempts, key=lambda each: isinstance(each.error, WrongKey))
        if len(attempts) <= _MANY:
            attempts = list(error.attempts)
        rows = [
            (
                attempt.group + 1,
                attempt.recipient,
                attempt.provider or "-",
                type(attempt.error).__name__,
                "\n".join(filter(None, [str(attempt.error), attempt.error.hint])),
            )
            for attempt in attempts[:_MANY]
        ]
        out.print(table(["group", "recipient", "provider", "error", "reason"], rows))
        if len(attempts) > _MANY:
            out.print(f"... and {len(attempts) - _MANY} more")
    if error.hint:
        out.print(Text.assemble(("hint: ", "bold cyan"), clean(error.hint)), soft_wrap=True)


def print_finding(subject: str, finding: Finding) -> None:
    """Print one finding of a check, and the way out where it is not well."""
    out = console()
    line = subject + (f": {finding.detail}" if finding.detail else "")
    style = _STYLES[finding.status]
    out.print(Text.assemble((f"{finding.status:8}", style), clean(line)), soft_wrap=True)
    if finding.hint and finding.status != "ok":
        out.print(f"{'':8}hint: {clean(finding.hint)}", soft_wrap=True)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], object]]:
    """Show bytes done of bytes in all on stderr: a bar on a terminal, now and then a line else."""
    out = console(stderr=True)
    if not out.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_SECONDS:
                last = time.monotonic()
                share = 100 * done // total if total else 100
                out.print(f"{what}: {share} % of {decimal(total)}")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def counter(what: str) -> Iterator[Callable[[], object]]:
    """Count things whose number is not known on stderr: a spinner on a terminal, lines else."""
    out = console(stderr=True)
    count, last = 0, time.monotonic()
    spinner = out.status(what) if out.is_terminal else None

    def tick() -> None:
        nonlocal count, last
        count += 1
        if spinner is not None:
            spinner.update(f"{what}: {count}")
        elif time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            out.print(f"{what}: {count}")

    with spinner or contextlib.nullcontext():
        yield tick


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
