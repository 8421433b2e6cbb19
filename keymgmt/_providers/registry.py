"""Installed backends, found through the entry points of group ``keymgmt.backends``.

Rules: only the backend that is asked for is imported, a broken backend harms no other, and nothing
is taken from the working directory just because Python was started there.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from keymgmt._providers.contract import API_VERSION, KeyProvider, Settings
from keymgmt._providers.names import is_name
from keymgmt._system.entry_points import installed_entry_points, working_directory
from keymgmt.errors import BackendNotInstalled

__all__ = ["BackendInfo", "backends", "load_backend"]

GROUP: Final = "keymgmt.backends"
_OURS: Final = {"aws", "file", "vault", "pkcs11", "tpm2"}


@dataclass(frozen=True)
class BackendInfo:
    """One backend that a distribution announces; its code has not been imported."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint


def backends() -> dict[str, tuple[BackendInfo, ...]]:
    """All announced backends by name; a name with more than one entry is ambiguous."""
    announced: dict[str, dict[tuple[str, str], BackendInfo]] = {}
    for entry in installed_entry_points(GROUP):
        # A distribution that was removed by half may have neither name nor version.
        distribution = (entry.dist and entry.dist.name) or "unknown"
        version = (entry.dist and entry.dist.version) or "unknown"
        # A distribution may stand on sys.path twice; the first one wins, as for imports.
        announced.setdefault(entry.name, {}).setdefault(
            (distribution, entry.value), BackendInfo(entry.name, distribution, version, entry)
        )
    return {name: tuple(announced[name].values()) for name in sorted(announced)}


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
    known = backends()
    candidates = known.get(name, ())
    if not candidates:
        raise BackendNotInstalled(
            f"the backend {name!r} is not installed", hint=_install_hint(name, list(known))
        )
    if distribution is not None:
        named = _normal(distribution)
        allowed = [info for info in candidates if _normal(info.distribution) == named]
        if not allowed:
            raise BackendNotInstalled(
                f"the backend {name!r} comes from {candidates[0].distribution}, "
                f"but the config allows only {distribution}",
                hint="install the distribution that the config names, from where you trust it",
            )
        candidates = tuple(allowed)
    if len(candidates) > 1:
        names = " and ".join(info.distribution for info in candidates)
        raise BackendNotInstalled(
            f"the backend {name!r} is provided twice, by {names}",
            hint="uninstall the one that you did not choose, or name yours in the provider's "
            "table: distribution = ...",
        )
    return _load(candidates[0])


def _load(info: BackendInfo) -> type[KeyProvider[Settings]]:
    source = f"the backend {info.name!r} of {info.distribution} {info.version}"
    try:
        _refuse_stray(info, source)
        loaded = info.entry_point.load()
    except BackendNotInstalled:
        raise
    except (Exception, SystemExit) as error:
        raise BackendNotInstalled(
            f"{source} fails to import: {type(error).__name__}: {error}",
            hint=f"repair it with: pip install --force-reinstall {info.distribution}",
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, KeyProvider)):
        raise BackendNotInstalled(f"{source} is not a KeyProvider", hint="report it to its author")
    version = loaded.api_version
    if version != API_VERSION:
        older = isinstance(version, int) and version < API_VERSION
        raise BackendNotInstalled(
            f"{source} speaks version {version!r} of the provider API, "
            f"this keymgmt speaks {API_VERSION}",
            hint=f"pip install --upgrade {info.distribution if older else 'keymgmt'}",
        )
    if getattr(loaded, "backend", None) != info.name:
        raise BackendNotInstalled(
            f"{source} calls itself {getattr(loaded, 'backend', None)!r}",
            hint="its class attribute `backend` must equal its entry-point name",
        )
    return loaded


def _refuse_stray(info: BackendInfo, source: str) -> None:
    stray = working_directory()
    spec = find_spec(info.entry_point.module.partition(".")[0])
    if stray is None or spec is None:
        return
    locations = [*(spec.submodule_search_locations or []), spec.origin or ""]
    if any(Path(location).absolute().parent == stray for location in locations if location):
        raise BackendNotInstalled(
            f"{source} is hidden by {spec.name} in the working directory",
            hint="start it from another directory, or with python -P",
        )


def _normal(name: str) -> str:
    """The name of a distribution in its normal form, which pip compares (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _install_hint(name: str, known: list[str]) -> str:
    if name in _OURS:
        return f'pip install "keymgmt[{name}]"'
    near = difflib.get_close_matches(name, [*known, *_OURS], n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    if not is_name(name):
        return "a backend has a short name in lower case, such as vault"
    return f"install the distribution that provides it; installed: {', '.join(known) or 'none'}"
