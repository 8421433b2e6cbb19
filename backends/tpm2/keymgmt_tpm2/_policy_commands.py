"""``keymgmt tpm policy``: who approves boot states, which, and where they are put."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from keymgmt.backend import ConfigError, SupportsSigning, private_file_problem, replace_file
from keymgmt_tpm2 import _approval
from keymgmt_tpm2._approval import Approval
from keymgmt_tpm2._counter import parse_index
from keymgmt_tpm2._eventlog import read_event_log
from keymgmt_tpm2._policy import Approver, Counter, PcrState, compare, parse_pcrs

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Approve the boot states in which keys with an approver open."
)
MAX_FILE = 1 << 20


@app.command()
def approver(
    file: Annotated[Path, typer.Argument(help="Private key to make; FILE.pub is its public key.")],
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Ask for a passphrase to encrypt it with.")
    ] = False,
) -> None:
    """Make an approver's key in a file. A key of an HSM or TPM does as well, and is better."""
    key = ec.generate_private_key(ec.SECP256R1())
    encryption: BestAvailableEncryption | NoEncryption = NoEncryption()
    if passphrase:
        asked = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True)
        encryption = BestAvailableEncryption(asked.encode())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    beside = file.with_name(file.name + ".pub")
    _write(file, private, mode=0o600)
    _write(beside, public, mode=0o644)
    typer.echo(f"{file} signs approvals: keep it off the devices")
    typer.echo(f"{beside} is for them: keymgmt keys create P:KEY --option approver={beside}")


@app.command()
def sign(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(help="Approval file to write.")],
    key: Annotated[
        str, typer.Option(metavar="FILE|PROVIDER:KEY", help="The approver's ECDSA P-256 key.")
    ],
    pcr: Annotated[str, typer.Option(help="[BANK:]LIST, such as 0,2,7.")],
    values: Annotated[
        Path | None, typer.Option(help="PCR values as `keymgmt tpm pcrs --json` prints them.")
    ] = None,
    event_log: Annotated[
        Path | None, typer.Option(help="Event log of a machine in that boot state.")
    ] = None,
    counter: Annotated[
        str | None,
        typer.Option(metavar="INDEX=VALUE", help="Holds while this NV counter is at most VALUE."),
    ] = None,
    fleet: Annotated[
        bool,
        typer.Option("--fleet", help="The index is an ordinary one, of equal value everywhere."),
    ] = False,
    ref: Annotated[str, typer.Option(help="The ref that the keys were made with.")] = "",
) -> None:
    """Approve a boot state, offline: the next one, before the update."""
    state = _state(pcr, values, event_log)
    limit = _counter(counter, ordinary=fleet) if counter else None
    public, sign_message = _signer(context, key)
    _refuse_publisher(context, key, public)
    try:
        who = Approver(public, ref)
    except ValueError as error:
        raise ConfigError(f"{key} cannot approve: {error}") from error
    message = Approval.message(state, limit, who)
    approval = Approval(state, limit, who, sign_message(message))
    approval.check()
    _write(output, approval.to_bytes(), mode=0o644)
    typer.echo(f"approved {approval}")
    for index in state.indices:
        typer.echo(f"  {state.bank}:{index:<2} {state.values[index].hex()}")


@app.command()
def install(
    context: typer.Context,
    provider: Annotated[str, typer.Argument(metavar="PROVIDER")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Approval files.")],
) -> None:
    """Put approvals on this device; the TPM checks them when a key is used."""
    from keymgmt_tpm2._commands import find_provider

    found = find_provider(context, provider)
    approvals = [Approval.from_json(_read_json(file), str(file)) for file in files]
    for approval in approvals:
        approval.check()
    for approval in approvals:
        _approval.install(found.key_directory, approval)
        typer.echo(f"installed the approval of {approval}")


@app.command("list")
def list_approvals(
    context: typer.Context, provider: Annotated[str, typer.Argument(metavar="PROVIDER")]
) -> None:
    """Show the installed approvals and which of them fit the present PCRs."""
    from keymgmt_tpm2._commands import find_provider

    found = find_provider(context, provider)
    for approval in _approval.installed(found.key_directory):
        wanted = approval.pcrs
        now = found.pcrs(wanted.bank, wanted.indices)
        typer.echo(f"{approval}: {compare(wanted, now) or 'fits the present PCRs'}")


def _state(pcr: str, values: Path | None, event_log: Path | None) -> PcrState:
    try:
        bank, indices = parse_pcrs(pcr)
    except ValueError as error:
        raise ConfigError(f"--pcr: {error}") from error
    if (values is None) == (event_log is None):
        raise ConfigError("name one source of the PCR values: --values or --event-log")
    if event_log is not None:
        return read_event_log(event_log, bank, indices)
    assert values is not None  # noqa: S101 - one of the two is there
    try:
        given = PcrState.from_json(_read_json(values))
        if given.bank != bank or not set(indices) <= set(given.values):
            raise ValueError(f"it does not have all of {bank}:{pcr.rpartition(':')[2]}")  # noqa: TRY301
    except ValueError as error:
        raise ConfigError(f"{values}: {error}") from error
    return PcrState(bank, {index: given.values[index] for index in indices})


def _counter(text: str, *, ordinary: bool) -> Counter:
    index, equals, value = text.partition("=")
    if not equals or not value.isdecimal():
        raise ConfigError(f"--counter {text[:40]!r}: write INDEX=VALUE, such as 0x01800100=7")
    return Counter(parse_index(index), int(value), ordinary)


def _signer(context: typer.Context, key: str) -> tuple[bytes, Callable[[bytes], bytes]]:
    """DER public key and a function that signs, of a PEM file or a provider's key."""
    path = Path(key)
    if ":" in key and not path.exists():
        name, _, which = key.partition(":")
        provider: Any = context.obj.config().provider(name)
        if not isinstance(provider, SupportsSigning):
            raise ConfigError(f"the provider {name!r} does not sign")
        return provider.public_key(which), lambda message: provider.sign(which, message).signature
    private = _load_private(path)
    public = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return public, lambda message: private.sign(message, ec.ECDSA(hashes.SHA256()))


def _refuse_publisher(context: typer.Context, key: str, public: bytes) -> None:
    """Who publishes models does not also decide which boot states open them."""
    try:
        config = context.obj.config()
    except ConfigError:
        return  # an approver's machine need not have one
    for name in config.policy.publishers:
        if config.public_key(name) == public:
            raise ConfigError(
                f"{key} is a publisher's key ({name})",
                hint="approve with a key of its own: keymgmt tpm policy approver FILE",
            )


def _load_private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            info = os.fstat(file.fileno())
            problem = private_file_problem(info) if stat.S_ISREG(info.st_mode) else "no file"
            if problem:
                raise ConfigError(f"the key {path} is refused: {problem}", hint=f"chmod 600 {path}")
            content = file.read(MAX_FILE)
    except OSError as error:
        raise ConfigError(f"cannot read the key {path}: {error.strerror}") from error
    try:
        try:
            key = load_pem_private_key(content, None)
        except TypeError:
            asked = typer.prompt("Passphrase", hide_input=True, err=True)
            key = load_pem_private_key(content, asked.encode())
    except ValueError as error:
        raise ConfigError(f"{path} is no private key, or the passphrase is wrong") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no ECDSA P-256 key", hint="keymgmt tpm policy approver FILE")
    return key


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(MAX_FILE))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is no JSON object")
    return data


def _write(path: Path, content: bytes, *, mode: int) -> None:
    try:
        replace_file(path, content, mode=mode, exclusive=True)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists", hint="name another file") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
