"""``keymgmt rewrap`` and ``reseal``: who opens a sealed model from now on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import keymgmt
from keymgmt.cli._options import (
    Fingerprint,
    Group,
    Json,
    Model,
    Name,
    Sign,
    complete_key,
)
from keymgmt.cli._output import clean, console, counter, print_json, progress
from keymgmt.cli.inspect import show
from keymgmt.errors import ConfigError
from keymgmt.sealed.folder import MANIFEST

if TYPE_CHECKING:
    from keymgmt import Rewrapped

__all__ = ["reseal", "rewrap"]


def rewrap(
    context: typer.Context,
    path: Annotated[
        Path, typer.Argument(metavar="MODEL.sealed|TREE", help="A sealed model, or many below.")
    ],
    add: Annotated[
        list[str] | None,
        typer.Option(
            "--add",
            metavar="GROUP",
            help="A group that shall open it too, as for `seal --to`.",
            autocompletion=complete_key,
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option("--drop", metavar="GROUP", help="A group to take out, as `inspect` shows it."),
    ] = None,
    name: Name = None,
    fingerprint: Fingerprint = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Even if nothing is left that opens here.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Say what would be done; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Change who opens a model; with neither --add nor --drop, move to the newest key versions.

    Only keys.json is replaced. Who once held the model's data key keeps what it has: `reseal`
    makes a new one.
    """
    config = context.obj.config()
    options = {
        "add": add or (),
        "drop": drop or (),
        "keys": config,
        "fingerprints": fingerprint or (),
        "force": force,
        "dry_run": dry_run,
    }
    if (path / MANIFEST).is_file() or not path.is_dir():
        done = keymgmt.rewrap(path, name=name, **options)
        if as_json:
            print_json(asdict(done))
        else:
            _tell(done, dry_run=dry_run)
        return
    if name is not None:
        raise ConfigError("--name is for one model, and this is a tree of them")
    _tree(path, options, dry_run=dry_run, as_json=as_json)


def _tree(path: Path, options: dict[str, object], *, dry_run: bool, as_json: bool) -> None:
    done: list[Rewrapped] = []
    failed: list[keymgmt.Failure] = []
    with counter("rewrapping") as tick:
        for item in keymgmt.rewrap_tree(path, **options):  # type: ignore[arg-type]
            tick()
            if isinstance(item, keymgmt.Failure):
                failed.append(item)
                console(stderr=True).print(f"{clean(item.path)}: {clean(item.error)}")
                continue
            done.append(item)
            if item.changed and not as_json:
                _tell(item, dry_run=dry_run)
    if not done and not failed:
        raise ConfigError(f"no sealed model at or below {path}")
    changed = sum(item.changed for item in done)
    if as_json:
        failures = [{"path": each.path, "error": str(each.error)} for each in failed]
        print_json({"models": [asdict(item) for item in done], "failures": failures})
    else:
        word = "would change" if dry_run else "changed"
        console().print(f"{len(done)} models, {word} {changed}, failed {len(failed)}")
    if failed:
        raise typer.Exit(failed[0].error.exit_code)


def _tell(done: Rewrapped, *, dry_run: bool) -> None:
    out = console()
    word = ("would change" if dry_run else "changed") if done.changed else "nothing to change"
    out.print(f"{clean(done.path)}: {word}", soft_wrap=True)
    for group in done.groups:
        tested = "opens here" if group.tested else "not tested here"
        if group.change == "dropped":
            tested = ""
        notes = ", ".join(filter(None, [tested, group.note]))
        line = f"  {group.change:9} {clean(group.group)}" + (f" ({clean(notes)})" if notes else "")
        out.print(line, soft_wrap=True)


def reseal(
    context: typer.Context,
    model: Model,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT.sealed]", help="A new folder; else MODEL is replaced."),
    ] = None,
    to: Group = None,
    sign: Sign = None,
    name: Name = None,
    release: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Its number; else the old one.")
    ] = None,
    fingerprint: Fingerprint = None,
    as_json: Json = False,
) -> None:
    """Encrypt a model anew, for these groups and no others: who held the old key loses access.

    The old groups are not taken over. No plaintext touches a disk.
    """
    with progress("resealing") as done:
        inspection = keymgmt.reseal(
            model,
            target,
            to=to or (),
            sign=sign,
            keys=context.obj.config(),
            name=name,
            release=release,
            fingerprints=fingerprint or (),
            progress=done,
        )
    show(inspection, as_json=as_json, verified=True)
