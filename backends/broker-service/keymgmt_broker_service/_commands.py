"""Run a key broker, and export the recipient files of its keys."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Final

import typer

from keymgmt.backend import Recipient, SupportsOfflineRecipients, UnsupportedOperation
from keymgmt.console import clean, console, print_json, table
from keymgmt.errors import AccessDenied, ConfigError, FormatError

__all__ = ["app"]

# Modules of the broker are imported when they are used, so that help and completion stay fast.
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
MAX_QUOTE: Final = 65536
_STATES: Final = ((0, "expired"), (7, "old"), (math.inf, "ok"))
"""Days that are left, at most, and what is said then; Intel's collateral lasts 30."""
_Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="The broker's config, broker.toml."),
]


@app.command()
def serve(config: _Config = None) -> None:
    """Answer clients until SIGTERM; SIGHUP, or a changed file, makes it read everything again.

    Example:
        keymgmt broker serve --config broker.toml
    """
    from keymgmt_broker_service._server import serve as run
    from keymgmt_broker_service._settings import DEFAULT

    run(config or DEFAULT)


def export_recipient(path: Path, key: str) -> Recipient:
    """The recipient of a key that the broker's config names.

    Raises:
        ConfigError: there is no such key, or the config is wrong.
        UnsupportedOperation: the key behind it has no public part.
        ProviderError: any other refusal or failure of the key service behind it.
    """
    from keymgmt_broker.protocol import BACKEND

    import keymgmt
    from keymgmt_broker_service._settings import load_service_settings

    settings = load_service_settings(path)
    entry = settings.keys.get(key)
    if entry is None:
        known = ", ".join(sorted(settings.keys))
        raise ConfigError(f"{path} has no key {key[:80]!r}", hint=f"its keys: {known}")
    with keymgmt.load_config(settings.config) as providers:
        provider, behind = entry.find(providers)
        if not isinstance(provider, SupportsOfflineRecipients):
            raise UnsupportedOperation(
                f"{entry.key}: the backend {provider.backend} exports no recipient files",
                hint="behind a broker use a key with a public part, such as one of kind hpke-p256",
            )
        held = provider.export_recipient(behind)
    return Recipient(held.kind, BACKEND, key, held.version, held.public_key)


@app.command()
def export(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="KEY", help="As the broker's config names it.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE")],
    config: _Config = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write the recipient file of a key: models sealed to it open through evidence.

    Example:
        keymgmt broker export resnet50 --output resnet50.recipient
    """
    from keymgmt_broker_service._settings import DEFAULT

    recipient = export_recipient(config or DEFAULT, key)
    recipient.save(output, force=force)
    if context.obj.as_json:
        print_json(
            {
                "format": "keymgmt-export/1",
                "kind": "recipient",
                "file": str(output),
                "content": None,
                "fingerprint": recipient.fingerprint,
                "signature": None,
            }
        )
    else:
        typer.echo(clean(f"{output}: {recipient}, fingerprint {recipient.fingerprint}"))


@app.command()
def collateral(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="As the broker's config names it.")],
    quote: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A quote of a machine that is to be served."),
    ] = None,
) -> None:
    """List what a folder has of Intel's collateral, and until when; exit code 6 if a part expired.

    With --quote, also where the collateral of that machine's platform is missing.

    Example:
        keymgmt broker collateral /var/lib/keymgmt/collateral
    """
    import time
    from datetime import UTC, datetime

    from keymgmt.backend import read_file
    from keymgmt_broker_service._verify._collateral import load_collateral, platform_of

    entries = load_collateral(folder).entries
    left = {each: (entry.until - time.time()) / 86400 for each, entry in entries.items()}
    found = [
        {
            **platform._asdict(),
            "file": entry.path.name,
            "until": datetime.fromtimestamp(entry.until, UTC).isoformat(),
            "state": next(word for days, word in _STATES if left[platform] <= days),
        }
        for platform, entry in sorted(entries.items())
    ]
    for path in quote or []:
        read = read_file(path, label="quote", limit=MAX_QUOTE, access="any")
        try:
            platform = platform_of(bytes(read))
        except AccessDenied as error:
            raise FormatError(f"{path}: {error}", hint="name a file that holds a quote") from error
        if platform not in entries:
            found.append({**platform._asdict(), "file": None, "until": None, "state": "missing"})
    if context.obj.as_json:
        print_json({"format": "keymgmt-broker-collateral/1", "platforms": found})
    else:
        columns = ("kind", "fmspc", "ca", "file", "until", "state")
        rows = [[each[name] or "-" for name in columns] for each in found]
        console().print(table(columns, rows))
    if any(each["state"] in ("expired", "missing") for each in found):
        raise typer.Exit(6)
