"""Merges that end the process: the native code of ``tokenizers`` aborts, and raises nothing.

With a ``continuing_subword_prefix`` it cuts the length of the prefix, in bytes, off the second part
of each merge, whether or not that begins with it: within a character, or beyond its end.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

__all__ = ["check_merges"]

_PREFIX: Final = "continuing_subword_prefix"
# Nearly all files have no prefix, or no merges, and are not parsed here: some are of 30 MB, and
# what Python makes of them is not wiped. A name may be spelled with escapes of its letters and "_".
_HAS_PREFIX: Final = re.compile(rb'"%s"\s*:\s*"[^"]' % _PREFIX.encode())
_ESCAPED: Final = re.compile(rb"\\u00(?:5[fF]|[67])")


def check_merges(text: bytes) -> None:
    """Look at the merges of a tokenizer.json before the native code does.

    Raises:
        ValueError: one whose second part does not begin with the prefix, or no JSON.
        RecursionError: too deep.
    """
    if (b'"merges"' in text and _HAS_PREFIX.search(text)) or _ESCAPED.search(text):
        json.loads(text.decode(), object_pairs_hook=_check)


def _check(members: list[tuple[str, Any]]) -> None:
    """Look at one object, each value of a name that is there twice too; nothing is made of it."""
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
