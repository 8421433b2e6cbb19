"""What our own commands print besides ``keymgmt.console``: errors, findings, progress."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import typer

from keymgmt._system.terminal import drawing
from keymgmt._system.words import counted
from keymgmt.console import clean, console, print_json, print_line, table
from keymgmt.errors import CannotUnlock, ConfigError, ProviderUnavailable, WrongKey

if TYPE_CHECKING:
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
    "tell_failure",
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


def print_error(error: KeymgmtError, *, as_json: bool = False) -> None:
    """Print ``error:`` and ``hint:``, and for CannotUnlock what was tried; as JSON also."""
    from rich.text import Text

    if as_json:
        print_json({"format": ERROR, "error": error.to_json()})
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
                "; ".join(filter(None, [str(attempt.error), attempt.error.hint])),
            )
            for attempt in attempts[:_MANY]
        ]
        out.print(table(["group", "recipient", "provider", "error", "reason"], rows))
        if len(attempts) > _MANY:
            out.print(f"... and {len(attempts) - _MANY} more")
    if error.hint:
        out.print(Text.assemble(("hint: ", "bold cyan"), clean(error.hint)), soft_wrap=True)


def fail(error: KeymgmtError, document: dict[str, object]) -> NoReturn:
    """Exit with what was found, as JSON, and the error in it: one document, and not two."""
    print_json(document | {"error": error.to_json()})
    print_error(error)
    raise typer.Exit(error.exit_code)


def print_finding(subject: str, finding: Finding) -> None:
    """Print one finding of a check, and the way out where it is not well."""
    from rich.text import Text

    out = console()
    line = subject + (f": {finding.detail}" if finding.detail else "")
    style = _STYLES[finding.status]
    out.print(Text.assemble((f"{finding.status:8}", style), clean(line)), soft_wrap=True)
    if finding.hint and finding.status != "ok":
        out.print(f"{'':8}hint: {clean(finding.hint)}", soft_wrap=True)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], object]]:
    """Show bytes done of bytes in all on stderr: a bar on a terminal, now and then a line else."""
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
    with (
        Progress(*columns, console=out, transient=True) as bar,
        drawing(bar.stop, bar.start),
    ):
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_release(release: int) -> None:
    """Ask back about a release number after which hardly another can come.

    Raises:
        ConfigError: the person says no, or there is none to ask.
    """
    from keymgmt._system.strict_json import MAX_INTEGER

    if MAX_INTEGER - release >= _FEW_RELEASES:
        return
    left = counted(max(0, MAX_INTEGER - release), "number")
    said = f"release {release} leaves {left} for later releases"
    if sys.stdin.isatty() and typer.confirm(f"{said}, and an older one never opens again. Go on?"):
        return
    raise ConfigError(said, hint="give the number that comes after the last: 1, 2, 3")


def ask_to_type(name: str, said: str) -> None:
    """Let a person type the name of what will be lost.

    Raises:
        ConfigError: something else was typed, or there is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise ConfigError(f"{said}, and nobody is there to ask", hint="say that it is meant: --yes")
    console(stderr=True).print(clean(said), soft_wrap=True)
    if typer.prompt(f"Type {name} to go on", default="", show_default=False, err=True) != name:
        raise ConfigError(f"that is not {name}, so nothing was done")


def print_warning(problem: KeymgmtError, what: str = "") -> None:
    """Print ``warning:`` and ``hint:``: what was done may not do what its owner expects."""
    from rich.text import Text

    out = console(stderr=True)
    said = ": ".join(filter(None, [what, str(problem)]))
    out.print(Text.assemble(("warning: ", "yellow"), clean(said)), soft_wrap=True)
    if problem.hint:
        out.print(Text.assemble(("hint: ", "bold"), clean(problem.hint)), soft_wrap=True)


def tell_refusal(refused: KeymgmtError | None) -> None:
    """Say where the config that made something would not let it in, or nobody could look."""
    if refused is not None:
        unknown = isinstance(refused, ProviderUnavailable)
        print_warning(refused, _UNKNOWN if unknown else _REFUSES)


