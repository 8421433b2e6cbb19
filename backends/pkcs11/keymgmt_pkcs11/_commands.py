"""Look into a PKCS#11 module: its slots and tokens, their keys, and the mechanisms that work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pkcs11 import TokenFlag

from keymgmt.backend import KeymgmtError, within
from keymgmt.console import console, print_json, table
from keymgmt_pkcs11._checks import try_kind
from keymgmt_pkcs11._errors import CkError, translate
from keymgmt_pkcs11._keys import all_keys
from keymgmt_pkcs11._kinds import KINDS
from keymgmt_pkcs11._module import Module, open_module
from keymgmt_pkcs11._provider import GENERATION_LIMIT, Pkcs11Provider

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
_LIMIT = 30.0

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Provider = Annotated[
    str, typer.Argument(help="Provider of the config.", metavar="PROVIDER", show_default=False)
]


@app.command()
def slots(
    module: Annotated[Path, typer.Argument(help="The vendor's library (.so).", metavar="MODULE")],
    init_args: Annotated[
        str | None, typer.Option(help="String for C_Initialize, which NSS softokn reads.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the slots of a module and the tokens in them. Needs no config and no PIN.

    Example:
        keymgmt pkcs11 slots /usr/lib/softhsm/libsofthsm2.so
    """

    def look() -> list[dict[str, Any]]:
        library = open_module(module.absolute(), init_args)
        with library.call():
            try:
                rows = [_row(library, slot) for slot in library.cryptoki.slots()]
            except CkError as error:
                raise translate(error, "listing the slots") from error
        if not any("token_initialized" in row["flags"] for row in rows):
            why = f"no slot has a token that is ready: {library.quirks.configuration}"
            console(stderr=True).print(why)
        return rows

    _show("keymgmt-pkcs11-slots/1", within(_LIMIT, f"the module {module}", look), as_json)


def _row(module: Module, slot: int) -> dict[str, Any]:
    row: dict[str, Any] = {"slot": slot}
    try:
        token = module.cryptoki.token_info(slot)
    except CkError as error:
        # A token that does not answer does not hide the others.
        empty = dict.fromkeys(("token", "serial", "model", "manufacturer"), "")
        return {**row, **empty, "flags": f"no answer: {error.name}"}
    return {
        **row,
        "token": token.label,
        "serial": token.serial,
        "model": token.model,
        "manufacturer": token.manufacturer,
        "flags": " ".join(str(flag.name).lower() for flag in TokenFlag if token.flags & flag),
    }


@app.command()
def keys(context: typer.Context, provider: Provider, as_json: Json = False) -> None:
    """List every key object of a token with its attributes, also those without a key name.

    Example:
        keymgmt pkcs11 keys hsm
    """
    chosen: Pkcs11Provider = context.obj.provider(provider, Pkcs11Provider)
    key_objects, unreadable = chosen.connection.run("reading the keys", all_keys)
    for each in unreadable:
        console(stderr=True).print(f"skipped: {each}")
    _show(
        "keymgmt-pkcs11-keys/1",
        [
            {
                "key": chosen.settings.name_of(key_object.label, key_object.id) or "-",
                "label": key_object.label,
                "id": key_object.id.hex(),
                "type": f"{key_object.type} {key_object.bits or ''}".strip(),
                "attributes": " ".join(sorted(key_object.flags)),
            }
            for key_object in key_objects
        ],
        as_json,
    )


@app.command()
def mechanisms(context: typer.Context, provider: Provider, as_json: Json = False) -> None:
    """Try which kinds of key work on a token, with keys that end with this command.

    Example:
        keymgmt pkcs11 mechanisms hsm
    """
    chosen: Pkcs11Provider = context.obj.provider(provider, Pkcs11Provider)
    # Each kind has a time limit of its own: a slow token takes seconds for an RSA key.
    limit = max(chosen.settings.timeout, GENERATION_LIMIT)
    rows = []
    for kind in KINDS.values():
        try:
            works, tried = chosen.connection.run(
                f"trying {kind.name}",
                lambda session, kind=kind: try_kind(session, kind),  # type: ignore[misc]
                limit=limit,
            )
        except KeymgmtError as error:
            works, tried = False, str(error)
        rows.append({"kind": kind.name, "works": "yes" if works else "no", "tried": tried})
    _show("keymgmt-pkcs11-mechanisms/1", rows, as_json)


@app.command()
def restrict(
    context: typer.Context,
    key: Annotated[
        str, typer.Argument(help="Key of a provider.", metavar="PROVIDER:KEY", show_default=False)
    ],
    kind: Annotated[
        str | None,
        typer.Option(help="The kind it is to have; by its type and usages where left out."),
    ] = None,
) -> None:
    """Switch off every usage that a key does not need, for a key that another tool created.

    Example:
        keymgmt pkcs11 restrict hsm:resnet50
    """
    provider, _, name = key.partition(":")
    info = context.obj.provider(provider, Pkcs11Provider).restrict_key(name, kind)
    console().print(f"{key} is {info.kind} now: {info.detail['attributes']}")


def _show(form: str, rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        member = form.removeprefix("keymgmt-pkcs11-").removesuffix("/1")
        print_json({"format": form, member: list(rows)})
    else:
        columns = list(rows[0]) if rows else ["nothing found"]
        console().print(table(columns, [list(row.values()) for row in rows]))
