"""The values of the global options, which every command gets as ``typer.Context.obj``."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from keymgmt.errors import ConfigError, KeymgmtError

if TYPE_CHECKING:
    from keymgmt import Config
    from keymgmt._providers.contract import KeyProvider

P = TypeVar("P", bound="KeyProvider[Any]")

__all__ = ["State"]


class State:
    """The global options, and the config that they name, loaded once when it is first needed.

    Attributes:
        path: the config file that was named; None for the file that the library finds.
        as_json: whether stdout is to have JSON and nothing else.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.as_json = False
        self._config: Config | None = None
        self._warnings = _Warnings(logging.WARNING)
        ours = logging.getLogger("keymgmt")
        for handler in list(ours.handlers):
            if isinstance(handler, _Warnings):  # of another run in this process
                ours.removeHandler(handler)
        ours.addHandler(self._warnings)

    def set_config(self, path: str) -> None:
        """Use this config in place of that of the library; ConfigError for an empty name."""
        if not str(path):
            raise ConfigError("--config names no file", hint="is a variable empty that holds it?")
        self.path = Path(path)

    def set_as_json(self, value: bool) -> None:
        """Print JSON on stdout."""
        self.as_json = value

    def set_verbose(self, count: int) -> None:
        """Show logs on stderr: 1 for audit events and warnings, 2 for all logs of keymgmt."""
        self._show_all()
        logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("keymgmt").setLevel(logging.DEBUG if count > 1 else logging.INFO)

    def set_log_json(self, _value: bool) -> None:
        """Show logs on stderr, each as one line of JSON."""
        self._show_all()
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JsonLines())
        logging.basicConfig(handlers=[handler], force=True)
        ours = logging.getLogger("keymgmt")
        ours.setLevel(min(ours.level or logging.INFO, logging.INFO))

    def _show_all(self) -> None:
        logging.getLogger("keymgmt").removeHandler(self._warnings)

    def close(self) -> None:
        """Close the providers: end connections, and wipe secrets."""
        if self._config is not None:
            self._config.close()

    def config(self) -> Config:
        """Load the config; ConfigError if there is none, or it is wrong.

        It is the file named by ``--config``, else the file that the library finds. A config in the
        working directory is never used: whoever delivered that folder would choose whom to trust.
        """
        if self._config is None:
            from keymgmt import load_config

            self._config = load_config(self.path)
        return self._config

    def provider(self, name: str, kind: type[P]) -> P:
        """The provider of this name, for a command of its backend; else ConfigError."""
        provider = self.config().provider(name)
        if not isinstance(provider, kind):
            raise ConfigError(
                f"the provider {name!r} is of the backend {provider.backend}, not {kind.backend}",
                hint=f'name a provider whose table has backend = "{kind.backend}"',
            )
        return provider


class _Warnings(logging.Handler):
    """Prints warnings of the library like those of commands; audit events are left to logs."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("keymgmt.audit"):
            return
        from keymgmt.cli._output import print_warning

        print_warning(KeymgmtError(record.getMessage()))


class _JsonLines(logging.Formatter):
    """One record as one JSON object; an audit event with its fields as members."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "format": "keymgmt-log/1",
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "audit", None)
        line |= fields if isinstance(fields, dict) else {"message": record.getMessage()}
        return json.dumps(line, ensure_ascii=True, default=str)
