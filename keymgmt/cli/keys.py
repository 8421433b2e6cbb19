"""``keymgmt keys``: the keys of providers that can manage keys."""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import keymgmt
from keymgmt._remote.location import has_location
from keymgmt._system.words import counted
from keymgmt.cli._options import (
    Force,
    Json,
    Key,
    Provider,
    Shard,
    complete_key,
    complete_kind,
    option_pairs,
    place,
)
from keymgmt.cli._output import ask_to_type, fail, print_warning, write_result
from keymgmt.console import console, print_json, say, table
from keymgmt.errors import (
    ConfigError,
    KeymgmtError,
    KeyRetired,
    UntrustedPublisher,
)

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._providers.contract import KeyProvider, SupportsKeyManagement
    from keymgmt._providers.data import KeyInfo
    from keymgmt._providers.names import KeyRef
    from keymgmt._providers.recipient_file import Recipient
    from keymgmt._verbs.retire import Need

__all__ = ["app"]

Trees = Annotated[
    list[str] | None,
    typer.Option(
        "--tree",
        parser=place,
        metavar="TREE",
        help="Refuse while a sealed model at or below TREE opens with it; may be repeated.",
    ),
]
NamesOnly = Annotated[
    bool,
    typer.Option(
        "--names-only", help="Compare names only, and try no key: a key with two names is missed."
    ),
]

app = typer.Typer(help="Make, list, rotate, retire, delete and export keys.", no_args_is_help=True)


