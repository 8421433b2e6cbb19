"""What the system refused, in the words of the person who asked for it: the one translation."""

from __future__ import annotations

import errno
import os
from typing import Final

from keymgmt.errors import ConfigError, KeymgmtError

__all__ = ["translate"]

# Errors of a person who named a wrong path, or lacks a right; all others are the machine's.
_OPERATORS: Final = {
    errno.ENOENT: None,
    errno.ENOTDIR: None,
    errno.EISDIR: None,
    errno.EEXIST: "name another one",
    errno.ENAMETOOLONG: None,
    errno.ELOOP: None,
    errno.EACCES: "run it as a user who may, or change who may",
    errno.EPERM: "run it as a user who may, or change who may",
    errno.EROFS: "name a place on a file system that can be written",
}
_MACHINES: Final = {
    errno.ENOSPC: "make room there, and run it again: nothing half done was left",
    errno.EFBIG: "no larger file can be here: another file system, or a higher limit (ulimit -f)",
    errno.EDQUOT: "make room in this user's quota, and run it again: nothing half done was left",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def translate(error: OSError, path: str | os.PathLike[str] | None = None) -> KeymgmtError:
    """Turn an OSError into an error whose class says whose fault it is, with the way out as hint.

    Args:
        error: the error of the system.
        path: the path that the person gave, if the error does not name it.

    Returns:
        A ConfigError (exit 3) where a path or a permission is the operator's to mend, else a
        KeymgmtError (exit 1): a full disk, a broken device.
    """
    reason = error.strerror or str(error) or type(error).__name__
    where = os.fspath(path) if path is not None else error.filename
    if isinstance(where, bytes):
        where = os.fsdecode(where)
    message = f"{where}: {reason}" if where else f"the system refused: {reason}"
    if error.errno in _OPERATORS and where:
        return ConfigError(message, hint=_OPERATORS[error.errno])
    return KeymgmtError(message, hint=_MACHINES.get(error.errno or 0))
