"""``keymgmt keys``: the keys of a provider, as far as it lets itself be managed."""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import keymgmt
from keymgmt._names import KeyRef
from keymgmt._provider import (
    KeyInfo,
    KeyProvider,
    SupportsKeyManagement,
    SupportsOfflineRecipients,
    SupportsSigning,
)
from keymgmt._recipient import (
    Recipient,
    plain_fingerprint,
    recipient_message,
    sign_recipient,
)
from keymgmt.cli._options import Force, Json, Key, Provider, complete_key, option_pairs
from keymgmt.cli._output import clean, console, print_json, table, write_result
from keymgmt.cli._state import State
from keymgmt.cli.init import pem
from keymgmt.errors import (
    ConfigError,
    KeymgmtError,
    UnsupportedOperation,
    UntrustedPublisher,
)

__all__ = ["app"]

app = typer.Typer(help="Make, list, rotate, retire and export keys.", no_args_is_help=True)


@app.command()
def create(
    context: typer.Context,
    key: Key,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="What to make, as `keymgmt backends` lists it; else the provider's first choice "
            "that wraps.",
        ),
    ] = None,
    sign: Annotated[bool, typer.Option("--sign", help="A key that signs, not one that wraps.")] = (
        False
    ),
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="What only this backend knows; may come again."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key."""
    reference, provider = _managed(context, key)
    purpose = "sign" if sign else "wrap"
    if kind is None:
        kinds = [name for name, use in provider.key_kinds.items() if use == purpose]
        if not kinds:
            raise UnsupportedOperation(f"the keys of {reference.provider} do not {purpose}")
        kind = kinds[0]
    elif sign and provider.key_kinds.get(kind, "sign") != "sign":
        raise ConfigError(f"a key of kind {kind!r} does not sign", hint="leave out --sign")
    _show(reference, provider.create_key(reference.key, kind, option_pairs(option or [])), as_json)


@app.command("list")
def list_keys(context: typer.Context, provider: Provider = None, as_json: Json = False) -> None:
    """List the keys of the providers; exit by the first that failed."""
    config = context.obj.config()
    rows: list[tuple[str, KeyInfo]] = []
    failed: list[tuple[str, KeymgmtError]] = []
    for name in provider or config.provider_names:
        try:
            found = config.provider(name)
            if isinstance(found, SupportsKeyManagement):
                rows += [(f"{name}:{info.key}", info) for info in found.list_keys()]
        except ConfigError:
            raise
        except KeymgmtError as error:
            # One that is down does not hide the keys of the others.
            failed.append((name, error))
    if as_json:
        print_json([_plain(reference, info) for reference, info in rows])
    else:
        columns = ["key", "purpose", "kind", "version", "created"]
        console().print(
            table(
                columns,
                [
                    (
                        reference,
                        info.purpose,
                        info.kind,
                        f"{info.newest} of {len(info.versions)}",
                        info.versions[-1].created or "-",
                    )
                    for reference, info in rows
                ],
            )
        )
    for name, problem in failed[1:]:
        typer.echo(f"{name}: {clean(problem)}", err=True)
    if failed:
        raise failed[0][1]


@app.command()
def show(context: typer.Context, key: Key, as_json: Json = False) -> None:
    """Show a key and its versions."""
    reference, provider = _managed(context, key)
    _show(reference, provider.describe_key(reference.key), as_json)


@app.command()
def rotate(context: typer.Context, key: Key, as_json: Json = False) -> None:
    """Add a version that new wraps or signatures use; old ones still open what they opened."""
    reference, provider = _managed(context, key)
    _show(reference, provider.rotate_key(reference.key), as_json)


@app.command()
def export(
    context: typer.Context,
    key: Key,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="pem|recipient",
            help="The public key of a publisher (pem), or a recipient file that others seal to; "
            "else what the key is for.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Else stdout.")
    ] = None,
    sign: Annotated[
        str | None,
        typer.Option(
            metavar="PROVIDER:KEY",
            help="Sign the recipient file into FILE.sig.",
            autocompletion=complete_key,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write the public part of a key."""
    reference, provider = _find(context, key)
    if form is None:
        form = _natural_form(reference, provider)
    if sign is not None and (form != "recipient" or output is None):
        raise ConfigError("--sign signs a recipient file: it needs --output")
    if form == "pem":
        if not isinstance(provider, SupportsSigning):
            raise UnsupportedOperation(f"the provider {reference.provider} does not sign")
        write_result(pem(provider.public_key(reference.key)), output, force=force)
    elif form == "recipient":
        if not isinstance(provider, SupportsOfflineRecipients):
            raise UnsupportedOperation(
                f"the keys of {reference.provider} have no public part to which others seal",
                hint="seal where this provider is configured: --to " + str(reference),
            )
        recipient = provider.export_recipient(reference.key)
        write_result(recipient.to_bytes(), output, force=force)
        if sign is not None and output is not None:
            _vouch(context, recipient, output, sign, force=force)
        # Who seals to it compares this, told over another way, with what he received.
        typer.echo(f"fingerprint {recipient.fingerprint}", err=True)
    else:
        raise ConfigError(f"no format {form!r}", hint="formats: pem, recipient")


