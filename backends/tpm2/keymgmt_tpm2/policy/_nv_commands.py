"""``keymgmt tpm counter`` and ``keymgmt tpm anchor``: NV indices that only grow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from keymgmt.backend import ANCHOR_START, check_key, save_file
from keymgmt.console import console, print_json
from keymgmt_tpm2._arguments import Json, Provider, find_provider
from keymgmt_tpm2.policy import _counter
from keymgmt_tpm2.policy._anchor import create_anchor
from keymgmt_tpm2.policy._counter import DEFAULT_INDEX, Raise, read_counter
from keymgmt_tpm2.policy._index import parse_index
from keymgmt_tpm2.policy._policy import WEAK_HINT, Counter
from keymgmt_tpm2.policy._signing import ApproverKey, Ref, find_approver
from keymgmt_tpm2.policy._stated import read_json_file

__all__ = ["anchor_app", "counter_app"]

COUNTER: Final = "keymgmt-tpm-counter/1"
ANCHOR: Final = "keymgmt-tpm-anchor/1"

counter_app = typer.Typer(
    no_args_is_help=True, help="Counters, by which an approver outdates older approvals."
)
anchor_app = typer.Typer(
    no_args_is_help=True, help="The anchor, by which a release memory that was put back is noticed."
)
Index = Annotated[str, typer.Option(metavar="INDEX", help="NV index of the counter.")]
RaiseFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="What the approver signed: `counter sign`.")
]


@counter_app.command()
def sign(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="File to write.")],
    key: ApproverKey,
    to: Annotated[int, typer.Option(min=1, max=2**63 - 1, help="The value to raise it to.")],
    index: Index = f"{DEFAULT_INDEX:#010x}",
    ref: Ref = "",
    as_json: Json = False,
) -> None:
    """Sign, offline, that counters may be made and raised to a value; it is for all devices.

    Example:
        keymgmt tpm counter sign --key approver.key --to 100 start.raise
    """
    approver, sign_message = find_approver(context, key, ref)
    wanted = Raise.sign(Counter(parse_index(index), to), approver, sign_message)
    save_file(output, wanted.to_bytes())
    if as_json:
        who = {"approver": approver.fingerprint, "ref": ref}
        _print_counter(wanted.counter.index, to, {"path": str(output), **who})
        return
    console().print(f"signed: {wanted}")


@counter_app.command()
def create(
    context: typer.Context, provider: Provider, file: RaiseFile, as_json: Json = False
) -> None:
    """Make the counter of an approver, as the TPM's owner; its value is printed.

    From then on only what that approver signs moves it. Its value is higher than what was signed
    where this TPM has had a higher counter before.

    Example:
        keymgmt tpm counter create tpm start.raise
    """
    wanted = read_json_file(file, "raise of a counter", Raise.read)
    value = _counter.create_counter(find_provider(context, provider), wanted)
    _say(wanted.counter.index, value, as_json=as_json)


@counter_app.command("raise")
def raise_to(
    context: typer.Context, provider: Provider, file: RaiseFile, as_json: Json = False
) -> None:
    """Raise the counter to what its approver signed: approvals for a lower value open no more.

    Example:
        keymgmt tpm counter raise tpm next.raise
    """
    wanted = read_json_file(file, "raise of a counter", Raise.read)
    value = _counter.raise_counter(find_provider(context, provider), wanted)
    _say(wanted.counter.index, value, as_json=as_json)


@counter_app.command()
def show(
    context: typer.Context,
    provider: Provider,
    index: Index = f"{DEFAULT_INDEX:#010x}",
    as_json: Json = False,
) -> None:
    """Print a counter's value, to sign an approval for it.

    Example:
        keymgmt tpm counter show tpm
    """
    number = parse_index(index)
    _say(number, read_counter(find_provider(context, provider), number), as_json=as_json)


def _say(index: int, value: int, *, as_json: bool) -> None:
    if as_json:
        _print_counter(index, value, {})
    else:
        console().print(value)


def _print_counter(index: int, value: int, more: dict[str, str]) -> None:
    print_json({"format": COUNTER, "index": f"{index:#010x}", "value": value, **more})


@anchor_app.command("create")
def make_anchor(
    context: typer.Context,
    provider: Annotated[
        str,
        typer.Argument(
            metavar="PROVIDER[:KEY]", help="A key whose policy holds wherever it is moved."
        ),
    ],
    again: Annotated[
        bool,
        typer.Option("--again", help="Take away the one that is there; its file counts as new."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the anchor, as the TPM's owner, and show the line that pins it.

    With a key, the anchor moves only where that key opens: in its boot state, or in those that its
    approver approved. A PIN of the key is not asked for. After an update only a key with an
    approver still moves it.

    Example:
        keymgmt tpm anchor create tpm:kiosk
    """
    name, colon, key = provider.partition(":")
    device = find_provider(context, name)
    before = device.settings.anchor
    anchor = create_anchor(device.service, check_key(key) if colon else None, again=again)
    pin = anchor.name.hex()
    weak = anchor.policy.weakness
    if as_json:
        about = {
            "index": str(anchor.index),
            "name": pin,
            "moved": False,
            "value": ANCHOR_START.hex(),
        }
        print_json({"format": ANCHOR, **about, "moved_by": anchor.moved_by, "warning": weak})
        return
    out = console()
    if weak:
        console(stderr=True).print(f"warning: {weak}; {WEAK_HINT}", soft_wrap=True)
    if again:
        out.print(
            "the file of remember_releases counts as new: look at its releases before you open",
            soft_wrap=True,
        )
    out.print(f"moved by: {anchor.moved_by}", soft_wrap=True)
    if before == pin:
        out.print(f"made the anchor {anchor.index}; its name is the one that the config pins")
        return
    if before is not None:
        out.print(f"the name is another one than the config pins, {before}", soft_wrap=True)
    out.print(f"made the anchor {anchor.index}; pin it in [providers.{name}]:")
    out.print(f'anchor = "{pin}"')


@anchor_app.command("show")
def show_anchor(context: typer.Context, provider: Provider, as_json: Json = False) -> None:
    """Show the anchor, and whether anything is bound to it.

    Example:
        keymgmt tpm anchor show tpm
    """
    device = find_provider(context, provider)
    value = device.anchor()
    moved = value != ANCHOR_START
    index, name = device.settings.anchor_index, device.settings.anchor
    if as_json:
        about = {"index": index, "name": name, "moved": moved, "value": value.hex()}
        print_json({"format": ANCHOR, **about})
        return
    console().print(f"{index}: {value.hex() if moved else 'nothing is bound to it yet'}")
