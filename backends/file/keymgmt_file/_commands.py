"""Lock a key directory with a passphrase, unlock it, change the passphrase; accept a key file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from keymgmt.backend import ConfigError, SecretSource
from keymgmt.console import print_json, say
from keymgmt_file._keys import KeyFiles
from keymgmt_file._passphrase import Passphrase
from keymgmt_file._provider import FileProvider

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Provider = Annotated[
    str | None,
    typer.Argument(help="Provider in the config; may be left out if only one has this backend."),
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Weak = Annotated[
    bool, typer.Option("--weak", help="Accept a passphrase of fewer than 15 characters.")
]


@app.command()
def lock(
    context: typer.Context, provider: Provider = None, weak: Weak = False, as_json: Json = False
) -> None:
    """Lock all key files with the passphrase that the config names.

    Example:
        keymgmt file lock local
    """
    files = _find(context, provider)
    files.passphrase.weak = weak
    count = files.lock()
    facts = {"path": str(files.path), "files": count}
    _say(f"locked {count} key files in {files.path}", "lock", facts, as_json=as_json)
    if count:
        say(
            "The unlocked files may still be on the disk and in backups; "
            "rotate the keys if that matters.",
            stderr=True,
        )


@app.command()
def unlock(context: typer.Context, provider: Provider = None, as_json: Json = False) -> None:
    """Take the passphrase off all key files.

    Example:
        keymgmt file unlock local
    """
    files = _find(context, provider)
    count = files.unlock()
    facts = {"path": str(files.path), "files": count}
    _say(f"unlocked {count} key files in {files.path}", "unlock", facts, as_json=as_json)
    if files.passphrase.source is not None:
        say(
            f"The config still names a passphrase; remove it from [providers.{files.provider}], "
            "or the next key that is created or rotated is locked again.",
            stderr=True,
        )


@app.command()
def passwd(
    context: typer.Context,
    provider: Provider = None,
    new_file: Annotated[
        Path | None,
        typer.Option(help="Private file with the new passphrase; without it, keymgmt asks."),
    ] = None,
    weak: Weak = False,
    as_json: Json = False,
) -> None:
    """Change the passphrase of a locked key directory.

    Example:
        keymgmt file passwd local
    """
    files = _find(context, provider)
    new_source = SecretSource(file=new_file) if new_file else SecretSource(prompt="New passphrase")
    new = Passphrase(new_source, files.provider, "passwd")
    new.weak = weak
    files.change_passphrase(new)
    facts = {"path": str(files.path)}
    _say(f"changed the passphrase of {files.path}", "passwd", facts, as_json=as_json)
    source = files.passphrase.source
    if source is not None and not source.prompt:
        say(f"Put the new passphrase into its source in the config: {source}", stderr=True)


@app.command()
def accept(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="PROVIDER:KEY", help="The key whose file it is.")],
    as_json: Json = False,
) -> None:
    """Accept a key file that is not the newest of its key, and add a new version to it.

    The number of the new version is above all that were ever used. Models that need a version which
    the file lacks do not open.

    Example:
        keymgmt file accept local:models
    """
    provider, _, name = key.partition(":")
    files = _find(context, provider)
    with files.changing():
        keys = files.find(name)
        files.add_version(keys)
    facts = {"path": str(files.path), "key": key, "version": str(keys.newest)}
    _say(f"made version {keys.newest} of the key {key}", "accept", facts, as_json=as_json)


def _say(text: str, command: str, facts: Mapping[str, object], *, as_json: bool) -> None:
    """Print what was done: as a sentence, or the facts as JSON."""
    if as_json:
        print_json({"format": "keymgmt-file/1", "command": command, **facts})
    else:
        say(text)


def _find(context: typer.Context, name: str | None) -> KeyFiles:
    config = context.obj.config()
    if name is None:
        names = [each for each in config.provider_names if config.backend_of(each) == "file"]
        if len(names) != 1:
            listed = ", ".join(names) or "none"
            raise ConfigError(
                "the provider must be named", hint=f"providers with the backend file: {listed}"
            )
        name = names[0]
    provider: FileProvider = context.obj.provider(name, FileProvider)
    return provider.key_files