def tell_failure(failure: Failure, form: str, *, as_json: bool) -> None:
    """Print what was wrong with one of many models: on stderr, and as a line of JSON."""
    error = failure.error
    if as_json:
        print_line({"format": form, **failure.to_json()})
    console(stderr=True).print(f"{clean(failure.path)}: {clean(error)}", soft_wrap=True)


def is_tree(path: str) -> bool:
    """Whether a command is to look for models below a folder, and not at one model."""
    from keymgmt._verbs.find_models import is_model

    # Not Path.is_dir(), which raises for some: whoever opens it says why it cannot.
    return os.path.isdir(path) and not is_model(Path(path))  # noqa: PTH112


def tell_tree(
    work: Callable[[InTree], Iterable[Done | Failure]], doing: str, form: str, *, as_json: bool
) -> None:
    """Print what was done with each model of a tree and a summary; exit by the worst of it.

    ``work`` begins it, and may tell how far it is with the model at hand.
    """
    from keymgmt._verbs.find_models import Failure

    states: Counter[str] = Counter()
    failed: list[Failure] = []
    with counter(doing) as tick:
        for item in work(tick.within):
            tick()
            if isinstance(item, Failure):
                failed.append(item)
                tell_failure(item, form, as_json=as_json)
                continue
            states[item.state] += 1
            if as_json:
                print_line({"format": form, **item.to_json()})
            else:
                console().print(f"{clean(item.path)}: {item.state}", soft_wrap=True)
            if item.detail.get("refusal"):
                said = f"{clean(item.path)}: {_REFUSES}: {clean(item.detail['refusal'])}"
                console(stderr=True).print(said, soft_wrap=True)
    code = worst({failure.error.exit_code for failure in failed})
    models = states.total()
    if failed and not models and not as_json:
        raise failed[0].error
    if as_json:
        counts = {"models": models, "failed": len(failed), "states": dict(states)}
        print_line({"format": form, **counts, "exit_code": code})
    else:
        told = ", ".join(f"{state} {count}" for state, count in sorted(states.items()))
        console().print(f"{counted(models, 'model')}: {told}; failed {len(failed)}")
    if code:
        raise typer.Exit(code)


def worst(codes: Collection[int]) -> int:
    """The exit code of a run over many models: 6 before 5, 4, 3 and any other; else 0."""
    return next((code for code in (6, 5, 4, 3) if code in codes), max(codes, default=0))


class Ticks:
    """Counts things whose number is not known on stderr: a spinner on a terminal, lines else."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._count = 0
        self._last = time.monotonic()
        self._out = console(stderr=True)
        self.spinner = self._out.status(what) if self._out.is_terminal else None

    def __call__(self) -> None:
        """One more is done."""
        self._count += 1
        self._say(f"{self._what}: {self._count}")

    def within(self, path: str, done: int, total: int) -> None:
        """So many of all bytes of the one at hand are done."""
        share = 100 * done // total if total else 100
        self._say(f"{self._what}: {self._count} done, {clean(path)}: {share} %")

    def _say(self, text: str) -> None:
        from rich.text import Text

        if self.spinner is not None:
            self.spinner.update(Text(text))  # a str would be markup
        elif time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            self._out.print(text, soft_wrap=True)


@contextlib.contextmanager
def counter(what: str) -> Iterator[Ticks]:
    """Count while something is done, and let questions be asked meanwhile."""
    ticks = Ticks(what)
    if ticks.spinner is None:
        yield ticks
        return
    with ticks.spinner, drawing(ticks.spinner.stop, ticks.spinner.start):
        yield ticks


def write_result(content: bytes, path: Path | None, *, force: bool) -> None:
    """Write ``content`` to a new file or to stdout; ConfigError where it exists."""
    from keymgmt._system.files import save_file

    if path is None:
        sys.stdout.flush()
        # On a terminal the prompt begins a line; in a file the bytes are what they are.
        end = b"\n" if sys.stdout.isatty() and not content.endswith(b"\n") else b""
        sys.stdout.buffer.write(content + end)
        sys.stdout.buffer.flush()
        return
    save_file(path, content, force=force)
