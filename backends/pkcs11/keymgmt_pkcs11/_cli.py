"""What is in a PKCS#11 module: slots and tokens, keys, mechanisms that work."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pkcs11 import Slot, TokenFlag
from pkcs11.exceptions import PKCS11Error
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keymgmt.backend import ConfigError, within
from keymgmt_pkcs11._doctor import trials
from keymgmt_pkcs11._errors import reason, translate
from keymgmt_pkcs11._keys import all_keys
from keymgmt_pkcs11._module import open_module
from keymgmt_pkcs11._provider import Pkcs11Provider
from keymgmt_pkcs11._token import serial

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False)
_WIDTH = 200
_LIMIT = 30.0

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Provider = Annotated[
    str, typer.Argument(help="Provider of the config.", metavar="PROVIDER", show_default=False)
]


@app.callback()
def _group() -> None:
    """What is in a PKCS#11 module: slots and tokens, keys, mechanisms that work."""


@app.command()
def slots(
    module: Annotated[Path, typer.Argument(help="The vendor's library (.so).", metavar="MODULE")],
    init_args: Annotated[
        str | None, typer.Option(help="String for C_Initialize, which NSS takes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the slots of a module and the tokens in them. Needs no config and no PIN."""

    def look() -> list[dict[str, Any]]:
        library = open_module(module.absolute(), init_args)
        with library.call():
            try:
                return [_row(slot) for slot in library.slots()]
            except PKCS11Error as error:
                raise translate(error, "listing the slots") from error

    _show(within(_LIMIT, f"the module {module}", look), as_json)


def _row(slot: Slot) -> dict[str, Any]:
    row: dict[str, Any] = {"slot": slot.slot_id}
    try:
        token = slot.get_token()
    except PKCS11Error as error:
        # One token in trouble does not hide the others.
        empty = dict.fromkeys(("token", "serial", "model", "manufacturer"), "")
        return {**row, **empty, "flags": f"no answer: {reason(error)}"}
    return {
        **row,
        "token": token.label.strip("\0 "),
        "serial": serial(token),
        "model": str(token.model).strip("\0 "),
        "manufacturer": str(token.manufacturer_id).strip("\0 "),
        "flags": " ".join(str(flag.name).lower() for flag in TokenFlag if token.flags & flag),
    }


@app.command()
def keys(context: typer.Context, provider: Provider, as_json: Json = False) -> None:
    """List every key object of a token, also those that have no name here, with attributes."""
    chosen = _provider(context, provider)
    found = chosen.run("reading the keys", all_keys)
    _show(
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
    """Try which kinds of key work on a token, with keys that live for this command only."""
    chosen = _provider(context, provider)
    found = chosen.run(
        "trying the mechanisms", lambda channel: list(trials(channel, chosen.settings))
    )
    _show(
        [
            {
                "kind": each.name.removeprefix("kind "),
                "works": "yes" if each.status == "ok" else "no",
                "tried": each.detail,
            }
            for each in found
        ],
        as_json,
    )


def _provider(context: typer.Context, name: str) -> Pkcs11Provider:
    chosen = context.obj.config().provider(name)
    if not isinstance(chosen, Pkcs11Provider):
        raise ConfigError(f"the provider {name!r} is {chosen.backend}, not pkcs11")
    return chosen


def _show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0] if rows else ["nothing found"]:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(_clean(str(cell))) for cell in row.values()))
    width = None if sys.stdout.isatty() else _WIDTH
    Console(markup=False, highlight=False, width=width).print(made)


def _clean(text: str) -> str:
    # Labels are whatever somebody wrote into the token.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
