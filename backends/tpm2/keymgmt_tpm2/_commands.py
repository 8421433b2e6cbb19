"""Set up a TPM, approve boot states, enrol devices: what only the TPM backend has."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from keymgmt.backend import ConfigError
from keymgmt_tpm2._counter import (
    DEFAULT_INDEX,
    bump_counter,
    create_counter,
    parse_index,
    read_counter,
    set_counter,
)
from keymgmt_tpm2._enroll_commands import app as enroll_app
from keymgmt_tpm2._policy import parse_pcrs
from keymgmt_tpm2._policy_commands import app as policy_app
from keymgmt_tpm2._provider import Tpm2Provider
from keymgmt_tpm2._setup import set_up

__all__ = ["app", "find_provider"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
counter_app = typer.Typer(
    no_args_is_help=True, help="NV counters, by which older approvals are outdated."
)
app.add_typer(policy_app, name="policy")
app.add_typer(counter_app, name="counter")
app.add_typer(enroll_app, name="enroll")

Provider = Annotated[str, typer.Argument(metavar="PROVIDER", help="Provider in the config.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Index = Annotated[str, typer.Option(metavar="INDEX", help="NV index of the counter.")]


def find_provider(context: typer.Context, name: str) -> Tpm2Provider:
    """The TPM provider called ``name``; ConfigError where it is of another backend."""
    provider: Any = context.obj.config().provider(name)
    if not isinstance(provider, Tpm2Provider):
        raise ConfigError(
            f"the provider {name!r} is of the backend {provider.backend}, not tpm2",
            hint='name a provider whose table has backend = "tpm2"',
        )
    return provider


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(data, indent=2))


@app.command()
def setup(
    context: typer.Context,
    provider: Provider,
    create: Annotated[
        bool, typer.Option("--create", help="Make the storage root key where there is none.")
    ] = False,
    rsa: Annotated[bool, typer.Option("--rsa", help="Make it RSA, for chips without ECC.")] = False,
    as_json: Json = False,
) -> None:
    """Show the storage root key and the line that pins it in the config."""
    found = find_provider(context, provider)
    key = set_up(found, create=create, kind="rsa" if rsa else "ecc")
    if as_json:
        print_json({"srk": key.handle, "srk_name": key.name, "algorithm": key.algorithm})
        return
    done = "made" if key.made else "found"
    typer.echo(f"{done} the {key.algorithm} storage root key at {key.handle}")
    pinned = found.settings.srk_name
    if pinned == key.name:
        typer.echo("its name is the one that the config pins")
        return
    if pinned is not None:
        typer.echo(f"the config pins another name: {pinned}", err=True)
    typer.echo(f"pin it in [providers.{provider}]:")
    typer.echo(f'srk_name = "{key.name}"')


@app.command()
def pcrs(
    context: typer.Context,
    provider: Provider,
    pcr: Annotated[str, typer.Option(help="[BANK:]LIST, such as sha256:0,2,7.")] = (
        "sha256:0,1,2,3,4,5,6,7"
    ),
    as_json: Json = False,
) -> None:
    """Print PCR values; with --json as `policy sign --values` reads them."""
    try:
        bank, indices = parse_pcrs(pcr)
    except ValueError as error:
        raise ConfigError(f"--pcr: {error}") from error
    state = find_provider(context, provider).pcrs(bank, indices)
    if as_json:
        print_json(state.to_json())
        return
    for index in state.indices:
        typer.echo(f"{bank}:{index:<2} {state.values[index].hex()}")


@app.command()
def flush(
    context: typer.Context,
    provider: Provider,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Free every loaded object and session of a bare TPM, whoever left or uses them."""
    found = find_provider(context, provider)
    if not yes:
        typer.confirm(
            "Programs that use this TPM now will fail. Free all objects and sessions?", abort=True
        )
    count = found.service.run("freeing slots", lambda tpm: tpm.free_all(), pinned=False)
    typer.echo(f"freed {count}")


@counter_app.command("create")
def create(
    context: typer.Context,
    provider: Provider,
    index: Index = f"{DEFAULT_INDEX:#010x}",
    value: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**63 - 1, help="Make an ordinary index of this value, for a fleet."
        ),
    ] = None,
) -> None:
    """Define a counter; its first value is printed."""
    number = parse_index(index)
    typer.echo(create_counter(find_provider(context, provider), number, value=value))


@counter_app.command("set")
def set_value(
    context: typer.Context,
    provider: Provider,
    value: Annotated[int, typer.Argument(min=0, max=2**63 - 1, help="The new value.")],
    index: Index = f"{DEFAULT_INDEX:#010x}",
) -> None:
    """Set an ordinary index: approvals for a lower value open nothing while it has this one."""
    number = parse_index(index)
    typer.echo(set_counter(find_provider(context, provider), number, value))


@counter_app.command("show")
def show(
    context: typer.Context, provider: Provider, index: Index = f"{DEFAULT_INDEX:#010x}"
) -> None:
    """Print a counter's value, to sign an approval for it."""
    number = parse_index(index)
    typer.echo(read_counter(find_provider(context, provider), number))


@counter_app.command("bump")
def bump(
    context: typer.Context, provider: Provider, index: Index = f"{DEFAULT_INDEX:#010x}"
) -> None:
    """Count up: approvals for a lower value open nothing any more."""
    number = parse_index(index)
    typer.echo(bump_counter(find_provider(context, provider), number))
