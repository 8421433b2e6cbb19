"""What tools show that report an error with the variables of every frame."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.traceback import Traceback

TESTS = Path(__file__).parents[1]


def report(error: BaseException) -> str:
    """An error with its causes and every variable; but of the tests, which know the secret."""
    out, traceback = io.StringIO(), error.__traceback__
    while traceback and Path(traceback.tb_frame.f_code.co_filename).is_relative_to(TESTS):
        traceback = traceback.tb_next
    shown = Traceback.from_exception(
        type(error),
        error,
        traceback,
        show_locals=True,
        locals_max_length=None,
        locals_max_string=None,
    )
    Console(file=out, width=1000).print(shown)
    return out.getvalue()
