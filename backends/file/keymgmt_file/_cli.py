"""Lock key files with a passphrase, unlock them, change it."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from keymgmt.backend import ConfigError, SecretSource, wipe
from keymgmt_file._provider import FileProvider

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Provider = Annotated[
    str | None,
    typer.Argument(help="Provider in the config; may be left out where only one is of `file`."),
]


@app.command()
def lock(context: typer.Context, provider: Provider = None) -> None:
    """Lock all key files with the passphrase that the config names: all of them or none."""
    files = _find(context, provider)
    source = files.settings.passphrase
    new = None
    if source is not None and source.prompt and not any(files.locked_keys().values()):
        # Nothing here can tell a mistyped passphrase yet, so it is asked for twice.
        new = _ask_twice(source.prompt)
    count = files.lock(new)
    typer.echo(f"locked {count} key files in {files.settings.path}")
    if count:
        typer.echo(
            "What stood there before may still be found on the disk and in backups; "
            "rotate the keys if that matters.",
            err=True,
        )


@app.command()
def unlock(context: typer.Context, provider: Provider = None) -> None:
    """Take the passphrase off all key files: all of them or none."""
    files = _find(context, provider)
    typer.echo(f"unlocked {files.unlock()} key files in {files.settings.path}")
    if files.settings.passphrase is not None:
        typer.echo(
            f"The config still names a passphrase; take it out of [providers.{files.name}], "
            "or the next key that is made or rotated is locked again.",
            err=True,
        )


@app.command()
def passwd(
    context: typer.Context,
    provider: Provider = None,
    new_file: Annotated[
        Path | None, typer.Option(help="Private file with the new passphrase; else it is asked.")
    ] = None,
) -> None:
    """Lock all key files with a new passphrase: all of them or none."""
    files = _find(context, provider)
    if not any(files.locked_keys().values()):
        raise ConfigError(
            f"no key file in {files.settings.path} is locked",
            hint=f"keymgmt file lock {files.name}",
        )
    if new_file is None:
        new = _ask_twice("New passphrase")
    else:
        new = SecretSource.model_validate({"file": str(new_file)}).read
    count = files.lock(new)
    typer.echo(f"locked {count} key files in {files.settings.path} with the new passphrase")
    source = files.settings.passphrase
    if source is not None and not source.prompt:
        typer.echo(f"Put the new one where the config looks for it: {source}", err=True)


def _find(context: typer.Context, name: str | None) -> FileProvider:
    config = context.obj.config()
    if name is None:
        names = [each for each in config.provider_names if config.backend_of(each) == "file"]
        if len(names) != 1:
            found = ", ".join(names) or "none"
            raise ConfigError(
                "which provider?", hint=f"providers with the backend file: {found}; name one"
            )
        name = names[0]
    provider = config.provider(name)
    if not isinstance(provider, FileProvider):
        raise ConfigError(f"the provider {name!r} is of the backend {config.backend_of(name)!r}")
    return provider


def _ask_twice(text: str) -> Callable[[], bytearray]:
    first = SecretSource(prompt=text).read()
    second = SecretSource(prompt=f"{text}, again").read()
    same = hmac.compare_digest(first, second)
    wipe(second)
    if not same:
        wipe(first)
        raise ConfigError("the two passphrases differ", hint="nothing was changed; try again")
    return lambda: bytearray(first)
