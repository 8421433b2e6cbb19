"""``keymgmt tpm enroll``: an attested recipient file in four steps, two of them on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from keymgmt.backend import (
    ConfigError,
    Recipient,
    SupportsSigning,
    private_file_problem,
    recipient_message,
    replace_file,
    sign_recipient,
)
from keymgmt_tpm2 import _enroll

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Prove that a key is in a genuine TPM, and vouch for it."
)
MAX_FILE: Final = 1 << 20

Key = Annotated[str, typer.Argument(metavar="PROVIDER:KEY", help="A key of this device's TPM.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="What to write.")]
Authorities = Annotated[
    list[Path],
    typer.Option(
        "--ca",
        metavar="PEM",
        help="Certificates of TPM makers that are trusted, and those in between; may come again.",
    ),
]


@app.command()
def request(context: typer.Context, key: Key, output: Output) -> None:
    """On the device: state who its TPM is and what the key is."""
    from keymgmt_tpm2._identity import make_request

    provider, name = _key(context, key)
    _write(output, make_request(provider, name).to_bytes())
    typer.echo(f"wrote {output}: take it to whoever vouches for devices")


@app.command()
def challenge(
    file: Annotated[Path, typer.Argument(metavar="REQUEST", help="The device's request.")],
    output: Output,
    state: Annotated[Path, typer.Option(metavar="FILE", help="Private file for `accept`.")],
    ca: Authorities,
) -> None:
    """Where devices are vouched for: check the request and make a challenge for that TPM alone."""
    asked = _enroll.Request.from_bytes(_read(file))
    sent, kept = _enroll.challenge(asked, *_authorities(ca))
    _write(state, kept, mode=0o600)
    _write(output, sent)
    typer.echo(f"{asked.recipient}: policy {asked.policy}")
    typer.echo(f"wrote {output} for the device; {state} is secret, keep it for `accept`")


@app.command()
def respond(
    context: typer.Context,
    key: Key,
    file: Annotated[Path, typer.Argument(metavar="CHALLENGE", help="The challenge.")],
    output: Output,
) -> None:
    """On the device: let the TPM answer the challenge."""
    from keymgmt_tpm2._identity import respond as answer

    provider, name = _key(context, key)
    _write(output, answer(provider, name, _read(file)))
    typer.echo(f"wrote {output}: take it back to whoever vouches for devices")


@app.command()
def accept(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="RESPONSE", help="The device's response.")],
    output: Output,
    state: Annotated[Path, typer.Option(metavar="FILE", help="What `challenge` kept.")],
    ca: Authorities,
    sign: Annotated[
        str | None,
        typer.Option(metavar="PROVIDER:KEY", help="Vouch for it: sign into FILE.sig."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="The policy that the key must have, in the words of `challenge`."),
    ] = None,
) -> None:
    """Where devices are vouched for: check the response and write the attested recipient file."""
    problem = private_file_problem(state.stat()) if state.is_file() else "it is no file"
    if problem:
        raise ConfigError(f"the state {state} is refused: {problem}")
    recipient = _enroll.accept(_read(state), _read(file), *_authorities(ca))
    found = recipient.attributes["policy"]
    if policy is not None and policy != found:
        raise ConfigError(f"the key has the policy {found!r}, not {policy!r}")
    _write(output, recipient.to_bytes())
    if sign is not None:
        _vouch(context, sign, recipient, output.with_name(output.name + ".sig"))
    # It was for one answer.
    state.unlink()
    typer.echo(f"{recipient} is in a TPM certified by {recipient.attributes['ek_issuer']}")
    typer.echo(f"policy {found}")
    typer.echo(f"fingerprint {recipient.fingerprint}")


def _vouch(context: typer.Context, sign: str, recipient: Recipient, path: Path) -> None:
    name, _, key = sign.partition(":")
    provider: Any = context.obj.config().provider(name)
    if not isinstance(provider, SupportsSigning):
        raise ConfigError(f"the provider {name!r} does not sign")
    signature = provider.sign(key, recipient_message(recipient))
    _write(path, sign_recipient([signature]))


def _key(context: typer.Context, text: str) -> tuple[Any, str]:
    from keymgmt_tpm2._commands import find_provider

    name, colon, key = text.partition(":")
    if not colon:
        raise ConfigError(f"not a key reference: {text[:80]!r}", hint="write PROVIDER:KEY")
    return find_provider(context, name), key


def _authorities(files: list[Path]) -> tuple[list[bytes], list[bytes]]:
    """DER certificates of the files: self-issued ones are roots, the others are in between."""
    roots: list[bytes] = []
    between: list[bytes] = []
    for file in files:
        try:
            certificates = x509.load_pem_x509_certificates(_read(file))
        except ValueError as error:
            raise ConfigError(f"{file} has no PEM certificates") from error
        for certificate in certificates:
            where = roots if certificate.issuer == certificate.subject else between
            where.append(certificate.public_bytes(Encoding.DER))
    if not roots:
        raise ConfigError(
            "no root certificate among the files of --ca",
            hint="the maker of the TPM publishes it; add it with one more --ca",
        )
    return roots, between


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > MAX_FILE:
        raise ConfigError(f"{path} is larger than {MAX_FILE} bytes")
    return content


def _write(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    try:
        replace_file(path, content, mode=mode, exclusive=True)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists", hint="name another file") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
