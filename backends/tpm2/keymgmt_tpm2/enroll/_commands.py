"""``keymgmt tpm enroll``: an attested recipient file in four steps, two of them on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final

import typer

from keymgmt.backend import ConfigError, IntegrityError, Recipient, save_file
from keymgmt.console import clean, console, print_json, print_line
from keymgmt_tpm2._arguments import Json, find_key, find_signer
from keymgmt_tpm2.enroll import _batch
from keymgmt_tpm2.enroll._certificates import Makers, split_file
from keymgmt_tpm2.enroll._exchange import Request
from keymgmt_tpm2.enroll._office import Decision, Device, ek_id, parse_ek, read_inventory
from keymgmt_tpm2.policy._policy import Approver, PcrState
from keymgmt_tpm2.policy._stated import read_approver, read_values, stated_values

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Prove that a key is in a genuine TPM, and vouch for it."
)
FORMAT: Final = "keymgmt-tpm-enroll/1"

Key = Annotated[str, typer.Argument(metavar="PROVIDER:KEY", help="A key of this device's TPM.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="What to write.")]
MakerFiles = Annotated[
    list[Path],
    typer.Option(
        "--ca",
        metavar="FILE",
        help="Certificates of TPM makers that are trusted, roots or intermediates; may come again.",
    ),
]
Intermediates = Annotated[
    list[Path] | None,
    typer.Option(
        "--intermediate",
        metavar="FILE",
        help="Certificates between a maker's and the TPM's, trusted for nothing; may come again.",
    ),
]
Sha1 = Annotated[
    bool,
    typer.Option(
        "--allow-sha1",
        help="Accept SHA-1 signatures in the chain: who can forge one forges devices.",
    ),
]


OfficeOutput = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="What to write, for one file.")
]
State = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Private file from `challenge` to `accept`, for one file."),
]
EkCertificate = Annotated[
    Path | None,
    typer.Option(
        "--ek-certificate",
        metavar="FILE",
        help="Certificate of the endorsement key, where the maker publishes it (PEM or DER).",
    ),
]


@app.command()
def request(
    context: typer.Context,
    key: Key,
    output: Output,
    ek_certificate: EkCertificate = None,
    as_json: Json = False,
) -> None:
    """On the device: state who its TPM is and what the key is.

    Example:
        keymgmt tpm enroll request tpm:dev -o request
    """
    from keymgmt_tpm2.enroll._device import make_request

    provider, name = find_key(context, key)
    asked = make_request(provider, name, _ek_certificate(ek_certificate))
    save_file(output, asked.to_bytes())
    if as_json:
        print_json({"format": FORMAT, "path": str(output), **_stated(asked)})
        return
    out = console()
    out.print(f"endorsement key {ek_id(asked.ek)}")
    out.print(f"wrote {output}: take it to whoever vouches for devices")


@app.command()
def challenge(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="REQUEST|FOLDER", help="The device's request, or a folder of NAME.request."
        ),
    ],
    ca: MakerFiles,
    output: OfficeOutput = None,
    state: State = None,
    intermediate: Intermediates = None,
    allow_sha1: Sha1 = False,
    as_json: Json = False,
) -> None:
    """Where devices are vouched for: check the request and make a challenge for that TPM alone.

    In a folder, NAME.challenge and NAME.state are written beside each NAME.request.

    Example:
        keymgmt tpm enroll challenge devices --ca maker.pem
    """
    makers = _makers(ca, intermediate, allow_sha1=allow_sha1)
    written = _written(file, output, state)
    if written is None:
        _tell_all(_batch.challenge_all(file, makers), "challenged", as_json=as_json)
        return
    asked = _batch.challenge_one(file, *written, makers)
    if as_json:
        print_json({"format": FORMAT, "path": str(output), "state": str(state), **_stated(asked)})
        return
    out = console()
    out.print(f"the device sent its key {asked.recipient.key}@{asked.recipient.version}")
    out.print(f"endorsement key {ek_id(asked.ek)}")
    for line in asked.policy.lines():
        out.print(f"policy: {clean(line)}")
    out.print(f"wrote {output} for the device; {state} is secret, keep it for `accept`")


@app.command()
def respond(
    context: typer.Context,
    key: Key,
    file: Annotated[Path, typer.Argument(metavar="CHALLENGE", help="The challenge.")],
    output: Output,
    ek_certificate: EkCertificate = None,
    as_json: Json = False,
) -> None:
    """On the device: let the TPM answer the challenge.

    Example:
        keymgmt tpm enroll respond tpm:dev challenge -o response
    """
    from keymgmt_tpm2.enroll._device import respond as answer

    provider, name = find_key(context, key)
    content = answer(provider, name, _batch.read_any(file), _ek_certificate(ek_certificate))
    save_file(output, content)
    if as_json:
        print_json({"format": FORMAT, "path": str(output), "key": name})
        return
    console().print(f"wrote {output}: take it back to whoever vouches for devices")


@app.command()
def accept(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="RESPONSE|FOLDER", help="The device's response, or a folder of NAME.response."
        ),
    ],
    ca: MakerFiles,
    output: OfficeOutput = None,
    state: State = None,
    intermediate: Intermediates = None,
    allow_sha1: Sha1 = False,
    key: Annotated[
        str | None,
        typer.Option(metavar="NAME[@VERSION]", help="The key that is enrolled; else version 1."),
    ] = None,
    ek: Annotated[
        str | None,
        typer.Option(metavar="SHA256", help="The endorsement key of the device that is meant."),
    ] = None,
    inventory: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Devices that are enrolled: ek, key, name, site, serial."),
    ] = None,
    any_device: Annotated[
        bool, typer.Option("--any-device", help="Any TPM of these makers will do.")
    ] = False,
    pcr: Annotated[
        str | None, typer.Option(help="[BANK:]LIST of the PCRs that the key is bound to.")
    ] = None,
    pcr_values: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Their values, as `keymgmt tpm pcrs PROVIDER --json` prints."
        ),
    ] = None,
    event_log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Their values, by an event log.")
    ] = None,
    approver: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Who approves the key's boot states.")
    ] = None,
    ref: Annotated[str, typer.Option(help="The ref that the approver's approvals carry.")] = "",
    any_policy: Annotated[
        bool, typer.Option("--any-policy", help="Any policy will do, none too.")
    ] = False,
    sign: Annotated[
        str | None,
        typer.Option(metavar="PROVIDER:KEY", help="Vouch for it: sign into FILE.sig."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Where devices are vouched for: check the response and write the attested recipient file.

    In a folder, NAME.recipient is written for each NAME.response, by the NAME.state beside it. One
    that is refused is named and does not stop the others, and a run that was interrupted goes on.

    Example:
        keymgmt tpm enroll accept devices --ca maker.pem --key dev --sign local:enrolment
    """
    makers = _makers(ca, intermediate, allow_sha1=allow_sha1)
    attester = None if sign is None else _batch.Attester(*find_signer(context, sign))

    def decide(request: Request | None = None) -> Decision:
        files = pcr_values, event_log, approver
        policy = _policy(request, pcr, *files, ref, any_policy=any_policy)
        return Decision(policy, _devices(request, ek, inventory, any_device=any_device), key)

    written = _written(file, output, state)
    if written is None:
        done = _batch.accept_all(file, makers, decide(), attester)
        _tell_all(done, "accepted", as_json=as_json)
        return
    request, recipient = _batch.accept_one(file, *written, makers, decide, attester)
    if as_json:
        print_json({"format": FORMAT, "path": str(output), **_stated(request, recipient)})
        return
    out, stated = console(), recipient.attributes
    out.print(f"{recipient} is in a TPM certified by {clean(stated['ek_issuer'])}")
    out.print(f"maker {stated['maker']}")
    out.print(f"endorsement key {stated['ek']}")
    for line in request.policy.lines():
        out.print(f"policy: {clean(line)}")
    out.print(f"policy digest {stated['policy_digest'] or 'none'}")
    out.print(f"fingerprint {recipient.fingerprint}")


