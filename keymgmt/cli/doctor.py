"""``keymgmt doctor``: check everything that opening and sealing need."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final, ParamSpec

import typer

import keymgmt
from keymgmt._system.words import counted
from keymgmt.cli._options import Json, complete_key, place
from keymgmt.cli._output import print_finding
from keymgmt.cli._state import State
from keymgmt.console import print_json
from keymgmt.errors import Attempt, ConfigError, KeymgmtError

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._providers.data import Finding, Health

__all__ = ["doctor"]

P = ParamSpec("P")
SECONDS: Final = 60.0


def doctor(
    context: typer.Context,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROVIDER|PROVIDER:KEY]...",
            help="What to check; else everything in the config.",
            autocompletion=complete_key,
        ),
    ] = None,
    open_model: Annotated[
        list[str] | None,
        typer.Option("--open", metavar="MODEL.sealed", help="Also open this model.", parser=place),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the config, every provider and its keys; exit 1 if anything failed.

    Examples:
        keymgmt doctor
        keymgmt doctor local:models --open resnet50.sealed
    """
    state: State = context.obj
    config = state.config()
    findings: list[tuple[str, Finding]] = []
    for subject, finding in _check_all(config, what or [], open_model or []):
        findings.append((subject, finding))
        if not as_json:
            print_finding(f"{subject}: {finding.name}", finding)
    failed = any(finding.status == "failed" for _, finding in findings)
    if as_json:
        listed = [{"subject": subject, **asdict(finding)} for subject, finding in findings]
        results = {"ok": not failed, "config": str(config.path), "findings": listed}
        versions = {"keymgmt": keymgmt.__version__, "python": platform.python_version()}
        print_json({"format": "keymgmt-doctor/1", **versions, **results})
    if failed:
        raise typer.Exit(1)


def _check_all(
    config: Config, names: list[str], models: list[str]
) -> Iterator[tuple[str, Finding]]:
    from keymgmt._providers.names import KeyRef

    named = {text.partition(":")[0] for text in names}
    keys = {str(KeyRef.parse(text)) for text in names if ":" in text}
    if not names:
        yield "cryptography", _module(config)
        yield from (("policy", finding) for finding in _policy(config))
        keys = set(_seal_keys(config))
    for name in config.provider_names if not names else sorted(named):
        backend = config.backend_of(name)
        subject = f"{name} ({backend})"
        references = [KeyRef.parse(text) for text in sorted(keys)]
        shown: set[Finding] = set()
        for key in [each.key for each in references if each.provider == name] or (None,):
            for finding in _check(config, name, key).findings:
                # A finding about the whole provider comes with each of its keys.
                if finding not in shown:
                    shown.add(finding)
                    yield subject, finding
    for path in models:
        yield from ((str(path), finding) for finding in _open(config, path))


def _check(config: Config, name: str, key: str | None) -> Health:
    from keymgmt._providers.data import Finding, Health
    from keymgmt._system.deadline import within

    label = f"the check of {name}"
    try:
        return within(SECONDS, label, lambda: config.provider(name).check(key))
    except KeymgmtError as error:
        return Health((Finding.failure("provider", error),))
    except Exception as error:  # noqa: BLE001 - a stranger's backend; the others are still checked
        detail = f"{type(error).__name__}: {error}"
        return Health((Finding("provider", "failed", detail, "report it to the backend's author"),))


def _attempt(name: str, call: Callable[P, str], *args: P.args, **more: P.kwargs) -> Finding:
    from keymgmt._providers.data import Finding

    try:
        return Finding(name, "ok", call(*args, **more))
    except KeymgmtError as error:
        attempts = getattr(error, "attempts", ())
        reasons = [f"{each.recipient}: {each.error}" for each in attempts]
        return Finding(name, "failed", "; ".join([str(error), *reasons]), error.hint)


def _open(config: Config, path: str) -> Iterator[Finding]:
    from keymgmt._providers.data import Finding

    failed: list[Attempt] = []

    def opens() -> str:
        with keymgmt.open(path, keys=config) as model:
            failed.extend(model.failed)
            opened_by = "+".join(model.opened_by) or "a cached key"
            return f"{model.manifest.name}, release {model.manifest.release}, by {opened_by}"

    yield _attempt("opens", opens)
    for attempt in failed:
        yield Finding(
            "second way in",
            "failed",
            f"{attempt.provider} should open it and does not work: {attempt.error}",
            attempt.error.hint,
        )


