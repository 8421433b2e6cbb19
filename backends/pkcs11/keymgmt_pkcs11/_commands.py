"""What is in a PKCS#11 module: slots and tokens, keys, mechanisms that work."""

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
        str | None, typer.Option(help="String for C_Initialize, which NSS takes.")
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
                found = [_row(library, slot) for slot in library.cryptoki.slots()]
            except CkError as error:
                raise translate(error, "listing the slots") from error
        if not any("token_initialized" in row["flags"] for row in found):
            why = f"no slot has a token that is ready: {library.quirks.configuration}"
            console(stderr=True).print(why)
        return found

    _show("keymgmt-pkcs11-slots/1", within(_LIMIT, f"the module {module}", look), as_json)


def _row(module: Module, slot: int) -> dict[str, Any]:
    row: dict[str, Any] = {"slot": slot}
    try:
        token = module.cryptoki.token_info(slot)
    except CkError as error:
        # One token in trouble does not hide the others.
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
    """List every key object of a token, also those that have no name here, with attributes.

    Example:
        keymgmt pkcs11 keys hsm
    """
    chosen: Pkcs11Provider = context.obj.provider(provider, Pkcs11Provider)
    found, odd = chosen.connection.run("reading the keys", all_keys)
    for each in odd:
        console(stderr=True).print(f"skipped: {each}")
    _show(
        "keymgmt-pkcs11-keys/1",
        [
            {
                "key": chosen.settings.name_of(item.label, item.id) or "-",
                "label": item.label,
                "id": item.id.hex(),
                "type": f"{item.type} {item.bits or ''}".strip(),
                "attributes": " ".join(sorted(item.flags)),
            }
            for item in found
        ],
        as_json,
    )


@app.command()
def mechanisms(context: typer.Context, provider: Provider, as_json: Json = False) -> None:
    """Try which kinds of key work on a token, with keys that live for this command only.

    Example:
        keymgmt pkcs11 mechanisms hsm
    """
    chosen: Pkcs11Provider = context.obj.provider(provider, Pkcs11Provider)
    # Each with a time limit of its own: a slow token makes an RSA key in seconds.
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
        str | None, typer.Option(help="What it is for; by its attributes where left out.")
    ] = None,
) -> None:
    """Switch every usage of a key off that it does not need, after another tool made it.

    Example:
        keymgmt pkcs11 restrict hsm:resnet50
    """
    name, _, which = key.partition(":")
    info = context.obj.provider(name, Pkcs11Provider).restrict_key(which, kind)
    console().print(f"{key} is {info.kind} now: {info.detail['attributes']}")


def _show(form: str, rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        what = form.removeprefix("keymgmt-pkcs11-").removesuffix("/1")
        print_json({"format": form, what: list(rows)})
    else:
        columns = list(rows[0]) if rows else ["nothing found"]
        console().print(table(columns, [list(row.values()) for row in rows]))