@app.command()
def create(
    context: typer.Context,
    key: Key,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Kind of the key, see `keymgmt backends`; else the provider's first kind that "
            "wraps.",
            autocompletion=complete_kind,
        ),
    ] = None,
    sign: Annotated[bool, typer.Option("--sign", help="Create a key that signs.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the backend; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key.

    Examples:
        keymgmt keys create local:resnet50
        keymgmt keys create local:release --sign
    """
    reference, provider = _managed(context, key)
    purpose = "sign" if sign else "wrap"
    if kind is None:
        kinds = [name for name, use in provider.key_kinds.items() if use == purpose]
        if not kinds:
            raise ConfigError(
                f"the keys of {reference.provider} do not {purpose}",
                hint="see what each backend can do with: keymgmt backends",
            )
        kind = kinds[0]
    elif sign and provider.key_kinds.get(kind, "sign") != "sign":
        raise ConfigError(f"a key of kind {kind!r} does not sign", hint="leave out --sign")
    _show(reference, provider.create_key(reference.key, kind, option_pairs(option or [])), as_json)


@app.command("list")
def list_keys(context: typer.Context, provider: Provider = None, as_json: Json = False) -> None:
    """List the keys of the providers; exit by the first that failed.

    Examples:
        keymgmt keys list
        keymgmt keys list local --json
    """
    from keymgmt._providers.contract import SupportsKeyManagement

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
            # A provider that fails does not hide the keys of the others.
            failed.append((name, error))
    if as_json:
        found_json: dict[str, object] = {
            "format": "keymgmt-keys/1",
            "keys": [_plain(reference, info) for reference, info in rows],
            "failed": [{"provider": name, "error": each.to_json()} for name, each in failed],
        }
        if failed:
            fail(failed[0][1], found_json)
        print_json(found_json)
    elif rows or not failed:
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
        say(f"{name}: {problem}", stderr=True)
    if failed:
        raise failed[0][1]


@app.command()
def show(context: typer.Context, key: Key, as_json: Json = False) -> None:
    """Show a key and its versions.

    Example:
        keymgmt keys show local:models
    """
    reference, provider = _managed(context, key)
    _show(reference, provider.describe_key(reference.key), as_json)


@app.command()
def rotate(context: typer.Context, key: Key, as_json: Json = False) -> None:
    """Add a version for new wraps or signatures; old versions still open what they opened.

    Example:
        keymgmt keys rotate local:models
    """
    from keymgmt._trust.policy import check_signer

    reference, provider = _managed(context, key)
    info = provider.rotate_key(reference.key)
    _show(reference, info, as_json)
    if info.purpose == "sign":
        # The key is rotated already, so a problem is only a warning here.
        try:
            check_signer(context.obj.config(), reference)
        except KeymgmtError as error:
            print_warning(error)


@app.command()
def export(
    context: typer.Context,
    key: Key,
    form: Annotated[
        Literal["pem", "recipient"] | None,
        typer.Option(
            "--format",
            help="The public key of a publisher (pem), or a recipient file that others seal to; "
            "else by the purpose of the key.",
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
    as_json: Json = False,
) -> None:
    """Write the public part of a key; of a publisher's key also an older version.

    Example:
        keymgmt keys export local:publisher -o publisher.pem
    """
    from keymgmt._config.calls import require
    from keymgmt._crypto.signatures import PublicKey
    from keymgmt._providers.contract import SupportsOfflineRecipients, SupportsSigning

    reference = _reference(key, version=True)
    config = context.obj.config()
    fingerprint: str | None = None
    signature: Path | None = None
    if form is None:
        form = _natural_form(reference, config.provider(reference.provider))
    if sign is not None and (form != "recipient" or output is None):
        raise ConfigError("--sign signs a recipient file: it needs --output")
    if form == "pem":
        signer = require(config, reference.provider, SupportsSigning, "does not sign")
        content = PublicKey(signer.public_key(reference.key, reference.version)).to_pem()
    elif reference.version is not None:
        raise ConfigError(
            f"others seal to the newest version of a key, and not to {reference}",
            hint=f"leave out the version: {reference.provider}:{reference.key}",
        )
    else:
        exporter = require(
            config,
            reference.provider,
            SupportsOfflineRecipients,
            "has no keys with a public part, to which others seal",
        )
        recipient = exporter.export_recipient(reference.key)
        content, fingerprint = recipient.to_bytes(), recipient.fingerprint
    if output is not None or not as_json:
        write_result(content, output, force=force)
    if sign is not None and output is not None:
        signature = _vouch(context, recipient, output, sign, force=force)
    if as_json:
        print_json(
            {
                "format": "keymgmt-export/1",
                "kind": form,
                "file": None if output is None else str(output),
                "content": content.decode() if output is None else None,
                "fingerprint": fingerprint,
                "signature": signature and str(signature),
            }
        )
    else:
        _tell_next(form, output, fingerprint)


def _tell_next(form: str, output: Path | None, fingerprint: str | None) -> None:
    if output is not None:
        say(f"wrote {output}", stderr=True)
        if form == "pem":
            step = f'where models are opened: publishers = {{ "{output}" = ["*"] }} under [policy]'
        else:
            step = f"where models are sealed: --to @{output}"
        say(f"next, {step}", stderr=True)
    if fingerprint is not None:
        # Whoever seals to the file compares this, sent by another channel, with the received file.
        say(f"fingerprint {fingerprint}", stderr=True)


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
    as_json: Json = False,
) -> None:
    """Sign another machine's recipient file, so that others seal to it without a fingerprint.

    They trust the signer by `recipient_signers` in the table policy of their config.

    Example:
        keymgmt keys vouch device7.recipient --sign local:publisher --fingerprint HEX
    """
    from keymgmt._providers.recipient_file import Recipient, plain_fingerprint

    recipient = Recipient.load(file)
    if plain_fingerprint(fingerprint) != plain_fingerprint(recipient.fingerprint):
        raise UntrustedPublisher(
            f"{file} has another fingerprint: {recipient.fingerprint}",
            hint="the file is not the one that the device wrote; fetch it again",
        )
    signature = _vouch(context, recipient, file, sign, force=force)
    if as_json:
        said = {
            "file": str(file),
            "fingerprint": recipient.fingerprint,
            "signature": str(signature),
        }
        print_json({"format": "keymgmt-vouch/1", **said})
    else:
        say(f"wrote {signature}", stderr=True)


def _vouch(
    context: typer.Context, recipient: Recipient, file: Path, sign: str, *, force: bool
) -> Path:
    from keymgmt._config.calls import require
    from keymgmt._providers.contract import SupportsSigning
    from keymgmt._providers.recipient_file import recipient_message, signatures_file

    reference = _reference(sign, version=False)
    signer = require(context.obj.config(), reference.provider, SupportsSigning, "does not sign")
    signature = signer.sign(reference.key, recipient_message(recipient))
    target = file.with_name(file.name + ".sig")
    write_result(signatures_file([signature]), target, force=force)
    return target


@app.command()
def retire(
    context: typer.Context,
    key: Annotated[
        str,
        typer.Argument(
            metavar="PROVIDER:KEY@VERSION", help="A version.", autocompletion=complete_key
        ),
    ],
    tree: Trees = None,
    names_only: NamesOnly = False,
    as_json: Json = False,
) -> None:
    """Stop a version from being used: a model that only it opens does not open any more.

    Example:
        keymgmt keys retire local:models@1 --tree /srv/models
    """
    reference, provider = _managed(context, key, version=True)
    need = None
    if tree:
        # A retired version cannot be tried, and retiring it again changes nothing.
        with contextlib.suppress(KeyRetired):
            need = _refuse_needed(context.obj.config(), reference, tree, names_only, as_json)
    elif names_only:
        raise ConfigError("--names-only needs a tree", hint="name a tree with --tree")
    info = provider.retire_version(reference.key, str(reference.version))
    _show(reference, info, as_json, **_looked_at(need))
    _tell_unneeded(need)


@app.command()
def delete(
    context: typer.Context,
    key: Key,
    tree: Trees = None,
    names_only: NamesOnly = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Do not check whether a model needs the key.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask for the name of the key.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete a key with all its versions: a model that only it opens never opens again.

    A key that wraps is deleted only if no version of it opens a model in the trees. On a terminal
    keymgmt asks for the name of the key. AWS KMS deletes after 30 days; until then it can be kept.

    Examples:
        keymgmt keys delete local:old --tree /srv/models
        keymgmt keys delete local:old --force --yes
    """
    from keymgmt._config.calls import require
    from keymgmt._providers.contract import SupportsKeyDeletion

    reference, provider = _managed(context, key)
    config = context.obj.config()
    deleter = require(config, reference.provider, SupportsKeyDeletion, "deletes no keys")
    if force and tree:
        raise ConfigError("--force and --tree exclude each other", hint="leave one of them out")
    if names_only and not tree:
        raise ConfigError("--names-only needs a tree", hint="name a tree with --tree")
    info = provider.describe_key(reference.key)
    need = None
    if not force:
        _refuse_named(config, reference)
        if tree:
            need = _refuse_needed(config, reference, tree, names_only, as_json)
        elif info.purpose == "wrap":
            raise ConfigError(
                f"it was not checked whether {reference} opens a model",
                hint="name the folders of sealed models: --tree TREE; or do not check: --force",
            )
    if not yes:
        ask_to_type(str(reference), f"what only {reference} opens never opens again")
    until = deleter.delete_key(reference.key)
    if as_json:
        said = {"format": "keymgmt-delete/1", "reference": str(reference), "until": until}
        print_json({**said, **_looked_at(need)})
    elif until is None:
        say(f"deleted {reference}")
    else:
        say(f"{reference} cannot be used any more, and is deleted at {until}")
    _tell_unneeded(need)


def _looked_at(need: Need | None) -> dict[str, Any]:
    return {"looked_at": need.to_json()} if need else {}


def _tell_unneeded(need: Need | None) -> None:
    if need:
        said = f"none of {counted(need.models, 'model')} looked at needs it"
        say(said if need.proved else f"{said}, by name", stderr=True)


def _refuse_named(config: Config, reference: KeyRef) -> None:
    """ConfigError if the table [seal] of the config names the key."""
    named = [*filter(None, [config.seal.sign]), *config.seal.to]
    if any(str(reference) == part.partition("@")[0] for each in named for part in each.split("+")):
        raise ConfigError(
            f"[seal] in the config names {reference}", hint="name another key there first"
        )


def _refuse_needed(
    config: Config, reference: KeyRef, trees: list[str], names_only: bool, as_json: bool
) -> Need:
    """The result of checking the trees; ConfigError if a model needs the key."""
    need = keymgmt.needs(str(reference), *trees, keys=config, names_only=names_only)
    for link in need.links:
        say(f"followed {link.path} to {link.target}", stderr=True)
    if need.verdict != "not_referenced":
        for path in need.opens:
            say(f"{path}: it opens with {reference}", stderr=True)
        _tell_failures(need.failures)
    try:
        need.check()
    except KeymgmtError as error:
        if as_json:
            fail(error, {"format": "keymgmt-retire/1", **need.to_json()})
        raise
    return need


@app.command()
def usage(
    context: typer.Context,
    tree: Annotated[
        str,
        typer.Argument(
            metavar="TREE", help="A folder of sealed models, or s3://BUCKET/PATH.", parser=place
        ),
    ],
    key: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROVIDER:KEY]...",
            help="Keys of the config, to see which of their versions no model names.",
            autocompletion=complete_key,
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--tree", metavar="TREE", help="Another one; may be repeated.", parser=place),
    ] = None,
    prove: Annotated[
        bool,
        typer.Option(
            "--prove", help="Ask the providers which of them holds a key that only a name tells."
        ),
    ] = False,
    shard: Shard = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV on stdout.")] = False,
    as_json: Json = False,
) -> None:
    """Show which key versions the sealed models of a tree need. The result is not authenticated.

    Example:
        keymgmt keys usage /srv/models local:models
    """
    trees = [tree, *(more or ())]
    config = context.obj.config() if prove or key or has_location(trees) else None
    result = keymgmt.usage(*trees, prove=config if prove else None, keys=config, shard=shard)
    if result.failures and not result.models and not (as_json or as_csv):
        _tell_failures(result.failures[1:])
        raise result.failures[0].error
    named = {(use.backend, use.key, use.version) for use in result.keys}
    missing: list[tuple[str, str, str]] = []
    for text in key or []:
        reference, provider = _managed(context, text)
        backend = context.obj.config().backend_of(reference.provider)
        for version in provider.describe_key(reference.key).versions:
            identity = (backend, reference.key, version.version)
            if identity not in named:
                missing.append(identity)
    # After a failure it is not known whether a version is named.
    verdict = "unknown" if result.failures else "not_referenced"
    columns = ("backend", "key", "version", "known_by", "identity", "opens", "only_way_into")
    if as_json:
        unnamed = [dict(zip(columns[:3], identity, strict=True)) for identity in missing]
        print_json({**result.to_json(), verdict: unnamed})
    elif as_csv:
        number = "unknown" if result.failures else 0
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        for use in result.keys:
            counts = use.opens, len(use.only_way_into)
            writer.writerow(
                (use.backend, use.key, use.version, use.known_by, use.identity, *counts)
            )
        writer.writerows((*identity, "name", "", number, number) for identity in missing)
    else:
        rows = []
        for use in result.keys:
            known_by = f"{use.known_by} {use.identity[:16]}".strip()
            opens = f"opens {counted(use.opens, 'model')}"
            way = f"{opens}, is the only way into {len(use.only_way_into)}"
            rows.append((use.backend, use.key, use.version, known_by, way))
        here = "tree" if shard is None else f"part ({shard}) of it"
        text = "unknown: not all could be read" if result.failures else f"not named in this {here}"
        rows += [(*identity, "name", text) for identity in missing]
        console().print(table(["backend", "key", "version", "known by", "in this tree"], rows))
        models = counted(result.models, "model")
        say(f"{models}, unauthenticated: whoever can write here can hide a model")
        for link in result.links:
            say(f"followed {link.path} to {link.target}")
    _tell_failures(result.failures)
    if result.failures:
        raise typer.Exit(result.failures[0].error.exit_code)


