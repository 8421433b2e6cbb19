"""Run a development server, and print the policies that machines need."""

from __future__ import annotations

import contextlib
import enum
import signal
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from keymgmt.backend import ConfigError, ProviderUnavailable
from keymgmt_vault._dev import DevServer, find_server
from keymgmt_vault._provider import VaultProvider

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


class Role(enum.StrEnum):
    """The kinds of machine, as ``policy`` takes them."""

    SEAL = "seal"
    OPEN = "open"
    ROTATE = "rotate"
    PUBLISH = "publish"


_TITLES = {
    Role.SEAL: "sealing machine",
    Role.OPEN: "edge device",
    Role.ROTATE: "rotator",
    Role.PUBLISH: "publisher",
}


@app.command()
def dev(
    name: Annotated[str, typer.Option(help="Name of the provider in the table.")] = "site",
    key: Annotated[list[str], typer.Option(help="Key to make that wraps.")] = ["model"],  # noqa: B006
    publisher: Annotated[str, typer.Option(help="Key to make that signs.")] = "publisher",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port on loopback.")] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where its tokens and log go; else a temporary one.")
    ] = None,
) -> None:
    """Run an OpenBao (or Vault) in memory until Ctrl-C; print the config table to paste.

    Nothing of it outlives it: what is sealed with its keys is lost with it.
    """
    program = find_server()
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keymgmt-")))
        # A plain `kill` ends the server too.
        signal.signal(signal.SIGTERM, _interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            server = stack.enter_context(DevServer.start(program, directory.absolute(), port))
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


@app.command()
def policy(
    context: typer.Context,
    role: Annotated[Role, typer.Argument(help="What the machine does.", show_default=False)],
    reference: Annotated[
        str, typer.Argument(metavar="PROVIDER:KEY", help="With which key.", show_default=False)
    ],
) -> None:
    """Print the least policy for a machine, to pipe into: bao policy write NAME -."""
    name, _, key = reference.partition(":")
    config = context.obj.config()
    provider = config.provider(name)
    if not isinstance(provider, VaultProvider):
        raise ConfigError(f"the provider {name!r} is of the backend {config.backend_of(name)!r}")
    typer.echo(provider.policy(_TITLES[role], key), nl=False)
