"""The file paths that a model may have: those that mean the same file on every system."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

from keymgmt.errors import FormatError

__all__ = ["check_paths", "path_problem"]

_RESERVED: Final = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3])"
    r"(\..*)?",
    # Without re.ASCII, Python lets U+0131 (a dotless i) match the i of "conin$", and other
    # languages do not. With it a reader in any language can refuse exactly the same names.
    re.IGNORECASE | re.ASCII,
)
_FORBIDDEN: Final = frozenset('\\:*?"<>|')


def path_problem(path: str) -> str | None:
    """Why ``path`` may not be in a model, or None.

    A path is relative, 1 to 32 parts joined by '/', printable, and in normal form C.
    """
    if not path or len(path.encode("utf-8", "surrogatepass")) > 1024:
        return "it is empty or longer than 1024 bytes"
    if not path.isprintable() or _FORBIDDEN & set(path):
        return "it has a character that file systems treat differently"
    if unicodedata.normalize("NFC", path) != path:
        return "it is not in Unicode's normal form C"
    parts = path.split("/")
    if len(parts) > 32:
        return "it is more than 32 folders deep"
    for part in parts:
        if part in ("", ".", ".."):
            return "it is absolute or leaves the model"
        if len(part.encode()) > 250:
            return "one of its parts is longer than 250 bytes"
        if part[-1] in ". " or part[0] == " ":
            return "a part begins with a space, or ends with a space or dot"
        if _RESERVED.fullmatch(part):
            return "a part is the name of a device"
    return None


def check_paths(paths: Iterable[str]) -> None:
    """FormatError unless the paths are valid, sorted, and distinct on every file system."""
    previous = b""
    files: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        if problem := path_problem(path):
            raise FormatError(f"the file path {path[:120]!r} is refused: {problem}")
        if path.encode() <= previous:
            raise FormatError("the files in manifest.json are not sorted by path")
        previous = path.encode()
        folded = unicodedata.normalize("NFC", path.casefold())
        if folded in files:
            raise FormatError(f"two files differ only in upper and lower case: {path[:120]!r}")
        files.add(folded)
        parts = folded.split("/")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    # A file lies in payload/ under its path with ".floe" behind it, and in an unsealed model under
    # the path itself. So neither may also be a folder.
    clash = folders & (files | {f"{name}.floe" for name in files})
    if clash:
        raise FormatError(f"the path {min(clash)[:120]!r} is a file and a folder")