def _tell_failures(failures: Sequence[keymgmt.Failure]) -> None:
    for failure in failures:
        say(f"{failure.path}: {failure.error}", stderr=True)


def _reference(text: str, *, version: bool) -> KeyRef:
    """Read ``PROVIDER:KEY``; ConfigError where it has a version and none is allowed."""
    from keymgmt._providers.names import KeyRef

    reference = KeyRef.parse(text)
    if reference.version is not None and not version:
        raise ConfigError(f"not a key: {text}", hint=f"leave out the version: {text.split('@')[0]}")
    return reference


def _managed(
    context: typer.Context, text: str, *, version: bool = False
) -> tuple[KeyRef, SupportsKeyManagement]:
    """A key, or one version of it, and its provider, which manages keys."""
    from keymgmt._config.calls import require
    from keymgmt._providers.contract import SupportsKeyManagement

    reference = _reference(text, version=version)
    if version and reference.version is None:
        raise ConfigError(f"which version of {text}?", hint=f"write {text}@VERSION")
    config = context.obj.config()
    provider = require(config, reference.provider, SupportsKeyManagement, "does not manage keys")
    return reference, provider


def _natural_form(reference: KeyRef, provider: KeyProvider[Any]) -> Literal["pem", "recipient"]:
    from keymgmt._providers.contract import SupportsKeyManagement, SupportsOfflineRecipients

    if isinstance(provider, SupportsKeyManagement):
        return "pem" if provider.describe_key(reference.key).purpose == "sign" else "recipient"
    return "recipient" if isinstance(provider, SupportsOfflineRecipients) else "pem"


def _plain(reference: str, info: KeyInfo) -> dict[str, Any]:
    return {"reference": reference, "newest": info.newest, **asdict(info)}


def _show(reference: KeyRef, info: KeyInfo, as_json: bool, **more: object) -> None:
    name = f"{reference.provider}:{info.key}"
    if as_json:
        print_json({"format": "keymgmt-key/1", **_plain(name, info), **more})
        return
    say(f"{name}: {info.kind}, {info.purpose}s")
    for detail, value in info.detail.items():
        say(f"{detail}: {value}")
    rows = [(each.version, each.state, each.created or "-") for each in info.versions]
    console().print(table(["version", "state", "created"], rows))
