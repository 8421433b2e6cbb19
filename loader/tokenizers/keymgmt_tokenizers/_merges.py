"""Refusing merges on which the native code of ``tokenizers`` aborts the process.

With a ``continuing_subword_prefix`` the library cuts the length of the prefix, in bytes, off the
second part of each merge, without looking whether it begins with the prefix. A cut within a
character, or beyond the end, aborts.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

__all__ = ["check_merges"]

_PREFIX: Final = "continuing_subword_prefix"
# A file without a prefix, or without merges, is not parsed here, as nearly all are: some have
# 30 MB, and the objects of Python's parser are not wiped. A JSON name may be spelled with escapes
# of its letters and "_", so a file with such escapes is parsed.
_HAS_PREFIX: Final = re.compile(rb'"%s"\s*:\s*"[^"]' % _PREFIX.encode())
_ESCAPED: Final = re.compile(rb"\\u00(?:5[fF]|[67])")


def check_merges(text: bytes) -> None:
    """Check the merges of a tokenizer.json before the native code reads them.

    Raises:
        ValueError: the second part of a merge does not begin with the prefix, or it is not JSON.
        RecursionError: it is nested too deep.
    """
    if (b'"merges"' in text and _HAS_PREFIX.search(text)) or _ESCAPED.search(text):
        json.loads(text.decode(), object_pairs_hook=_check)


def _check(members: list[tuple[str, Any]]) -> None:
    """Check one JSON object, with all values of a repeated name; the result of parsing is None."""
    values = [value for name, value in members if name == "merges"]
    merges = [merge for value in values if isinstance(value, list) for merge in value]
    for name, prefix in members:
        if name != _PREFIX or not isinstance(prefix, str):
            continue
        if prefix and not all(_fits(merge, prefix) for merge in merges):
            raise ValueError(f"a merge whose second part does not begin with {_PREFIX}")


def _fits(merge: Any, prefix: str) -> bool:
    """Whether the second part of a merge, "a b" or ["a", "b"], begins with the prefix."""
    match merge.split(" ") if isinstance(merge, str) else merge:
        case [str(), str() as second]:
            return second.startswith(prefix)
    return False
