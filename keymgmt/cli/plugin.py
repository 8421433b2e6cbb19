"""``keymgmt plugin``: prove a backend on your own hardware, or start one."""

from __future__ import annotations

import json
import platform
import re
import shlex
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from keymgmt.cli._options import Json
from keymgmt.cli._scaffold import write_scaffold
from keymgmt.cli._state import State
from keymgmt.console import clean, console, print_json, say, table
from keymgmt.errors import ConfigError

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._providers.contract import KeyProvider
    from keymgmt.testing._run import Result
    from keymgmt.testing._site import Site

__all__ = ["app"]

app = typer.Typer(help="Prove a backend on your own hardware, or start one.", no_args_is_help=True)

REPORT: Final = "keymgmt-plugin-check/1"
STYLES: Final = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


@app.command()
def check(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="PROVIDER[:KEY]",
            help="A configured provider and a wrapping key of it; without KEY, the first it lists.",
        ),
    ],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="Config file.")
    ] = None,
    create_keys: Annotated[
        bool,
        typer.Option(
            "--create-keys",
            help="Allow the checks that make keys, named kit-*; they are deleted where the "
            "backend can.",
        ),
    ] = False,
    other_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="A second wrapping key.")
    ] = None,
    recipient_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="A wrapping key with a public part.")
    ] = None,
    signing_key: Annotated[str | None, typer.Option(metavar="KEY", help="A signing key.")] = None,
    hooks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.py",
            help="Functions that disturb the service: break_service, hang_service, heal_service, "
            "expire_login. Not run unless given.",
        ),
    ] = None,
    denied: Annotated[
        str | None,
        typer.Option(metavar="PROVIDER", help="A configured provider that the service refuses."),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds within which every call must end.", min=0.1)
    ] = 15.0,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a JUnit report.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a JSON report.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the conformance kit against a configured provider; exit 1 if a check fails.

    It wraps, unwraps and reads. It creates no key and disturbs no service without an option for
    that. If the operator must mend something first, such as a login, it ends before the checks.

    Example:
        keymgmt plugin check site:resnet50 --report kit.json
    """
    from keymgmt._config.config import load_config
    from keymgmt._system.files import save_file

    try:
        from keymgmt.testing._run import run_contract
        from keymgmt.testing._site import (
            Site,
            check_site,
            load_hooks,
            remove_made,
            site_contract,
            unattended,
        )
    except ImportError as error:
        raise ConfigError(
            f"the kit needs {error.name}, which is not installed",
            hint='pip install "keymgmt[testing]"',
        ) from error
    state: State = context.obj
    loaded = load_config(config) if config is not None else state.config()
    label, _, key = name.partition(":")
    provider = loaded.provider(_provider_name(loaded, label))
    for file in filter(None, (junit, report)):
        if not file.parent.is_dir():
            raise ConfigError(
                f"there is no folder {file.parent}",
                hint=f"mkdir -p {shlex.quote(str(file.parent))}",
            )
    with unattended():
        site = Site(
            provider=provider,
            wrap_key=key or _first_key(provider, create_keys=create_keys),
            other_wrap_key=other_key,
            recipient_key=recipient_key,
            signing_key=signing_key,
            may_create_keys=create_keys,
            denied=loaded.provider(denied) if denied else None,
            hooks=load_hooks(hooks) if hooks else {},
            time_limit=time_limit,
        )
    versions = _versions(provider)
    out = console(stderr=as_json)
    shown = out.is_terminal
    left: dict[str, str] = {}
    with out.status("checking") as status:
        try:
            with unattended():
                check_site(site)
            results = run_contract(
                site_contract(site),
                junit=junit,
                suite=f"keymgmt plugin check {provider.name}",
                properties=list(versions.items()),
                report_result=lambda result: status.update(result.name) if shown else None,
            )
        finally:
            left = remove_made(site)
            for name, why in left.items():
                out.print(f"left in the service: {clean(name)}: {clean(why)}", soft_wrap=True)
    document = {**_report(site, versions, results), "left": left}
    if report is not None:
        save_file(report, json.dumps(document, indent=2).encode() + b"\n", force=True)
    if as_json:
        print_json(document)
    else:
        _print(site, versions, results)
    if not document["ok"]:
        raise typer.Exit(1)


def _provider_name(config: Config, name: str) -> str:
    """The provider called ``name``, else the only provider of the backend called ``name``."""
    if name in config.provider_names:
        return name
    of_backend = [each for each in config.provider_names if config.backend_of(each) == name]
    return of_backend[0] if len(of_backend) == 1 else name


def _first_key(provider: KeyProvider[Any], *, create_keys: bool) -> str | None:
    from keymgmt._providers.contract import SupportsKeyManagement
    from keymgmt._providers.names import check_key

    if not isinstance(provider, SupportsKeyManagement):
        raise ConfigError(
            f"the provider {provider.name!r} does not list its keys, so name one",
            hint=f"keymgmt plugin check {provider.name}:KEY",
        )
    key = next((info.key for info in provider.list_keys() if info.purpose == "wrap"), None)
    if key is None and not create_keys:
        raise ConfigError(
            f"the provider {provider.name!r} has no wrapping key",
            hint="make one, or let the kit make its own: --create-keys",
        )
    return check_key(key) if key is not None else None


def _versions(provider: KeyProvider[Any]) -> dict[str, str]:
    from importlib.metadata import version

    from keymgmt._providers.contract import API_VERSION
    from keymgmt._providers.registry import backends

    info = next(iter(backends().get(provider.backend, ())), None)
    return {
        "keymgmt": version("keymgmt"),
        "api": str(API_VERSION),
        "backend": provider.backend,
        "distribution": info.distribution if info else "unknown",
        "distribution version": info.version if info else "unknown",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cryptography": version("cryptography"),
    }


def _report(site: Site, versions: dict[str, str], results: list[Result]) -> dict[str, Any]:
    counts = Counter(result.outcome for result in results)
    return {
        "format": REPORT,
        "ok": not counts["failed"],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "provider": site.provider.name,
        "versions": versions,
        "hooks": sorted(site.hooks),
        "counts": {name: counts[name] for name in ("passed", "failed", "skipped")},
        "checks": [asdict(result) for result in results],
    }


def _print(site: Site, versions: dict[str, str], results: list[Result]) -> None:
    from rich.text import Text

    out = console()
    rows = [
        (
            result.name.removeprefix("test_").replace("_", " "),
            result.outcome,
            f"{result.seconds:.2f} s",
            "" if result.outcome != "skipped" else result.reason,
        )
        for result in results
    ]
    result_table = table(["check", "result", "time", "why skipped"], rows)
    for result, row in zip(results, result_table.rows, strict=True):
        row.style = STYLES[result.outcome]
    out.print(result_table)
    for result in results:
        if result.outcome == "failed":
            out.print()
            out.print(Text(result.name, style=STYLES["failed"]))
            out.print(clean(result.reason), soft_wrap=True)
    counts = Counter(result.outcome for result in results)
    out.print()
    out.print(
        f"{versions['distribution']} {versions['distribution version']} on keymgmt "
        f"{versions['keymgmt']}, Python {versions['python']}, provider {site.provider.name}"
    )
    verdict = "does not keep the contract" if counts["failed"] else "keeps the contract"
    out.print(
        Text(
            f"{verdict}: {counts['passed']} passed, {counts['failed']} failed, "
            f"{counts['skipped']} skipped",
            style=STYLES["failed" if counts["failed"] else "passed"],
        )
    )


@app.command()
def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the backend: short, lower case.")
    ],
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIRECTORY]", help="Where to write; else ./keymgmt-NAME."),
    ] = None,
    http: Annotated[
        bool, typer.Option("--http", help="For a key service that is asked over HTTPS.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a complete distribution for a new backend; it keeps the contract as it is.

    It begins with keys in a toy file, or with --http in a toy service. Its README says where the
    calls of your key service go.

    Examples:
        keymgmt plugin new acme-hsm
        keymgmt plugin new acme-kms --http
    """
    from keymgmt._providers.names import is_name
    from keymgmt._providers.registry import backends

    if not is_name(name) or not re.fullmatch("[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*", name):
        raise ConfigError(
            f"not a name for a backend: {name[:40]!r}",
            hint="a letter, then letters, digits, '-' and '_', all in lower case, at most 32",
        )
    if (taken := backends().get(name)) is not None:
        raise ConfigError(
            f"the backend {name!r} exists already, from {taken[0].distribution}",
            hint="a name must be free where your backend is installed: put your site's name in it",
        )
    target = directory if directory is not None else Path(f"keymgmt-{name}")
    files = write_scaffold(name, target, http=http)
    if as_json:
        names = [str(path) for path in files]
        print_json({"format": "keymgmt-plugin-new/1", "directory": str(target), "files": names})
        return
    for path in files:
        say(target / path)
    say("")
    say(f"Next: cd {target} and read README.md")
