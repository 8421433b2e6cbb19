"""A command that is known by its name and its line of help until somebody runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from keymgmt.cli._everywhere import adopt

__all__ = ["LazyCommand"]


class LazyCommand(TyperCommand):
    """What lists of commands show; ``load`` imports the command itself."""

    def __init__(
        self, name: str, line: str, panel: str, application: Callable[[], typer.Typer]
    ) -> None:
        super().__init__(name, help=line, short_help=line, rich_help_panel=panel)
        self._application = application

    def load(self) -> Any:
        """The command itself, with the global options and our help."""
        app = self._application()
        app._add_completion = False  # the options for that would install another program's
        command: Any = typer.main.get_command(app)
        command.name = self.name
        return adopt(command)
