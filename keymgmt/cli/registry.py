"""``keymgmt push`` and ``pull``: sealed models in a registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import keymgmt
from keymgmt.cli._options import Json, Model, Name, complete_registry
from keymgmt.cli._output import progress, tell_refusal
from keymgmt.console import print_json, say

__all__ = ["pull", "push"]

Registry = Annotated[
    str,
    typer.Argument(
        metavar="oci://HOST/REPOSITORY:TAG",
        help="Where it is in a registry.",
        autocompletion=complete_registry,
    ),
]


def push(
    context: typer.Context,
    model: Model,
    location: Registry,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Move the tag, whatever it is by now.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a sealed model to a registry: only the files that are not there yet.

    An existing tag must have the digest from which this model was pulled. Registries cannot check
    and move it in one step: of two that push at the same moment, the second one wins.

    Example:
        keymgmt push resnet50.sealed oci://registry.example/models/resnet50:7
    """
    with progress("pushing") as done:
        pushed = keymgmt.push(
            model, location, force=force, keys=context.obj.config(), progress=done
        )
    tell_refusal(pushed.refusal)
    if as_json:
        print_json({"format": "keymgmt-push/1", **pushed.to_json()})
        return
    did = f"{_size(pushed.sent)} sent" + ("" if pushed.moved else ", the tag was right already")
    say(f"{pushed.manifest.name}, release {pushed.manifest.release}: {did}")
    say(f"{pushed.location} is {pushed.digest}")


def pull(
    context: typer.Context,
    location: Registry,
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL.sealed", help="The folder to make, or update."),
    ],
    name: Name = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            "-f",
            help="Replace a model of another name, a later release, or one that was changed here.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Download a sealed model from a registry if this config accepts it: only missing files.

    After an interruption it goes on where it ended when it is run again.

    Example:
        keymgmt pull oci://registry.example/models/resnet50:7 resnet50.sealed
    """
    with progress("pulling") as done:
        pulled = keymgmt.pull(
            location, model, name=name, force=force, keys=context.obj.config(), progress=done
        )
    if as_json:
        print_json({"format": "keymgmt-pull/1", **pulled.to_json()})
        return
    message = f"{pulled.manifest.name}, release {pulled.manifest.release}: {pulled.state}"
    say(f"{message}, {_size(pulled.received)} received")
    say(f"{pulled.location} is {pulled.digest}")


def _size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)
