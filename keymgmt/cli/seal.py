"""``keymgmt seal``, ``unseal`` and ``sign``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import keymgmt
from keymgmt.cli._options import (
    Fingerprint,
    Force,
    Group,
    Json,
    Model,
    Name,
    Sign,
    complete_key,
    option_pairs,
)
from keymgmt.cli._output import clean, console, print_json, progress
from keymgmt.cli.inspect import show

__all__ = ["seal", "sign", "unseal"]


def seal(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="An IR's .xml (its .bin beside it), an .onnx, or a folder."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.sealed", help="The folder to write.")],
    to: Group = None,
    sign: Sign = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name; else from MODEL.")
    ] = None,
    release: Annotated[
        int, typer.Option(metavar="N", min=0, help="Its number, which later releases raise.")
    ] = 0,
    profile: Annotated[
        str | None, typer.Option(metavar="default|fips", help="Algorithms; else the config's.")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            "--metadata", "-m", metavar="NAME=VALUE", help="Plain text for people; may come again."
        ),
    ] = None,
    fingerprint: Fingerprint = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Encrypt a model for everybody who may open it, and sign it."""
    with progress("sealing") as done:
        inspection = keymgmt.seal(
            source,
            target,
            to=to or (),
            sign=sign,
            keys=context.obj.config(),
            name=name,
            release=release,
            profile=profile,
            metadata=option_pairs(metadata or []),
            fingerprints=fingerprint or (),
            force=force,
            progress=done,
        )
    show(inspection, as_json=as_json, verified=True)


def unseal(
    context: typer.Context,
    model: Model,
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="The folder to make, readable by you only.")
    ],
    name: Name = None,
    as_json: Json = False,
) -> None:
    """Write the plain files of a sealed model to disk, where nothing protects them any more."""
    with progress("unsealing") as done:
        manifest = keymgmt.unseal(
            model, directory, name=name, keys=context.obj.config(), progress=done
        )
    if as_json:
        files = [entry.path for entry in manifest.files]
        print_json({"directory": str(directory), "name": manifest.name, "files": files})
        return
    console().print(f"{clean(manifest.name)}: {len(manifest.files)} files in {clean(directory)}")
    console(stderr=True).print("this is plaintext on a disk: delete it when you are done")


def sign(
    context: typer.Context,
    model: Model,
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROVIDER:KEY]",
            help="The publisher's key; else that of the config.",
            autocompletion=complete_key,
        ),
    ] = None,
) -> None:
    """Add a publisher's signature, after every digest was checked."""
    with progress("checking digests") as done:
        keymgmt.sign(model, key=key, keys=context.obj.config(), progress=done)
    console().print(f"signed {clean(model)}")