def _stated(request: Request, recipient: Recipient | None = None) -> dict[str, object]:
    """What is known of a device: by itself, and once it is enrolled what is signed."""
    shown = recipient or request.recipient
    stated: dict[str, object] = {
        "key": shown.key,
        "version": shown.version,
        "ek": ek_id(request.ek),
        "policy": request.policy.lines(),
        "policy_digest": request.key.policy.hex(),
    }
    if recipient is not None:
        stated |= {"fingerprint": recipient.fingerprint, "attributes": dict(recipient.attributes)}
    return stated


def _tell_all(outcomes: Iterable[_batch.Outcome], word: str, *, as_json: bool) -> None:
    """Print what became of each file, and a summary; exit 4 where one was refused."""
    counts = {word: 0, "before": 0, "failed": 0}
    if word == "accepted":
        counts["waiting"] = 0
    for each in outcomes:
        line: dict[str, object] = {"format": FORMAT, "path": str(each.path)}
        if each.error is not None:
            state, error = "failed", each.error
            line["error"] = error.to_json()
            console(stderr=True).print(f"{clean(each.path)}: {clean(error)}", soft_wrap=True)
        elif each.waiting:
            state = "waiting"
        elif each.done is None:
            state = "before"
        else:
            state = word
            line |= _stated(*each.done)
        counts[state] += 1
        if as_json:
            print_line({**line, "state": state})
        elif state == word:
            ek = f", endorsement key {line['ek']}" if word == "challenged" else ""
            console().print(f"{clean(each.path)}: {word}{ek}", soft_wrap=True)
    code = IntegrityError.exit_code if counts["failed"] else 0
    if as_json:
        print_line({"format": FORMAT, **counts, "exit_code": code})
    else:
        names = {"before": "done before", "failed": "refused", "waiting": "not answered yet"}
        console().print(", ".join(f"{names.get(key, key)} {n}" for key, n in counts.items()))
    if code:
        raise typer.Exit(code)


