"""Run one command line to its exit: an error is printed once, and its class is the exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from keymgmt.cli._version import print_version
from keymgmt.errors import KeymgmtError

if TYPE_CHECKING:
    from typer import TyperException
    from typing_extensions import Buffer

__all__ = ["run"]


class _Stream(str):
    """The name of a stream in an OSError; compared by identity, as a file may have that name."""

    __slots__ = ()


STDOUT: Final = _Stream("stdout")


def run(arguments: Sequence[str]) -> NoReturn:
    """Run ``keymgmt ARGUMENTS`` and exit."""
    if type(sys.stdout) is io.TextIOWrapper:
        raw = io.BufferedWriter(_Stdout(1, "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(
            raw, encoding=sys.stdout.encoding, line_buffering=sys.stdout.isatty()
        )
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding shows an escape, and not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    interrupted: int | None = None

    def interrupt(number: int, _frame: object) -> NoReturn:
        nonlocal interrupted
        interrupted = 128 + number
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(interrupted)

    # Signals become exceptions, so that the clean-up of ``with`` and ``finally`` runs.
    # SIGHUP is a terminal that was closed or a connection that was lost; nohup ignores it.
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = _interrupt_later
    as_json = "--json" in arguments[: [*arguments, "--"].index("--")]
    try:
        code = _run(arguments)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except KeymgmtError as error:
        code = _tell(error, as_json=as_json)
    except OSError as error:
        from keymgmt._system.refused import translate

        if interrupted is not None:
            # A terminal that is gone takes no last progress either.
            _stop_stdout()
            code = interrupted
        elif error.filename is not STDOUT:
            code = _tell(translate(error), as_json=as_json)
        else:
            _stop_stdout()
            if isinstance(error, BrokenPipeError):
                # `keymgmt ... | head`: the reader has ended.
                code = 128 + signal.SIGPIPE
            else:
                code = _tell(translate(error), as_json=False)
    except Exception:
        # A library may turn an interrupt into an error of its own, as pydantic does in a class.
        if interrupted is None:
            raise
        code = interrupted
    sys.exit(code)


def _interrupt_later(ignored: sys.UnraisableHookArgs) -> None:
    """Raise the interrupt again that came in a ``__del__`` or a fork, where Python drops it."""
    interrupt = ignored.exc_value
    if not isinstance(interrupt, (KeyboardInterrupt, SystemExit)):
        sys.__unraisablehook__(ignored)
        return

    def interrupt_now(_number: int, _frame: object) -> NoReturn:
        raise interrupt

    signal.signal(signal.SIGALRM, interrupt_now)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


class _Stdout(io.FileIO):
    """Standard output, with its name in errors, so that other broken pipes are told apart."""

    def write(self, content: Buffer, /) -> int:
        try:
            return super().write(content) or 0
        except OSError as error:
            error.filename = STDOUT
            raise


def _run(arguments: Sequence[str]) -> int:
    completing = "_KEYMGMT_COMPLETE" in os.environ
    if list(arguments) in (["--version"], ["-V"], ["version"]) and not completing:
        print_version()
        sys.stdout.flush()
        return 0
    import typer

    from keymgmt.cli._app import app

    if completing:
        from keymgmt.cli._completion import complete

        complete(app)
    command: Any = typer.main.get_command(app)
    try:
        # `app()` would take every broken pipe for that of stdout.
        with command.make_context("keymgmt", list(arguments)) as context:
            command.invoke(context)
        code = 0
    except typer.Exit as end:
        code = end.exit_code
    except (typer.Abort, EOFError):
        raise KeyboardInterrupt from None
    except typer.TyperException as error:
        raise _usage(error) from None
    sys.stdout.flush()
    return code


class UsageError(KeymgmtError):
    exit_code = 2


def _usage(error: TyperException) -> KeymgmtError:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message(), file=sys.stderr)  # noqa: T201
        sys.exit(2)
    hint = f"{context.command_path} --help" if context is not None else None
    return UsageError(_wrong_value(error) or _one_line(error), hint=hint)


def _one_line(error: TyperException) -> str:
    return " ".join(error.format_message().split()).rstrip(".")


def _wrong_value(error: TyperException) -> str | None:
    """The option and value that pydantic refused, in plain words: its own are for programmers."""
    errors, param = getattr(error.__cause__, "errors", None), getattr(error, "param", None)
    if errors is None or param is None:
        return None
    from keymgmt._config.messages import sentence
    from keymgmt.cli._everywhere import shown

    first = errors()[0]
    text = f"{shown(param)}: {sentence(first)}"
    return text if first["type"] == "value_error" else f"{text}: {str(first['input'])[:80]!r}"


def _tell(error: KeymgmtError, *, as_json: bool) -> int:
    from keymgmt.cli._output import print_error

    try:
        print_error(error, as_json=as_json)
        sys.stdout.flush()
    except OSError:
        _stop_stdout()
    return error.exit_code


def _stop_stdout() -> None:
    """Discard further output to stdout, whose buffer Python flushes at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
