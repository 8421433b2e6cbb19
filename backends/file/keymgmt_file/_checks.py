"""The findings of ``keymgmt doctor`` about a key directory: access, locks, and every key."""

from __future__ import annotations

from typing import Any

from keymgmt.backend import Finding, Health, KeymgmtError, KeyProvider, try_key
from keymgmt_file._keys import KeyFiles

__all__ = ["check"]


def check(provider: KeyProvider[Any], files: KeyFiles, key: str | None) -> Health:
    """Check the directory and read every key file in it, or try only ``key``."""
    try:
        findings = [_directory(files)]
        names = files.names() if key is None else [key]
    except KeymgmtError as error:
        return Health((Finding.failure("key directory", error),))
    for name in names:
        try:
            info = files.current(name).info()
            if key is not None:
                try_key(provider, name, info.purpose)
        except KeymgmtError as error:
            findings.append(Finding.failure(f"key {name}", error))
        else:
            use = "" if key is None else f", {info.purpose}s"
            detail = f"{info.kind}, version {info.newest}{use}"
            findings.append(Finding(f"key {name}", "ok", detail))
    return Health(tuple(findings))


def _directory(files: KeyFiles) -> Finding:
    name, states = "key directory", files.locked_keys().values()
    if not states:
        make = f"create a key with: keymgmt keys create {files.provider}:KEY"
        return Finding(name, "warning", f"{files.path}: no keys yet", make)
    detail = f"{files.path}: private, {len(states)} keys, {sum(states)} locked with a passphrase"
    if not all(states) and (any(states) or files.passphrase.source is not None):
        lock = f"lock the others with: keymgmt file lock {files.provider}"
        return Finding(name, "warning", detail, lock)
    return Finding(name, "ok", detail)
