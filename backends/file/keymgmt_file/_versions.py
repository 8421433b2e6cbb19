"""The versions that each key of a directory has had, so that a restored key file is noticed.

    {"format": "keymgmt-file-versions/1", "keys": {"release": {"1": IDENTITY, "2": IDENTITY}}}

An *identity* is derived from the secret of a version (HKDF-Expand-SHA-384, 16 bytes, in hex) and
reveals nothing of it. Without this file, an old key file that was put back would be rotated to a
second version with the number of a lost one, and nobody could tell the two apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from keymgmt.backend import FormatError, JsonReader
from keymgmt_file._errors import damaged
from keymgmt_file._jwk import MAX_FILE, KeySet, read_json

__all__ = ["Known", "dump", "identities", "parse", "problem"]

FORMAT: Final = "keymgmt-file-versions/1"
_LABEL: Final = b"keymgmt-file identity 1"

Known = dict[str, dict[str, str]]
"""Key -> version -> identity."""


def identities(keys: KeySet) -> dict[str, str]:
    """Version -> identity, of all versions in a key file."""
    derived = {}
    for version in keys.numbers:
        with keys.secret(version) as secret:
            derived[version] = HKDFExpand(SHA384(), 16, _LABEL).derive(secret).hex()
    return derived


def problem(known: Mapping[str, str], present: Mapping[str, str]) -> str | None:
    """How a key file is older than, or another than, the newest known file; None if it is not.

    Args:
        known: version -> identity, of all versions that were in the directory before.
        present: the same of the key file; it may have newer versions, and may lack old ones.
    """
    for version, identity in present.items():
        if known.get(version, identity) != identity:
            return f"its version {version} is another one than the version {version} of before"
    newest = max(known, key=int, default="0")
    if int(newest) > max(map(int, present)):
        return f"it lacks version {newest}, which was here before"
    if known and not known.keys() & present.keys():
        return "it has none of the versions that were here before"
    return None


def parse(content: bytes) -> Known:
    """Read ``versions.json``; a damaged file is a ProviderError, and never counts as empty."""
    reader = read_json(content, "versions.json")
    try:
        reader.version(FORMAT, "")
        keys = JsonReader(reader.members("keys"), "keys")
        reader.end()
        return {
            name: keys.texts(name, most=MAX_FILE, key_limit=9, limit=32) for name in keys.names()
        }
    except FormatError:
        raise damaged("versions.json") from None


def dump(known: Known) -> bytes:
    """What ``versions.json`` is to hold."""
    return json.dumps({"format": FORMAT, "keys": known}, indent=1).encode() + b"\n"