def _written(file: Path, output: Path | None, state: Path | None) -> tuple[Path, Path] | None:
    """Output and state for one file; None for a folder, in which every file has them."""
    if file.is_dir():
        if output is not None or state is not None:
            raise ConfigError("in a folder the files of a device are named after its request")
        return None
    if output is None or state is None:
        raise ConfigError("one file takes --output FILE and --state FILE")
    return output, state


def _policy(
    request: Request | None,
    pcr: str | None,
    pcr_values: Path | None,
    event_log: Path | None,
    approver: Path | None,
    ref: str,
    *,
    any_policy: bool,
) -> PcrState | Approver | None:
    """What the office wants; the question names what the one request has, where there is one."""
    stated = pcr_values is not None or event_log is not None
    if stated + (approver is not None) + any_policy != 1:
        has = f" It has: {'; '.join(request.policy.lines())}" if request else ""
        raise ConfigError(
            f"which policy must the key have?{has}",
            hint="one of --pcr-values FILE, --event-log FILE (with --pcr), --approver PEM or "
            "--any-policy",
        )
    if approver is not None:
        return read_approver(approver, ref)
    if pcr is None and pcr_values is not None:
        return read_values(pcr_values)
    return stated_values(pcr or "", pcr_values, event_log) if stated else None


def _devices(
    request: Request | None, ek: str | None, inventory: Path | None, *, any_device: bool
) -> Mapping[str, Device] | None:
    """Whom the office wants; the question names whose the one request is, where there is one."""
    if (ek is not None) + (inventory is not None) + any_device != 1:
        shown = f" Its endorsement key is {ek_id(request.ek)}" if request else ""
        raise ConfigError(
            f"whose TPM is it?{shown}", hint="one of --ek SHA256, --inventory CSV or --any-device"
        )
    if inventory is not None:
        return read_inventory(inventory)
    return None if ek is None else {(named := parse_ek(ek)): Device(named)}


def _makers(ca: list[Path], intermediate: list[Path] | None, *, allow_sha1: bool) -> Makers:
    return Makers(_certificates(ca), _certificates(intermediate or []), allow_sha1)


def _certificates(files: list[Path]) -> list[bytes]:
    """The certificates of all the files, in DER."""
    certificates = []
    for file in files:
        try:
            certificates += split_file(_batch.read_any(file))
        except ValueError as error:
            raise ConfigError(f"{file}: {error}") from error
    return certificates


def _ek_certificate(file: Path | None) -> bytes | None:
    if file is None:
        return None
    certificates = _certificates([file])
    if len(certificates) != 1:
        raise ConfigError(
            f"{file} has {len(certificates)} certificates",
            hint="--ek-certificate is that of the endorsement key alone; its issuers are for the "
            "office, as --intermediate",
        )
    return certificates[0]