@app.command()
def vouch(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE.recipient", help="As the device wrote it.")],
    sign: Annotated[
        str, typer.Option(metavar="PROVIDER:KEY", help="Who vouches.", autocompletion=complete_key)
    ],
    fingerprint: Annotated[
        str, typer.Option(metavar="HEX", help="Its fingerprint, as the device itself shows it.")
    ],
    force: Force = False,
) -> None:
    """Sign another machine's recipient file, so that others seal to it without a fingerprint.

    They trust the signer by `recipient_signers` in `[policy]`.
    """
    recipient = Recipient.load(file)
    if plain_fingerprint(fingerprint) != plain_fingerprint(recipient.fingerprint):
        raise UntrustedPublisher(
            f"{file} has another fingerprint: {recipient.fingerprint}",
            hint="the file is not the one that the device wrote; fetch it again",
        )
    _vouch(context, recipient, file, sign, force=force)


def _vouch(
    context: typer.Context, recipient: Recipient, file: Path, sign: str, *, force: bool
) -> None:
    reference, signer = _find(context, sign)
    if not isinstance(signer, SupportsSigning):
        raise UnsupportedOperation(f"{reference.provider} does not sign")
    signature = signer.sign(reference.key, recipient_message(recipient))
    write_result(sign_recipient([signature]), file.with_name(file.name + ".sig"), force=force)


