"""Look whether a loaded model leaves anything of itself on this machine's disks."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer
from rich.text import Text

import keymgmt
from keymgmt.console import clean, console, print_json
from keymgmt.errors import ConfigError, KeymgmtError
from keymgmt_openvino_demo._canary import Canary
from keymgmt_openvino_demo._throwaway_keys import make_throwaway_keys
from keymgmt_openvino_demo._watch import Watch, search_folders

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keymgmt_openvino_demo._watch import Leak

__all__ = ["app"]

app = typer.Typer(help=__doc__, add_completion=False)

_SHARED: tuple[str, ...] = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - to be searched
_STYLES: Final = {"ok": "green", "warn": "yellow", "unknown": "bold yellow", "leak": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check, and what to do about it."""

    check: str
    state: Literal["ok", "warn", "unknown", "leak"]
    seen: str
    fix: str = ""


@app.command()
def leakcheck(
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- COMMAND ...]",
            help="Your own program, to watch instead of a plain load: {sealed} in it becomes the "
            "sealed canary model, {plain} its plaintext .xml, up to a -- of its own. It finds the "
            "config in $KEYMGMT_CONFIG.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="OpenVINO device.")] = "CPU",
    to: Annotated[
        list[str] | None,
        typer.Option(help="Recipients of the canary model, as for seal; else those of the config."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the canary model.")] = "leakcheck",
    look: Annotated[
        list[Path] | None, typer.Option(help="Another folder to search afterwards.")
    ] = None,
    strace: Annotated[
        bool,
        typer.Option(help="Trace the program; one that hardens itself refuses to be traced."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Seal a canary model, load it your way, and search this machine for its weights.

    Searched are the files that the program wrote or holds open and those that changed in its
    temporary and cache folders; looked at are core dumps and swap. Exits with 1 if something of
    the model was found, or something could not be looked at.

    Examples:
        keymgmt leakcheck
        keymgmt leakcheck -- python serve.py {sealed}
    """
    out = console()
    with tempfile.TemporaryDirectory(prefix="keymgmt-leakcheck-") as folder:
        work = Path(folder)
        canary = Canary()
        plain, sealed = work / "plain" / "canary.xml", work / "canary.sealed"
        plain.parent.mkdir(mode=0o700)
        canary.save(plain)
        with _keys(context, work, to) as (config, recipients, where):
            keymgmt.seal(plain, sealed, to=recipients, name=name, keys=config)
            if not any("{plain}" in part for part in command or ()):
                shutil.rmtree(plain.parent)
            findings = _watch(
                canary, work, sealed, plain, config, command, device, look or [], strace
            )
    findings += [_core_dumps(), _swap()]
    leaks = sum(finding.state == "leak" for finding in findings)
    warnings = sum(finding.state == "warn" for finding in findings)
    unknown = any(finding.state == "unknown" for finding in findings)
    verdict = f"{leaks} leak{'s' * (leaks > 1)} found" if leaks else "no leak found"
    if unknown:
        verdict = f"{verdict if leaks else 'not known'}, not everything could be looked at"
    if warnings:
        verdict += f", {warnings} to tighten"
    if as_json:
        report = {
            "format": "keymgmt-leakcheck/1",
            "verdict": verdict,
            "leak": leaks > 0,
            "complete": not unknown,
        }
        print_json({**report, "findings": [*map(asdict, findings)]})
    else:
        shown = " ".join(command) if command else f"keymgmt_openvino.load on {device}"
        out.print(f"a canary model, {where}; watched: {clean(shown)}\n", soft_wrap=True)
        for finding in findings:
            state = (f"{finding.state:7}", _STYLES[finding.state])
            out.print(Text.assemble(state, f" {finding.check}: {clean(finding.seen)}"))
            if finding.fix:
                out.print(Text(f"        {finding.fix}", style="cyan"))
        out.print(Text(f"\nverdict: {verdict}", style="bold red" if leaks else "bold"))
    if leaks or unknown:
        raise typer.Exit(1)


@contextlib.contextmanager
def _keys(
    context: typer.Context, work: Path, to: list[str] | None
) -> Iterator[tuple[keymgmt.Config, list[str], str]]:
    """The operator's config if it can seal, else a new config with throw-away keys."""
    try:
        config = context.obj.config()
    except ConfigError:
        if to:
            raise
        config = None
    recipients = to or (config.seal.to if config else [])
    if config and recipients and config.path:
        yield config, list(recipients), f"sealed for {', '.join(recipients)}"
        return
    with make_throwaway_keys(work / "site") as config:
        yield config, list(config.seal.to), "sealed with throw-away keys"


def _watch(
    canary: Canary,
    work: Path,
    sealed: Path,
    plain: Path,
    config: keymgmt.Config,
    command: list[str] | None,
    device: str,
    look: list[Path],
    strace: bool,
) -> list[Finding]:
    started = time.time()
    watch = Watch(canary.search, work)
    paths = {"{sealed}": str(sealed), "{plain}": str(plain)}
    line = list(command or ())
    # Arguments after a "--" belong to another program: `keymgmt exec {sealed} -- PROGRAM`.
    ends = line.index("--") if "--" in line else len(line)
    for placeholder, path in paths.items():
        line[:ends] = [part.replace(placeholder, path) for part in line[:ends]]
    ours = [
        sys.executable,
        "-m",
        "keymgmt_openvino_demo._canary",
        str(sealed),
        str(config.path),
        device,
    ]
    status, said = watch.run(
        line or ours,
        env={**os.environ, "KEYMGMT_CONFIG": str((config.path or work).absolute())},
        wait_for=None if line else "ready",
        trace_it=strace,
    )
    if status or (not line and not said):
        raise KeymgmtError(
            f"the program that was watched failed with status {status}",
            hint="run it by itself first; what it prints is above. One that calls "
            "keymgmt.harden() refuses to be traced: watch it with --no-strace, as root",
        )
    direct, searched = set(watch.leaks), len(watch.written)
    folders = [folder for folder in _folders(look) if folder.is_dir()]
    with console(stderr=True).status("searching") as shown:
        changed = search_folders(
            watch, folders, started, lambda count: shown.update(f"searching: {count} changed files")
        )
    apart = f"; not other file systems: {', '.join(sorted(watch.mounts))}" if watch.mounts else ""
    findings = [
        Finding(
            "files that it wrote or held open",
            "leak" if direct else "ok",
            _shown(direct) if direct else f"{searched} searched, nothing found",
            "leave OpenVINO's CACHE_DIR off, and write out nothing that a model is exported or "
            "saved to"
            if direct
            else "",
        ),
        Finding(
            "temporary and cache folders",
            "leak" if watch.leaks - direct else "ok",
            _shown(watch.leaks - direct)
            if watch.leaks - direct
            else f"{changed} changed files in {', '.join(map(str, folders))}, nothing found{apart}",
            "find what wrote them, and remove them" if watch.leaks - direct else "",
        ),
    ]
    if watch.unknown:
        findings.append(
            Finding(
                "what could not be looked at",
                "unknown",
                "; ".join(sorted(watch.unknown)[:5]),
                "run it as root, who may look at all of that",
            )
        )
    if watch.unseen:
        findings.append(
            Finding(
                "files gone before they could be searched",
                "warn",
                ", ".join(sorted(watch.unseen)[:5]),
                "what was removed may still be on the disk; use a tmpfs for them",
            )
        )
    if not watch.traced:
        findings.append(
            Finding(
                "completeness",
                "warn",
                "strace was not used, so only open files and known folders were searched",
                "apt-get install strace",
            )
        )
    if said:
        locked = said.split()[1] == "1"
        findings.append(
            Finding(
                "locked memory",
                "ok" if locked else "warn",
                "the weights were kept from swap" if locked else "the weights could be swapped",
                "" if locked else "raise ulimit -l (LimitMEMLOCK= of the unit) above their size",
            )
        )
    return findings


def _shown(leaks: set[Leak]) -> str:
    return "; ".join(sorted(f"{leak.part} in {leak.path}" for leak in leaks))


def _folders(look: list[Path]) -> list[Path]:
    home = Path.home()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    temporary = [Path(tempfile.gettempdir()), *map(Path, _SHARED)]
    working = [Path.cwd()] if Path.cwd() != Path("/") else []
    return list(dict.fromkeys([*temporary, cache, home / "intel", *working, *look]))


def _core_dumps() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    # The kernel ignores the limit for a handler behind a pipe, except a limit of 1 (core(5)).
    if soft == 0 and not pattern.startswith("|"):
        return Finding("core dumps", "ok", "off (limit 0)")
    return Finding(
        "core dumps",
        "warn",
        f"on: limit {'none' if soft == resource.RLIM_INFINITY else soft}, to {pattern}",
        "the loader's buffers are left out of them, OpenVINO's own copies are not: "
        "call keymgmt.harden() first thing, or set ulimit -c 0 (LimitCORE=0)",
    )


def _swap() -> Finding:
    plain = keymgmt.unencrypted_swap()
    if not plain:
        return Finding("swap", "ok", "none, or encrypted")
    return Finding(
        "swap",
        "warn",
        f"not encrypted: {', '.join(plain)}",
        "encrypt it, switch it off, or set MemorySwapMax=0 for the unit: "
        "OpenVINO's own copies of the weights are not locked",
    )
