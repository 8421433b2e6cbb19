"""Installed backends and kinds of evidence, found through entry points.

Rules: only the one that is asked for is imported, a broken one harms no other, and nothing is taken
from the working directory just because Python was started there.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from keymgmt._providers.contract import API_VERSION, KeyProvider, Settings
from keymgmt._providers.evidence import Evidence
from keymgmt._providers.names import is_name
from keymgmt._system.entry_points import announced, source_of, working_directory
from keymgmt.errors import BackendNotInstalled

__all__ = ["BackendInfo", "backends", "load_backend", "load_evidence"]

BACKENDS: Final = "keymgmt.backends"
EVIDENCE: Final = "keymgmt.evidence"
# What ours are called, and the extra that brings each.
_EXTRAS: Final = {
    BACKENDS: {name: name for name in ("aws", "broker", "file", "vault", "pkcs11", "tpm2")},
    EVIDENCE: {"sgx": "broker", "tdx": "broker", "tpm2": "tpm2"},
}
_CALLED: Final = {BACKENDS: "backend", EVIDENCE: "evidence"}


@dataclass(frozen=True)
class BackendInfo:
    """What a distribution announces by one entry point; its code has not been imported."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint

    def __str__(self) -> str:
        called = _CALLED[self.entry_point.group]
        return f"the {called} {self.name!r} of {self.distribution} {self.version}"


def backends(group: str = BACKENDS) -> dict[str, tuple[BackendInfo, ...]]:
    """All announced backends by name; a name with more than one entry is ambiguous."""
    return {
        name: tuple(
            BackendInfo(name, source_of(entry), _version(entry), entry) for entry in entries
        )
        for name, entries in announced(group).items()
    }


def _version(entry: EntryPoint) -> str:
    # A distribution that was removed by half may have none.
    return (entry.dist and entry.dist.version) or "unknown"


@functools.cache
def load_backend(name: str, distribution: str | None = None) -> type[KeyProvider[Settings]]:
    """Import the one backend called ``name``.

    Args:
        name: entry-point name.
        distribution: if given, only this distribution may provide it.

    Raises:
        BackendNotInstalled: nobody provides it, and the hint is the exact ``pip install``; two
            distributions provide it, or another one than ``distribution`` does; it fails to import,
            is no key provider, or was written for another API version. Each of these is a fault of
            this machine and not of the config, so the next provider is tried.
    """
    info = _choose(BACKENDS, name, distribution)
    loaded = _load(info, KeyProvider, "backend")
    version = loaded.api_version
    if version != API_VERSION:
        older = isinstance(version, int) and version < API_VERSION
        raise BackendNotInstalled(
            f"{info} speaks version {version!r} of the provider API, "
            f"this keymgmt speaks {API_VERSION}",
            hint=f"pip install --upgrade {info.distribution if older else 'keymgmt'}",
        )
    return loaded


@functools.cache
def load_evidence(name: str) -> type[Evidence[Any]]:
    """Import the one kind of evidence called ``name``; raises as ``load_backend``."""
    return _load(_choose(EVIDENCE, name, None), Evidence, "kind")


def _choose(group: str, name: str, distribution: str | None) -> BackendInfo:
    known, called = backends(group), _CALLED[group]
    candidates = known.get(name, ())
    if not candidates:
        raise BackendNotInstalled(
            f"the {called} {name!r} is not installed", hint=_install_hint(group, name, list(known))
        )
    if distribution is not None:
        named = _normal(distribution)
        allowed = [info for info in candidates if _normal(info.distribution) == named]
        if not allowed:
            raise BackendNotInstalled(
                f"the {called} {name!r} comes from {candidates[0].distribution}, "
                f"but the config allows only {distribution}",
                hint="install the distribution that the config names, from where you trust it",
            )
        candidates = tuple(allowed)
    if len(candidates) > 1:
        names = " and ".join(info.distribution for info in candidates)
        raise BackendNotInstalled(
            f"the {called} {name!r} is provided twice, by {names}",
            hint="uninstall the one that you did not choose, or name yours in the provider's "
            "table: distribution = ..."
            if group == BACKENDS
            else "uninstall the one that you did not choose",
        )
    return candidates[0]


def _load(info: BackendInfo, base: type[Any], named_by: str) -> type[Any]:
    try:
        _refuse_stray(info)
        loaded = info.entry_point.load()
    except BackendNotInstalled:
        raise
    except (Exception, SystemExit) as error:
        raise BackendNotInstalled(
            f"{info} fails to import: {type(error).__name__}: {error}",
            hint=f"repair it with: pip install --force-reinstall {info.distribution}",
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise BackendNotInstalled(
            f"{info} is not of class {base.__name__}", hint="report it to its author"
        )
    itself = getattr(loaded, named_by, None)
    if itself != info.name:
        raise BackendNotInstalled(
            f"{info} calls itself {itself!r}",
            hint=f"its class attribute `{named_by}` must equal its entry-point name",
        )
    return loaded


def _refuse_stray(info: BackendInfo) -> None:
    stray = working_directory()
    spec = find_spec(info.entry_point.module.partition(".")[0])
    if stray is None or spec is None:
        return
    locations = [*(spec.submodule_search_locations or []), spec.origin or ""]
    if any(Path(location).absolute().parent == stray for location in locations if location):
        raise BackendNotInstalled(
            f"{info} is hidden by {spec.name} in the working directory",
            hint="start it from another directory, or with python -P",
        )


def _normal(name: str) -> str:
    """The name of a distribution in its normal form, which pip compares (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _install_hint(group: str, name: str, known: list[str]) -> str:
    ours = _EXTRAS[group]
    if name in ours:
        return f'pip install "keymgmt[{ours[name]}]"'
    near = difflib.get_close_matches(name, [*known, *ours], n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    if not is_name(name):
        return f"the {_CALLED[group]} has a short name in lower case, such as {next(iter(ours))}"
    return f"install the distribution that provides it; installed: {', '.join(known) or 'none'}"
