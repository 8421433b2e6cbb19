"""What the global options say, handed to every command as ``typer.Context.obj``."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import typer

from keymgmt._config import FILE_NAME, Config, load_config

__all__ = ["State"]


class State:
    """The global options, and the config that they name, loaded once and when first asked for."""

    def __init__(self, config: Path | None = None, verbose: int = 0) -> None:
        self._path = config
        self._config: Config | None = None
        # Without a handler of ours, logging would print audit warnings beside our errors.
        logging.getLogger("keymgmt").addHandler(logging.NullHandler())
        if verbose:
            logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
            logging.getLogger("keymgmt").setLevel(logging.DEBUG if verbose > 1 else logging.INFO)

    def config_path(self) -> Path | None:
        """The file named by ``--config``, else ``./keymgmt.toml``, else None: the library's."""
        if self._path is not None or os.environ.get("KEYMGMT_CONFIG"):
            return self._path
        # Only a person at a prompt chose the working directory; the library never reads it.
        local = Path(FILE_NAME)
        return local if local.is_file() else None

    def close(self) -> None:
        """Close the providers: let go of connections, and wipe what is secret."""
        if self._config is not None:
            self._config.close()

    def config(self, *, quiet: bool = False) -> Config:
        """Load the config; ConfigError where there is none or it is wrong."""
        if self._config is None:
            path = self.config_path()
            if path is not None and path != self._path and not quiet:
                typer.echo(f"using the config ./{path}", err=True)
            self._config = load_config(path)
        return self._config
