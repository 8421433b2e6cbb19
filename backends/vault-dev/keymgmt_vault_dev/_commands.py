"""The command ``keymgmt vault dev``."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from keymgmt.backend import ProviderUnavailable
from keymgmt_vault_dev._server import DevServer

__all__ = ["dev"]


def dev(
    name: Annotated[str, typer.Option(help="Name of the provider in the table.")] = "site",
    key: Annotated[list[str], typer.Option(help="Key to make that wraps.")] = ["model"],  # noqa: B006
    publisher: Annotated[str, typer.Option(help="Key to make that signs.")] = "publisher",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port on loopback.")] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where its tokens and log go; else a temporary one.")
    ] = None,
) -> None:
    """Run an OpenBao in memory until Ctrl-C; print the config table to paste.

    Nothing of it outlives it: what is sealed with its keys is lost with it.

    Example:
        keymgmt vault dev --name site --key resnet50
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keymgmt-")))
        # A plain `kill` ends the server too.
        signal.signal(signal.SIGTERM, _interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            server = stack.enter_context(DevServer.start(directory.absolute(), port))
            with server.provider() as provider:
                for each in key:
                    provider.create_key(each, "aes256-gcm96", {})
                provider.create_key(publisher, "ed25519", {})
            typer.echo(server.table(name), nl=False)
            typer.echo(
                f"It runs at {server.address} with the keys {', '.join([*key, publisher])}; the "
                f"root token is in {server.root_file}.\n"
                "It is in memory and for development: Ctrl-C ends it and loses its keys.",
                err=True,
            )
            code = server.process.wait()
            raise ProviderUnavailable(
                f"the server ended with status {code}", hint=f"see {directory}/server.log"
            )


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
