"""Printing for the commands of this package: errors, findings, progress."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

import typer

from keymgmt._system.terminal import drawing
from keymgmt._system.words import counted
from keymgmt.console import clean, console, print_json, print_line, say, table
from keymgmt.errors import CannotUnlock, ConfigError, ProviderUnavailable, WrongKey

if TYPE_CHECKING:
    from rich.console import Console

    from keymgmt._config.config import Config
    from keymgmt._providers.data import Finding
    from keymgmt._verbs.find_models import Failure
    from keymgmt._verbs.tree_verbs import Done, InTree
    from keymgmt.errors import KeymgmtError

__all__ = [
    "ask_to_type",
    "check_release",
    "counter",
    "fail",
    "is_tree",
    "print_error",
    "print_finding",
    "print_warning",
    "progress",
    "tell_failures",
    "tell_refusal",
    "tell_tree",
    "worst",
    "write_result",
]

ERROR: Final = "keymgmt-error/1"
_STYLES: Final = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
_LINE_SECONDS: Final = 10.0
_MANY: Final = 100
_FEW_RELEASES: Final = 1 << 32
_REFUSES: Final = "this config would not open it"
_UNKNOWN: Final = "whether this config would open it could not be checked"
T = TypeVar("T")


def _print(out: Console, label: str, style: str, text: object) -> None:
    """Print a line whose label has a style."""
    from rich.text import Text

    out.print(Text.assemble((label, style), clean(text)), soft_wrap=True)


def print_error(error: KeymgmtError, *, as_json: bool = False) -> None:
    """Print ``error:`` and ``hint:``, and for CannotUnlock the attempts; also as JSON if asked."""
    if as_json:
        print_json({"format": ERROR, "error": error.to_json()})
    out = console(stderr=True)
    _print(out, "error: ", "bold red", error)
    if isinstance(error, CannotUnlock) and error.attempts:
        # Attempts with keys that this config might hold come first.
        attempts = sorted(error.attempts, key=lambda each: isinstance(each.error, WrongKey))
        if len(attempts) <= _MANY:
            attempts = list(error.attempts)
        rows = [
            (
                attempt.group + 1,
                attempt.recipient,
                attempt.provider or "-",
                type(attempt.error).__name__,
                "; ".join(filter(None, [str(attempt.error), attempt.error.hint])),
            )
            for attempt in attempts[:_MANY]
        ]
        out.print(table(["group", "recipient", "provider", "error", "reason"], rows))
        if len(attempts) > _MANY:
            out.print(f"... and {len(attempts) - _MANY} more")
    if error.hint:
        _print(out, "hint: ", "bold cyan", error.hint)


def fail(error: KeymgmtError, document: dict[str, object]) -> NoReturn:
    """Exit with ``error``, printed as a member of ``document``, so that stdout has one document."""
    print_json(document | {"error": error.to_json()})
    print_error(error)
    raise typer.Exit(error.exit_code)


def print_finding(subject: str, finding: Finding) -> None:
    """Print one finding of a check, and its hint unless its status is ok."""
    line = subject + (f": {finding.detail}" if finding.detail else "")
    _print(console(), f"{finding.status:8}", _STYLES[finding.status], line)
    if finding.hint and finding.status != "ok":
        say(f"{'':8}hint: {finding.hint}")


@contextlib.contextmanager
def progress(task: str) -> Iterator[Callable[[int, int], object]]:
    """Show the bytes done of all bytes on stderr: a bar on a terminal, else a line at times."""
    from rich.filesize import decimal
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    out = console(stderr=True)
    if not out.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_SECONDS:
                last = time.monotonic()
                share = 100 * done // total if total else 100
                out.print(f"{task}: {share} % of {decimal(total)}")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, console=out, transient=True) as bar,
        drawing(bar.stop, bar.start),
    ):
        shown = bar.add_task(task, total=None)
        yield lambda done, total: bar.update(shown, completed=done, total=total)


def check_release(release: int) -> None:
    """Ask for confirmation of a release number that leaves few numbers for later releases.

    Raises:
        ConfigError: the person says no, or stdin is not a terminal.
    """
    from keymgmt._system.strict_json import MAX_INTEGER

    if MAX_INTEGER - release >= _FEW_RELEASES:
        return
    left = counted(max(0, MAX_INTEGER - release), "number")
    warning = f"release {release} leaves {left} for later releases"
    question = f"{warning}, and older releases never open again. Go on?"
    if sys.stdin.isatty() and typer.confirm(question):
        return
    raise ConfigError(warning, hint="give the number that comes after the last: 1, 2, 3")


def ask_to_type(name: str, warning: str) -> None:
    """Let a person type the name of the thing that will be lost.

    Raises:
        ConfigError: something else was typed, or stdin is not a terminal.
    """
    if not sys.stdin.isatty():
        raise ConfigError(f"{warning}, and nobody is there to ask", hint="to go on, give --yes")
    say(warning, stderr=True)
    if typer.prompt(f"Type {name} to go on", default="", show_default=False, err=True) != name:
        raise ConfigError(f"that is not {name}, so nothing was done")


def print_warning(problem: KeymgmtError, subject: str = "") -> None:
    """Print ``warning:`` and ``hint:`` for a command that succeeds, but perhaps not as expected."""
    out = console(stderr=True)
    _print(out, "warning: ", "yellow", ": ".join(filter(None, [subject, str(problem)])))
    if problem.hint:
        _print(out, "hint: ", "bold", problem.hint)


def tell_refusal(refused: KeymgmtError | None) -> None:
    """Warn if the config that made a model would not open it, or that could not be checked."""
    if refused is not None:
        unknown = isinstance(refused, ProviderUnavailable)
        print_warning(refused, _UNKNOWN if unknown else _REFUSES)


def _tell_failure(failure: Failure, form: str, *, as_json: bool) -> None:
    """Print the failure of one of many models: on stderr, and as a line of JSON if asked."""
    error = failure.error
    if as_json:
        print_line({"format": form, **failure.to_json()})
    say(f"{failure.path}: {error}", stderr=True)


def is_tree(
    path: str, config: Callable[[], Config] | None = None, *, shard: str | None = None
) -> bool:
    """Whether a path is a folder of models, and not a model itself.

    With ``config``, which loads it, so may be a location, of which the server is then asked.

    Raises:
        ConfigError: it is one model, and the option ``--shard`` was given.
    """
    tree = _is_tree(path, config)
    if shard is not None and not tree:
        raise ConfigError("--shard is for a tree, and this is one model")
    return tree


def _is_tree(path: str, config: Callable[[], Config] | None) -> bool:
    from keymgmt._remote.location import Location, is_location
    from keymgmt._verbs.find_models import is_model

    if config is not None and is_location(path):
        from keymgmt._remote.listing import is_remote_tree

        return is_remote_tree(Location.parse(path), config().remote)
    # Path.is_dir() raises for some paths; here the verb reports why a path cannot be opened.
    return os.path.isdir(path) and not is_model(Path(path))  # noqa: PTH112


def tell_failures(
    results: Iterable[T | Failure],
    tick: Ticks,
    form: str,
    failed: list[Failure],
    *,
    as_json: bool,
) -> Iterator[T]:
    """What was done of a tree; the failures are printed, and added to ``failed``.

    The first is held back: if no model is done, it is the error of the command, and raised.
    """
    from keymgmt._verbs.find_models import Failure

    done = False
    for item in results:
        tick()
        if isinstance(item, Failure):
            failed.append(item)
            if as_json or done or len(failed) > 1:
                _tell_failure(item, form, as_json=as_json)
            continue
        if failed and not done and not as_json:
            _tell_failure(failed[0], form, as_json=False)
        done = True
        yield item
    if failed and not done and not as_json:
        raise failed[0].error


def tell_tree(
    work: Callable[[InTree], Iterable[Done | Failure]],
    doing: str,
    form: str,
    *,
    shard: str | None,
    as_json: bool,
) -> None:
    """Print the result for each model of a tree, and a summary; exit with the worst exit code.

    ``work`` gives the results. It gets a function by which it shows its progress within a model.
    """
    states: Counter[str] = Counter()
    failed: list[Failure] = []
    with counter(doing) as tick:
        for item in tell_failures(work(tick.within), tick, form, failed, as_json=as_json):
            states[item.state] += 1
            if as_json:
                print_line({"format": form, **item.to_json()})
            else:
                say(f"{item.path}: {item.state}")
            if item.detail.get("refusal"):
                say(f"{item.path}: {_REFUSES}: {item.detail['refusal']}", stderr=True)
    code = worst({failure.error.exit_code for failure in failed})
    models = states.total()
    if as_json:
        counts = {"models": models, "failed": len(failed), "states": dict(states)}
        print_line({"format": form, **counts, "shard": shard, "exit_code": code})
    else:
        listed = ", ".join(f"{state} {count}" for state, count in sorted(states.items()))
        say(f"{counted(models, 'model')}: {listed}; failed {len(failed)}")
    if code:
        raise typer.Exit(code)


def worst(codes: Collection[int]) -> int:
    """The exit code of a run over many models: 6 before 5, 4, 3 and any other; 0 without codes."""
    return next((code for code in (6, 5, 4, 3) if code in codes), max(codes, default=0))


class Ticks:
    """Counts models on stderr, of which the number is not known: a spinner or, else, lines."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._count = 0
        self._last = time.monotonic()
        self._out = console(stderr=True)
        self.spinner = self._out.status(task) if self._out.is_terminal else None

    def __call__(self) -> None:
        """Count one more model."""
        self._count += 1
        self._say(f"{self._task}: {self._count}")

    def within(self, path: str, done: int, total: int) -> None:
        """Show the bytes done of all bytes of the present model."""
        share = 100 * done // total if total else 100
        self._say(f"{self._task}: {self._count} done, {clean(path)}: {share} %")

    def _say(self, text: str) -> None:
        from rich.text import Text

        if self.spinner is not None:
            self.spinner.update(Text(text))  # a str would be markup
        elif time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            self._out.print(text, soft_wrap=True)


@contextlib.contextmanager
def counter(task: str) -> Iterator[Ticks]:
    """Count during a task, with a spinner that makes way for questions."""
    ticks = Ticks(task)
    if ticks.spinner is None:
        yield ticks
        return
    with ticks.spinner, drawing(ticks.spinner.stop, ticks.spinner.start):
        yield ticks


def write_result(content: bytes, path: Path | None, *, force: bool) -> None:
    """Write ``content`` to a new file or to stdout; ConfigError if the file exists."""
    from keymgmt._system.files import save_file

    if path is None:
        sys.stdout.flush()
        # On a terminal the prompt must begin a new line; a file gets exactly the bytes.
        end = b"\n" if sys.stdout.isatty() and not content.endswith(b"\n") else b""
        sys.stdout.buffer.write(content + end)
        sys.stdout.buffer.flush()
        return
    save_file(path, content, force=force)
