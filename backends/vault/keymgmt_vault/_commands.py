"""Print the policies that machines need; with keymgmt-vault-dev, run a development server."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated, Literal

import typer

from keymgmt.backend import check_key
from keymgmt_vault._policies import policy_of
from keymgmt_vault._provider import VaultProvider

__all__ = ["app"]

_Role = Literal["seal", "open", "rotate", "publish"]
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.callback()
def _commands() -> None:
    """Without a callback, typer would run an only command without its name."""


# `dev` is in a distribution of its own, keymgmt-vault-dev, which devices do not install.
for entry in entry_points(group="keymgmt_vault.commands"):
    app.command(entry.name)(entry.load())


@app.command()
def policy(
    context: typer.Context,
    role: Annotated[_Role, typer.Argument(help="What the machine does.", show_default=False)],
    reference: Annotated[
        str,
        typer.Argument(metavar="PROVIDER:KEY", help="The key that it uses.", show_default=False),
    ],
) -> None:
    """Print the least policy for a machine, to pipe into `bao policy write NAME -`.

    Example:
        keymgmt vault policy open site:resnet50
    """
    name, _, key = reference.partition(":")
    provider = context.obj.provider(name, VaultProvider)
    native = provider.settings.native(check_key(key))
    typer.echo(policy_of(role, provider.settings.mount, native), nl=False)
