"""``keymgmt tpm policy``: who approves boot states, which, and where they are put."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from keymgmt.backend import (
    ConfigError,
    KeyNotFound,
    save_file,
)
from keymgmt.console import console, print_json
from keymgmt_tpm2._arguments import Json, Provider, find_provider
from keymgmt_tpm2.policy import _approval
from keymgmt_tpm2.policy._approval import Approval, approval_files
from keymgmt_tpm2.policy._index import parse_index
from keymgmt_tpm2.policy._policy import Approver, Counter, weakness
from keymgmt_tpm2.policy._signing import ApproverKey, Ref, find_approver
from keymgmt_tpm2.policy._stated import read_json_file, stated_values

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Approve the boot states in which keys with an approver open."
)
FORMAT: Final = "keymgmt-tpm-policy/1"
_SHOWN: Final = 16


@app.command()
def approver(
    file: Annotated[Path, typer.Argument(help="Private key to make; FILE.pub is its public key.")],
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Ask for a passphrase to encrypt it with.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make an approver's key in a file. A key of an HSM or TPM does as well, and is better.

    Example:
        keymgmt tpm policy approver approver.key
    """
    key = ec.generate_private_key(ec.SECP256R1())
    encryption: BestAvailableEncryption | NoEncryption = NoEncryption()
    if passphrase:
        asked = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True)
        encryption = BestAvailableEncryption(asked.encode())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    beside = file.with_name(file.name + ".pub")
    save_file(file, private, mode=0o600)
    try:
        save_file(beside, public)
    except BaseException:
        file.unlink()
        raise
    if as_json:
        spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        fingerprint = Approver(spki).fingerprint
        paths = {"path": str(file), "public_key": str(beside)}
        print_json({"format": FORMAT, **paths, "approver": fingerprint})
        return
    console().print(f"{file} signs approvals: keep it off the devices")
    console().print(f"{beside} is for them: keymgmt keys create P:KEY --option approver={beside}")


@app.command()
def sign(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(help="Approval file to write.")],
    key: ApproverKey,
    pcr: Annotated[str, typer.Option(help="[BANK:]LIST, such as 0,2,7.")],
    values: Annotated[
        Path | None,
        typer.Option(help="PCR values as `keymgmt tpm pcrs PROVIDER --json` prints them."),
    ] = None,
    event_log: Annotated[
        Path | None, typer.Option(help="Event log of a machine in that boot state.")
    ] = None,
    counter: Annotated[
        str | None,
        typer.Option(metavar="INDEX=VALUE", help="Holds while this NV counter is at most VALUE."),
    ] = None,
    ref: Ref = "",
    as_json: Json = False,
) -> None:
    """Approve a boot state, offline: the next one, before the update.

    Example:
        keymgmt tpm policy sign --key approver.key --pcr 0,2,7 --values now.json now.approval
    """
    state = stated_values(pcr, values, event_log)
    limit = _counter(counter) if counter else None
    who, sign_message = find_approver(context, key, ref)
    message = Approval.message(state, limit, who)
    approval = Approval(state, limit, who, sign_message(message))
    approval.check()
    save_file(output, approval.to_bytes())
    if weak := weakness(state):
        console(stderr=True).print(f"warning: {weak}")
    if as_json:
        print_json({"format": FORMAT, "path": str(output), **_stated(approval), "warning": weak})
        return
    console().print(f"approved {approval}")
    for index in state.indices:
        console().print(f"  {state.bank}:{index:<2} {state.values[index].hex()}")


@app.command()
def install(
    context: typer.Context,
    provider: Provider,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Approval files.")],
    as_json: Json = False,
) -> None:
    """Put approvals on this device; the TPM checks them when a key is used.

    Example:
        keymgmt tpm policy install tpm now.approval
    """
    device = find_provider(context, provider)
    approvals = [read_json_file(file, "approval", Approval.read) for file in files]
    for approval in approvals:
        approval.check()
    for approval in approvals:
        _approval.install(device.keys.path, approval)
        if not as_json:
            console().print(f"installed the approval of {approval}")
    if as_json:
        print_json({"format": FORMAT, "installed": list(map(_stated, approvals))})


@app.command()
def remove(
    context: typer.Context,
    provider: Provider,
    approvals: Annotated[
        list[str],
        typer.Argument(metavar="FILE|ID...", help="Approval files, or ids as `list` prints them."),
    ],
    as_json: Json = False,
) -> None:
    """Take approvals off this device. One that is installed again, from anywhere, holds again.

    What outdates an approval for good is a counter.

    Example:
        keymgmt tpm policy remove tpm now.approval
    """
    directory = find_provider(context, provider).keys.path
    here = {path.stem: path for path in approval_files(directory)}
    chosen = []
    for text in approvals:
        known = text
        if Path(text).is_file():
            known = read_json_file(Path(text), "approval", Approval.read).id
        # A beginning of it will do, if it is not too short and of one only.
        fitting = [name for name in here if len(known) >= _SHOWN and name.startswith(known)]
        if len(fitting) != 1:
            raise ConfigError(
                f"{text[:80]!r} is no approval that is installed here",
                hint="the ids are those that `policy list` prints, 16 digits of them or more",
            )
        chosen += fitting
    for name in dict.fromkeys(chosen):
        here[name].unlink(missing_ok=True)
        if not as_json:
            console().print(f"removed {name[:_SHOWN]}")
    if as_json:
        print_json({"format": FORMAT, "removed": list(dict.fromkeys(chosen))})


@app.command("list")
def list_approvals(context: typer.Context, provider: Provider, as_json: Json = False) -> None:
    """Show the installed approvals and which of them fit the present PCRs.

    Example:
        keymgmt tpm policy list tpm
    """
    device = find_provider(context, provider)
    rows = []
    for approval in _approval.installed(device.keys.path):
        try:
            now = device.pcrs(approval.bank, approval.indices)
        except KeyNotFound:  # a bank that this TPM has not
            now = None
        rows.append((approval, approval.difference(now)))
    readable = {approval.id for approval, _ in rows}
    here = [path.stem for path in approval_files(device.keys.path)]
    damaged = [name for name in here if name not in readable]
    if as_json:
        listed = [
            _stated(each) | {"fits": not differs, "differs": differs} for each, differs in rows
        ]
        print_json({"format": FORMAT, "approvals": listed, "damaged": damaged})
        return
    for approval, differs in rows:
        fits = differs or "fits the present PCRs"
        console().print(f"{approval.id[:_SHOWN]} {approval}: {fits}", soft_wrap=True)
    for name in damaged:
        console().print(f"{name[:_SHOWN]} cannot be read", soft_wrap=True)


def _stated(approval: Approval) -> dict[str, object]:
    return {
        "id": approval.id,
        "state": approval.pcrs.to_json(),
        "counter": approval.counter.to_json() if approval.counter else None,
        "approver": approval.approver.fingerprint,
        "ref": approval.approver.ref,
    }


def _counter(text: str) -> Counter:
    index, equals, value = text.partition("=")
    if not equals or not value.isdecimal():
        raise ConfigError(f"--counter {text[:40]!r}: write INDEX=VALUE, such as 0x01800100=7")
    try:
        return Counter(parse_index(index), int(value))
    except ValueError as error:
        raise ConfigError(f"--counter {text[:40]!r}: {error}") from error
