"""``keymgmt seal``, ``unseal`` and ``sign``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

import keymgmt
from keymgmt._system.words import counted
from keymgmt.cli._options import (
    Expires,
    Fingerprint,
    Force,
    Group,
    Json,
    Model,
    ModelOrTree,
    Name,
    Shard,
    Sign,
    complete_key,
    moment,
    option_pairs,
)
from keymgmt.cli._output import (
    check_release,
    is_tree,
    print_warning,
    progress,
    tell_refusal,
    tell_tree,
)
from keymgmt.cli.inspect import show
from keymgmt.console import print_json, say
from keymgmt.errors import KeymgmtError

if TYPE_CHECKING:
    from keymgmt import Config
    from keymgmt._verbs.source import Source

__all__ = ["seal", "sign", "unseal"]

_SHOWN: Final = 10


def seal(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="An IR's .xml, an .onnx, another graph, or a folder."),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.sealed", help="The folder to write.")],
    to: Group = None,
    sign: Sign = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name; else from MODEL.")
    ] = None,
    release: Annotated[
        int, typer.Option(metavar="N", min=0, help="Number of the release; later ones are higher.")
    ] = 0,
    profile: Annotated[
        str | None,
        typer.Option(metavar="default|fips|cnsa2", help="Algorithms; else the config's."),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            "--metadata", "-m", metavar="NAME=VALUE", help="Plain text for people; may be repeated."
        ),
    ] = None,
    fingerprint: Fingerprint = None,
    expires: Expires = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Encrypt a model for everybody who may open it, and sign it.

    Examples:
        keymgmt seal resnet50.xml resnet50.sealed --release 1
        keymgmt seal folder model.sealed --to local:models --to @device7.recipient
    """
    check_release(release)
    until = moment(expires) if expires is not None else None
    from keymgmt._verbs.source import find_source, why_not_loaded

    config = context.obj.config()
    found = find_source(source)
    _tell_source(found)
    with progress("sealing") as done:
        inspection = keymgmt.seal(
            found,
            target,
            to=to or (),
            sign=sign,
            keys=config,
            name=name,
            release=release,
            profile=profile,
            metadata=option_pairs(metadata or []),
            fingerprints=fingerprint or (),
            expires=until,
            force=force,
            progress=done,
        )
    show(inspection, as_json=as_json, verified=True)
    manifest = inspection.manifest
    if said := why_not_loaded(manifest.kind, manifest.main, manifest.by_path):
        say(f"note: {said}", stderr=True)


def _tell_source(found: Source) -> None:
    """Name, before anything is sealed, the files that are probably a mistake or are left out."""
    from keymgmt._verbs.plain_files import IGNORE

    path = found.path
    if found.doubtful:
        text = f"this looks like secrets or leftovers, and is sealed too: {_some(found.doubtful)}"
        hint = f"name the files to leave out in {path / IGNORE}"
        if not path.is_dir():
            hint = f"{path.name} names it: look into that file first, if you did not make it"
        print_warning(KeymgmtError(text, hint=hint))
    for title, paths in (
        ("sealed with it", found.beside),
        (f"left out by {IGNORE}", found.left_out),
        ("empty folders are not sealed", found.empty),
    ):
        if paths:
            say(f"{title}: {_some(paths)}", stderr=True)


def _some(paths: Sequence[str]) -> str:
    more = f", and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more


def unseal(
    context: typer.Context,
    model: Model,
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="The new folder, readable by you only.")
    ],
    name: Name = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Only onto a file system in memory (tmpfs, ramfs).")
    ] = False,
    allow_swap: Annotated[
        bool,
        typer.Option("--allow-swap", help="With --memory, also where unencrypted swap is on."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the plain files of a sealed model, where nothing protects them any more.

    Example:
        keymgmt unseal resnet50.sealed plain
    """
    with progress("unsealing") as done:
        manifest = keymgmt.unseal(
            model,
            directory,
            name=name,
            keys=context.obj.config(),
            memory=memory,
            allow_swap=allow_swap,
            progress=done,
        )
    if as_json:
        files = [entry.path for entry in manifest.files]
        said = {"directory": str(directory), "name": manifest.name, "files": files}
        print_json({"format": "keymgmt-unseal/1", **said})
        return
    say(f"{manifest.name}: {counted(len(manifest.files), 'file')} in {directory}")
    where = "in memory" if memory else "on a disk"
    say(f"this is plaintext {where}: delete it when you are done", stderr=True)


def sign(
    context: typer.Context,
    model: ModelOrTree,
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROVIDER:KEY]",
            help="The publisher's key; else that of the config.",
            autocompletion=complete_key,
        ),
    ] = None,
    expires: Expires = None,
    unopened: Annotated[
        bool,
        typer.Option(
            "--unopened", help="Sign a model that does not open here, after checking its digests."
        ),
    ] = False,
    if_signed_by: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="OLD.pem", help="Sign only models that this public key signed; may be repeated."
        ),
    ] = None,
    shard: Shard = None,
    as_json: Json = False,
) -> None:
    """Add a publisher's signature, after the model was opened and every digest checked.

    With a folder of models, each of them is signed.

    Example:
        keymgmt sign resnet50.sealed local:publisher --expires 30d
    """
    from keymgmt._remote.location import need_folder
    from keymgmt._trust.candidate import refusal

    need_folder(model)
    until = moment(expires) if expires is not None else None
    config = context.obj.config()
    options = {
        "key": key,
        "expires": until,
        "unopened": unopened,
        "keys": config,
        "if_signed_by": if_signed_by or (),
    }
    if is_tree(model, shard=shard):
        made = keymgmt.sign_tree(model, **options, shard=shard)
        tell_tree(lambda _: made, "signing", "keymgmt-sign/1", shard=shard, as_json=as_json)
        return
    say(f"{model} {_signed_by(model, config)}", stderr=True)
    with progress("checking digests") as done:
        signed = keymgmt.sign(model, **options, progress=done)
    refused = refusal(model, config)
    tell_refusal(refused)
    if as_json:
        said = str(refused) if refused else None
        shown = {"path": str(model), "signed": signed, "unopened": unopened, "refusal": said}
        print_json({"format": "keymgmt-sign/1", **shown})
        return
    said = f"signed {model}" + (f", until {until:%Y-%m-%d %H:%M}" if until else "")
    say(said + (", unopened: who made it was not checked" if unopened else ""))


def _signed_by(model: str, config: Config) -> str:
    """The present signers of a model, which a further signer should know."""
    from keymgmt._trust.policy import load_publishers

    known = {publisher.key.id: publisher.file.name for publisher in load_publishers(config)}
    signers = keymgmt.inspect(model).signers
    if not signers:
        return "has no signature yet"
    return "was signed by " + ", ".join(
        known.get(signer, f"a stranger (key {signer[:16]})") for signer in signers
    )