@app.command()
def retire(
    context: typer.Context,
    key: Annotated[
        str,
        typer.Argument(
            metavar="PROVIDER:KEY@VERSION", help="A version.", autocompletion=complete_key
        ),
    ],
    tree: Annotated[
        Path | None,
        typer.Option(metavar="TREE", help="Refuse while a sealed model below still names it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Stop a version from being used: what only it opens does not open any more."""
    reference, provider = _managed(context, key, version=True)
    if tree is not None:
        backend = context.obj.config().backend_of(reference.provider)
        _refuse_needed(tree, backend, reference)
    _show(reference, provider.retire_version(reference.key, str(reference.version)), as_json)


def _refuse_needed(tree: Path, backend: str, reference: KeyRef) -> None:
    found = keymgmt.usage(tree)
    if found.failures:
        first = found.failures[0]
        raise ConfigError(
            f"{len(found.failures)} in {tree} cannot be read, so nobody knows whether {reference} "
            f"is needed; the first: {first.path}: {first.error}",
            hint="repair or remove them, or retire without --tree",
        )
    use = found.of(backend, reference.key, str(reference.version))
    if use is not None:
        raise ConfigError(
            f"{reference} opens {use.opens} models in {tree}, and is the only way into "
            f"{len(use.only_way_into)}",
            hint=f"first: keymgmt rewrap {tree}",
        )


@app.command()
def usage(
    context: typer.Context,
    tree: Annotated[Path, typer.Argument(metavar="TREE", help="A folder of sealed models.")],
    key: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROVIDER:KEY]...",
            help="Keys of the config, to see which of their versions nothing names.",
            autocompletion=complete_key,
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV on stdout.")] = False,
    as_json: Json = False,
) -> None:
    """Show which key versions the sealed models of a tree need. Nothing of it is authenticated."""
    found = keymgmt.usage(tree)
    uses = [
        (use.backend, use.key, use.version, use.opens, len(use.only_way_into)) for use in found.keys
    ]
    known = {use[:3] for use in uses}
    for text in key or []:
        reference, provider = _managed(context, text)
        backend = context.obj.config().backend_of(reference.provider)
        for version in provider.describe_key(reference.key).versions:
            place = (backend, reference.key, version.version)
            if place not in known:
                uses.append((*place, 0, 0))
    columns = ("backend", "key", "version", "opens", "only_way_into")
    if as_json:
        unused = [dict(zip(columns[:3], use[:3], strict=True)) for use in uses if not use[3]]
        print_json({**found.to_json(), "not_referenced": unused})
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([columns, *uses])
    else:
        rows = [(*use[:3], _verdict(use[3], use[4], complete=not found.failures)) for use in uses]
        console().print(table(["backend", "key", "version", "in this tree"], rows))
        console().print(f"{found.models} models, unauthenticated: who writes here can hide one")
    for failure in found.failures:
        console(stderr=True).print(f"{clean(failure.path)}: {clean(failure.error)}")
    if found.failures:
        raise typer.Exit(found.failures[0].error.exit_code)


def _verdict(opens: int, only: int, *, complete: bool) -> str:
    if opens:
        return f"opens {opens} models, is the only way into {only}"
    return "not referenced in this tree" if complete else "unknown: not all could be read"


def _find(context: typer.Context, text: str) -> tuple[KeyRef, KeyProvider[Any]]:
    state: State = context.obj
    reference = KeyRef.parse(text)
    if reference.version is not None:
        raise ConfigError(f"not a key: {text}", hint=f"leave out the version: {text.split('@')[0]}")
    return reference, state.config().provider(reference.provider)


def _managed(
    context: typer.Context, text: str, *, version: bool = False
) -> tuple[KeyRef, SupportsKeyManagement]:
    state: State = context.obj
    reference = KeyRef.parse(text)
    if version and reference.version is None:
        raise ConfigError(f"which version of {text}?", hint=f"write {text}@VERSION")
    if not version and reference.version is not None:
        raise ConfigError(f"not a key: {text}", hint=f"leave out the version: {text.split('@')[0]}")
    provider = state.config().provider(reference.provider)
    if not isinstance(provider, SupportsKeyManagement):
        raise UnsupportedOperation(
            f"the backend {provider.backend} does not manage keys", hint="use the service's tools"
        )
    return reference, provider


def _natural_form(reference: KeyRef, provider: KeyProvider[Any]) -> str:
    if isinstance(provider, SupportsKeyManagement):
        return "pem" if provider.describe_key(reference.key).purpose == "sign" else "recipient"
    return "recipient" if isinstance(provider, SupportsOfflineRecipients) else "pem"


def _plain(reference: str, info: KeyInfo) -> dict[str, Any]:
    return {"reference": reference, "newest": info.newest, **asdict(info)}


def _show(reference: KeyRef, info: KeyInfo, as_json: bool) -> None:
    name = f"{reference.provider}:{info.key}"
    if as_json:
        print_json(_plain(name, info))
        return
    out = console()
    out.print(f"{clean(name)}: {clean(info.kind)}, {info.purpose}s")
    for detail, value in info.detail.items():
        out.print(f"{clean(detail)}: {clean(value)}")
    rows = [(each.version, each.state, each.created or "-") for each in info.versions]
    out.print(table(["version", "state", "created"], rows))