def _module(config: Config) -> Finding:
    from keymgmt._crypto.module import describe_module
    from keymgmt._providers.data import Finding

    module, fips = describe_module()
    if fips or config.seal.profile == "default":
        return Finding("module", "ok", module)
    hint = "if your rules require a validated module: docs/threat-model.md, A validated module"
    return Finding("module", "warning", f"[seal] profile is {config.seal.profile}: {module}", hint)


def _policy(config: Config) -> Iterator[Finding]:
    from keymgmt._providers.data import Finding

    policy = config.policy
    yield Finding("config", "ok", str(config.path))
    if not policy.require_signature:
        yield Finding(
            "signatures",
            "warning",
            "not required: whoever can wrap to these keys can make a model that opens here",
            "name publishers under [policy] and remove require_signature = false",
        )
    elif not policy.publishers:
        yield Finding(
            "signatures",
            "warning",
            "required, and no publisher is named: nothing opens",
            'publishers = { "FILE.pem" = ["MODEL"] } under [policy]',
        )
    for file, models in policy.publishers.items():
        scope = "any model" if "*" in models else ", ".join(models)
        yield _attempt(f"publisher {file}", _signer, config, file, f"may publish {scope}")
    for file in (*policy.recipient_signers, *policy.attestation_signers):
        role = "vouches for recipient files"
        yield _attempt(f"recipient signer {file}", _signer, config, file, role)
    if policy.remember_releases is not None:
        yield _attempt("release memory", _remembered, config)
    if config.seal.sign:
        finding = _attempt("[seal] sign", _sealing, config)
        name, colon, _ = config.seal.sign.partition(":")
        if finding.status == "failed" and colon and name in config.provider_names:
            # Only a warning: the check of that provider reports a key that fails.
            finding = replace(finding, status="warning")
        yield finding
    for group in config.seal.to:
        members = group.split("+")
        for file in (member for member in members if member.startswith("@")):
            yield _attempt(f"recipient {file}", _recipient, file[1:])
        if keys := [member for member in members if not member.startswith("@")]:
            yield _attempt(f"[seal] to {group}", _wraps, config, "+".join(keys))


def _remembered(config: Config) -> str:
    from keymgmt._system.deadline import within
    from keymgmt._trust.release_memory import release_memory

    memory = release_memory(config)
    assert memory is not None  # noqa: S101 - called only with remember_releases
    known = within(SECONDS, "looking at the release memory", memory.recall)
    clock = f", the clock not before {known.time}" if known.time else ""
    return f"{counted(len(known.releases), 'model')} in {memory.path}{clock}"


def _sealing(config: Config) -> str:
    from keymgmt._providers.names import KeyRef
    from keymgmt._trust.policy import check_signer

    public = check_signer(config, KeyRef.parse(str(config.seal.sign)))
    return f"{config.seal.sign}, {public.id[:16]}"


def _wraps(config: Config, keys: str) -> str:
    from keymgmt._system.deadline import within
    from keymgmt._trust.recipients import resolve_groups
    from keymgmt.sealed.profiles import find_profile

    profile = find_profile(config.seal.profile)
    resolve = partial(resolve_groups, [keys], config, profile=profile)
    within(SECONDS, f"wrapping with {keys}", resolve)
    return f"wrapped with {keys}"


def _signer(config: Config, file: str, role: str) -> str:
    from keymgmt._crypto.signatures import algorithm_of

    return f"{algorithm_of(config.public_key(file))}, {role}"


def _recipient(path: str) -> str:
    from keymgmt._providers.recipient_file import Recipient

    recipient = Recipient.load(path)
    return f"{recipient}, {recipient.kind}, fingerprint {recipient.fingerprint}"


def _seal_keys(config: Config) -> Iterator[str]:
    from keymgmt._providers.names import KeyRef

    named = [member for group in config.seal.to for member in group.split("+")]
    for text in (*named, config.seal.sign or "@"):
        # What is no key, or malformed, is a finding of the policy.
        with contextlib.suppress(ConfigError):
            yield str(KeyRef.parse(text))
