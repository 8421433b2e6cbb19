"""``keymgmt inspect`` and ``verify``: what a sealed model says, and what of it is proved."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import keymgmt
from keymgmt._remote.location import is_location
from keymgmt.cli._options import Json, Model, ModelOrTree, Name, Shard
from keymgmt.cli._output import is_tree, print_finding, progress, tell_refusal, tell_tree
from keymgmt.console import clean, console, print_json, say, table
from keymgmt.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from keymgmt import Inspection

__all__ = ["inspect", "show", "verify"]

_MANY = 20


def inspect(
    context: typer.Context,
    model: Model,
    every_file: Annotated[
        bool, typer.Option("--all", "-a", help="List every file and recipient.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a sealed model says of itself; it takes no key, and proves nothing.

    Example:
        keymgmt inspect resnet50.sealed
    """
    keys = context.obj.config() if is_location(model) else None
    if keys is None and is_tree(model):
        _refuse_tree(model)
    show(keymgmt.inspect(model, keys=keys), as_json=as_json, everything=every_file)


def _refuse_tree(folder: str) -> None:
    """FormatError that names a sealed model below a folder; ``inspect`` refuses one without."""
    from keymgmt._verbs.find_models import find_models

    below = next((each for each in find_models(folder) if isinstance(each, Path)), None)
    if below is not None:
        raise FormatError(
            f"{folder} is not a sealed model, but a folder of them, such as {below}",
            hint=f"name one of them; to prove all of them: keymgmt verify {shlex.quote(folder)}",
        )


def verify(
    context: typer.Context,
    model: ModelOrTree,
    name: Name = None,
    signature_only: Annotated[
        bool,
        typer.Option("--signature-only", help="Check signature and digests; ask no key service."),
    ] = False,
    shard: Shard = None,
    as_json: Json = False,
) -> None:
    """Prove all that can be proved: the publisher, the key, and every byte.

    Examples:
        keymgmt verify resnet50.sealed
        keymgmt verify /srv/models --json
    """
    if is_tree(model, context.obj.config, shard=shard):
        if name is not None:
            raise ConfigError("--name is for one model, and this is a tree of them")
        config = context.obj.config()
        tell_tree(
            lambda within: keymgmt.verify_tree(
                model, keys=config, signature_only=signature_only, shard=shard, progress=within
            ),
            "verifying",
            "keymgmt-verify/1",
            shard=shard,
            as_json=as_json,
        )
        return
    with progress("verifying") as done:
        verification = keymgmt.verify(
            model,
            name=name,
            keys=context.obj.config(),
            signature_only=signature_only,
            progress=done,
        )
    if as_json:
        print_json({"format": "keymgmt-verify/1", **verification.to_json()})
        return
    manifest = verification.manifest
    say(f"{manifest.name}, release {manifest.release}, id {manifest.id.hex()}")
    for finding in verification.findings:
        print_finding(finding.name, finding)


def show(
    inspection: Inspection, *, as_json: bool, verified: bool = False, everything: bool = False
) -> None:
    """Print an inspection; ``verified`` where we just made the model ourselves."""
    from rich.filesize import decimal
    from rich.text import Text

    tell_refusal(inspection.refusal)
    if as_json:
        said = inspection.to_json() | {"verified": verified}
        print_json({"format": "keymgmt-inspect/1", **said})
        return
    manifest = inspection.manifest
    out = console()
    shown, typed = clean(inspection.path), clean(shlex.quote(str(inspection.path)))
    out.print(Text(shown, style="bold"))
    if not verified:
        out.print(
            Text(f"nothing here is verified: `keymgmt verify {typed}` proves it", style="yellow")
        )
    facts = [
        ("name", manifest.name),
        ("release", manifest.release),
        ("created", manifest.created),
        ("id", manifest.id.hex()),
        ("kind", manifest.kind + (f", opened by {manifest.main}" if manifest.main else "")),
        ("profile", f"{manifest.profile}: AES-256-GCM (FLOE), {manifest.digest} digests"),
        # Free text, which must not look like one of the lines above or below.
        *((f"metadata {name}", text) for name, text in manifest.metadata.items()),
    ]
    width = max(len(clean(name)) for name, _ in facts)
    for name, fact in facts:
        say(f"{clean(name):{width}}  {fact}")
    out.print()
    limit = None if everything else _MANY
    files = [(entry.path, decimal(entry.size)) for entry in manifest.files]
    out.print(table(["file", "size"], files[:limit]))
    _more(len(files), limit)
    out.print()
    groups = [(n, " and ".join(group)) for n, group in enumerate(inspection.groups, 1)]
    out.print(table(["group", "opened by"], groups[:limit]))
    _more(len(groups), limit)
    out.print()
    for signer in inspection.signers:
        until = inspection.expiries.get(signer)
        line = f"signed by  {signer}" + (f", until {until}" if until else "")
        say(line if verified else f"{line}, says signatures.json, unchecked")
    if not inspection.signers:
        say("not signed")


def _more(count: int, limit: int | None) -> None:
    if limit is not None and count > limit:
        say(f"... and {count - limit} more: --all")
