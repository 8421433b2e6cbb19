"""``keymgmt rewrap`` and ``reseal``: change who opens a sealed model."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

import keymgmt
from keymgmt._system.words import counted
from keymgmt.cli._options import (
    Expires,
    Fingerprint,
    Group,
    Json,
    ModelOrTree,
    Name,
    Shard,
    Sign,
    complete_group,
    complete_member,
    moment,
    utc_time,
)
from keymgmt.cli._output import (
    check_release,
    counter,
    is_tree,
    progress,
    tell_failures,
    tell_tree,
    worst,
)
from keymgmt.cli.inspect import show
from keymgmt.console import console, print_json, print_line, say
from keymgmt.errors import ConfigError
from keymgmt.sealed.times import utc_text

if TYPE_CHECKING:
    from keymgmt import Rewrapped

__all__ = ["reseal", "rewrap"]

FORMAT: Final = "keymgmt-rewrap/1"


def rewrap(
    context: typer.Context,
    path: ModelOrTree,
    add: Annotated[
        list[str] | None,
        typer.Option(
            "--add",
            metavar="GROUP",
            help="A further group that opens the model, as for `seal --to`.",
            autocompletion=complete_group,
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            "--drop",
            metavar="GROUP",
            help="A group to take out, as `inspect` shows it, with all versions of its keys.",
            autocompletion=complete_member,
        ),
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="GROUP",
            help="Exactly these groups open the model from now on; may be repeated.",
            autocompletion=complete_group,
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Drop only the version that is written.")
    ] = False,
    name: Name = None,
    fingerprint: Fingerprint = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Even if no group is left that opens it here.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Show what would be done; write nothing.")
    ] = False,
    shard: Shard = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of a tree: write finished models into FILE; a later run passes over them.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Change who opens a model; without --add, --drop and --set, move to newest key versions.

    Only keys.json is replaced. A party that once held the model's data key can still decrypt the
    model: `reseal` encrypts it with a new data key.

    Examples:
        keymgmt rewrap /srv/models --dry-run
        keymgmt rewrap resnet50.sealed --add site:resnet50 --drop file:models
    """
    config = context.obj.config()
    options = {
        "add": add or (),
        "drop": drop or (),
        "to": to or (),
        "exact": exact,
        "keys": config,
        "fingerprints": fingerprint or (),
        "force": force,
        "dry_run": dry_run,
    }
    if not is_tree(path, context.obj.config, shard=shard):
        if resume is not None:
            raise ConfigError("--resume is for a tree, and this is one model")
        done = keymgmt.rewrap(path, name=name, **options)
        if as_json:
            print_json({"format": FORMAT, **done.to_json()})
        else:
            _tell(done, dry_run=dry_run)
        if done.exit_code:
            raise typer.Exit(done.exit_code)
        return
    if name is not None:
        raise ConfigError("--name is for one model, and this is a tree of them")
    options |= {"shard": shard, "resume": resume}
    _tree(path, options, dry_run=dry_run, as_json=as_json)


def _tree(path: str, options: dict[str, Any], *, dry_run: bool, as_json: bool) -> None:
    states: Counter[str] = Counter()
    codes: set[int] = set()
    models = changed = skipped = 0
    failed: list[keymgmt.Failure] = []
    with counter("rewrapping") as tick:
        results = keymgmt.rewrap_tree(path, **options)
        for item in tell_failures(results, tick, FORMAT, failed, as_json=as_json):
            models += 1
            changed += item.changed
            skipped += item.skipped
            codes.add(item.exit_code)
            states.update(group.state for group in item.groups)
            if as_json:
                print_line({"format": FORMAT, **item.to_json()})
            elif item.changed or item.exit_code:
                _tell(item, dry_run=dry_run)
    code = worst(codes | {failure.error.exit_code for failure in failed})
    if as_json:
        print_line(
            {
                "format": FORMAT,
                "models": models,
                "changed": changed,
                "skipped": skipped,
                "failed": len(failed),
                "groups": dict(states),
                "dry_run": dry_run,
                "shard": options["shard"],
                "exit_code": code,
            }
        )
    else:
        word = "would change" if dry_run else "changed"
        before = f", finished before {skipped}" if options["resume"] is not None else ""
        console().print(
            f"{counted(models, 'model')}, {word} {changed}, failed {len(failed)}{before}"
        )
        listed = ", ".join(f"{state} {count}" for state, count in sorted(states.items()))
        console().print(f"groups: {listed or 'none'}")
    if code:
        raise typer.Exit(code)


def _tell(done: Rewrapped, *, dry_run: bool) -> None:
    from keymgmt._verbs.rewrap_groups import EXIT_CODES

    word = ("would change" if dry_run else "changed") if done.changed else "nothing changed"
    say(f"{done.path}: {word}")
    for group in done.groups:
        tested = "opens here" if group.tested else "not tested here"
        if group.state in ("dropped", "foreign", *EXIT_CODES):
            tested = ""
        notes = ", ".join(filter(None, [tested, group.note]))
        say(f"  {group.state:11} {group.group}" + (f" ({notes})" if notes else ""))
        if group.error is not None and group.state in EXIT_CODES:
            text = " ".join(filter(None, [str(group.error), group.error.hint]))
            say(f"{done.path}: {text}", stderr=True)
    for left in done.left:
        say(f"{done.path}: {left} is left, with a key that was dropped", stderr=True)


def reseal(
    context: typer.Context,
    model: ModelOrTree,
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
    expires: Expires = None,
    created_before: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="In a tree, only what was sealed or resealed before; to go on after an "
            "interruption.",
        ),
    ] = None,
    shard: Shard = None,
    as_json: Json = False,
) -> None:
    """Encrypt a model anew, for these groups and no others: who held the old key loses access.

    The old groups are not taken over. No plaintext touches a disk. Of a folder of models, each.

    Example:
        keymgmt reseal resnet50.sealed --to local:models
    """
    until = moment(expires) if expires is not None else None
    if is_tree(model, shard=shard):
        if target is not None or name is not None or release is not None:
            raise ConfigError("OUT.sealed, --name and --release are for one model, and not a tree")
        if created_before is None:
            begin = utc_text(datetime.now(UTC) + timedelta(seconds=1))
            again = f"where this is interrupted, run it again with --created-before {begin}"
            say(again, stderr=True)
        work = partial(
            keymgmt.reseal_tree,
            model,
            to=to or (),
            sign=sign,
            keys=context.obj.config(),
            fingerprints=fingerprint or (),
            expires=until,
            created_before=utc_time(created_before) if created_before is not None else None,
            shard=shard,
        )
        tell_tree(
            lambda told: work(progress=told),
            "resealing",
            "keymgmt-reseal/1",
            shard=shard,
            as_json=as_json,
        )
        return
    if created_before is not None:
        raise ConfigError("--created-before is for a tree, and this is one model")
    if release is not None:
        check_release(release)
    with progress("resealing") as bytes_done:
        inspection = keymgmt.reseal(
            model,
            target,
            to=to or (),
            sign=sign,
            keys=context.obj.config(),
            name=name,
            release=release,
            fingerprints=fingerprint or (),
            expires=until,
            progress=bytes_done,
        )
    show(inspection, as_json=as_json, verified=True)
