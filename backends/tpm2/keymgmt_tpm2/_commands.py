"""Set up a TPM, approve boot states, and enrol devices."""

from __future__ import annotations

from typing import Annotated

import typer

from keymgmt.console import console, print_json
from keymgmt_tpm2._arguments import Json, Provider, find_provider
from keymgmt_tpm2._setup import LockoutChange, set_up
from keymgmt_tpm2.enroll._commands import app as enroll_app
from keymgmt_tpm2.policy._commands import app as policy_app
from keymgmt_tpm2.policy._nv_commands import anchor_app, counter_app
from keymgmt_tpm2.policy._stated import stated_pcrs

__all__ = ["app"]

MAX_SECONDS = 2**31 - 1

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
app.add_typer(policy_app, name="policy")
app.add_typer(counter_app, name="counter")
app.add_typer(anchor_app, name="anchor")
app.add_typer(enroll_app, name="enroll")


@app.command()
def setup(
    context: typer.Context,
    provider: Provider,
    create: Annotated[
        bool, typer.Option("--create", help="Create the storage root key if it is missing.")
    ] = False,
    rsa: Annotated[
        bool, typer.Option("--rsa", help="Create an RSA key, for chips without ECC.")
    ] = False,
    tries: Annotated[
        int | None, typer.Option(min=2, max=1000, help="Lock the TPM after this many wrong PINs.")
    ] = None,
    recovery: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_SECONDS, help="Seconds after which a wrong PIN is forgotten."),
    ] = None,
    lockout_recovery: Annotated[
        int | None,
        typer.Option(
            min=0, max=MAX_SECONDS, help="Seconds until a wrong lockout password is forgiven."
        ),
    ] = None,
    clear_lockout: Annotated[
        bool, typer.Option("--clear-lockout", help="Forget the counted wrong PINs now.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the storage root key, the line that pins it, and when wrong PINs lock the TPM.

    The options that change this lockout concern every key of this TPM that has a PIN, whichever
    program created it.

    Example:
        keymgmt tpm setup tpm --create
    """
    chosen = find_provider(context, provider)
    change = LockoutChange(tries, recovery, lockout_recovery, clear_lockout)
    key = set_up(chosen, create=create, kind="rsa" if rsa else "ecc", change=change)
    if as_json:
        lockout = key.lockout.to_json()
        print_json(
            {
                "format": "keymgmt-tpm-setup/1",
                "srk": key.handle,
                "srk_name": key.name,
                "algorithm": key.algorithm,
                "lockout": lockout,
            }
        )
        return
    done = "made" if key.made else "found"
    out, pinned = console(), chosen.settings.srk_name
    out.print(f"{done} the {key.algorithm} storage root key at {key.handle}")
    out.print(f"wrong PINs: {key.lockout}; the TPM locks at {key.lockout.limit}")
    if pinned == key.name:
        out.print("its name is the pinned name of the config")
        return
    if pinned is not None:
        console(stderr=True).print(f"the config pins another name: {pinned}")
    out.print(f"pin it in [providers.{provider}]:")
    out.print(f'srk_name = "{key.name}"')


@app.command()
def pcrs(
    context: typer.Context,
    provider: Provider,
    pcr: Annotated[str, typer.Option(help="[BANK:]LIST, such as sha256:0,2,7.")] = (
        "sha256:0,1,2,3,4,5,6,7"
    ),
    as_json: Json = False,
) -> None:
    """Print PCR values; with --json as `policy sign --values` reads them.

    Example:
        keymgmt tpm pcrs tpm --pcr 0,2,7,11 --json
    """
    bank, indices = stated_pcrs(pcr, "--pcr")
    state = find_provider(context, provider).pcrs(bank, indices)
    if as_json:
        print_json({"format": "keymgmt-tpm-pcrs/1", **state.to_json()})
        return
    for index in state.indices:
        console().print(f"{bank}:{index:<2} {state.values[index].hex()}")


@app.command()
def flush(
    context: typer.Context,
    provider: Provider,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Free every loaded object and session of a TPM without resource manager, of any program.

    Example:
        keymgmt tpm flush tpm
    """
    chosen = find_provider(context, provider)
    if not yes:
        typer.confirm(
            "Programs that use this TPM now will fail. Free all objects and sessions?",
            abort=True,
            err=as_json,
        )
    count = chosen.service.run("freeing slots", lambda tpm: tpm.free_all(), pinned=False)
    if as_json:
        print_json({"format": "keymgmt-tpm-flush/1", "freed": count})
        return
    console().print(f"freed {count}")
