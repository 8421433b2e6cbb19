"""Print the policies that machines need."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from keymgmt.backend import check_key
from keymgmt_aws._policies import policy_of
from keymgmt_aws._provider import AwsProvider

__all__ = ["app"]

_Role = Literal["open", "seal", "publish", "operate"]
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.callback()
def _commands() -> None:
    """Without a callback, typer would run an only command without its name."""


@app.command()
def policy(
    context: typer.Context,
    role: Annotated[_Role, typer.Argument(help="What the machine does.", show_default=False)],
    reference: Annotated[
        str,
        typer.Argument(metavar="PROVIDER:KEY", help="The key that it uses.", show_default=False),
    ],
    principal: Annotated[
        str | None,
        typer.Option(metavar="ARN", help="Print a key policy's statements for this role or user."),
    ] = None,
) -> None:
    """Print the least policy for a machine: for IAM, or for the key with --principal.

    Example:
        keymgmt aws policy open cloud:resnet50
    """
    name, _, key = reference.partition(":")
    provider = context.obj.provider(name, AwsProvider)
    typer.echo(policy_of(role, provider.settings, check_key(key), principal), nl=False)
