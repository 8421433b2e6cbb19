"""Errors of the file system, and of damaged files, as keymgmt's errors."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Final

from keymgmt.backend import (
    AccessDenied,
    Fault,
    FaultTable,
    KeyNotFound,
    ProviderError,
    ProviderUnavailable,
)

__all__ = ["FAULTS", "damaged", "translated"]

_DENIED: Final = Fault(
    AccessDenied,
    "permission denied",
    "run as the owner of the key directory, to whom every file in it belongs, .lock too",
)
_NO_DIRECTORY: Final = Fault(ProviderUnavailable, "it is not a directory", "correct `path`")
_FULL: Final = Fault(
    ProviderUnavailable, "there is no room for it", "free some space and try again"
)
FAULTS: Final[FaultTable[int]] = FaultTable(
    {
        errno.EACCES: _DENIED,
        errno.EPERM: _DENIED,
        errno.EROFS: Fault(
            AccessDenied,
            "its file system is read-only",
            "mount it writable, or correct `path`",
        ),
        errno.ENOSPC: _FULL,
        errno.EDQUOT: _FULL,
        errno.EFBIG: _FULL,
        errno.ENOENT: Fault(
            ProviderUnavailable,
            "it does not exist",
            "mount it, correct `path`, or make it with: keymgmt keys create PROVIDER:KEY",
        ),
        errno.ENOTDIR: _NO_DIRECTORY,
        errno.EEXIST: _NO_DIRECTORY,
        errno.ETIMEDOUT: Fault(
            ProviderUnavailable,
            "another process has been changing its keys all the time",
            "fuser(1) shows which process has the file .lock of the directory open",
            passing=True,
        ),
    },
    operations={("read", errno.ENOENT): Fault(KeyNotFound, "there is no such key file")},
    unknown=Fault(ProviderUnavailable, "the system refused", "look at the disk and its mount"),
)


@contextlib.contextmanager
def translated(label: str, operation: str = "") -> Iterator[None]:
    """Turn an OSError, or an AccessDenied that an OSError caused, into an error of ``FAULTS``.

    Args:
        label: the file or directory, for messages.
        operation: "read" for a key file, of which a missing file is KeyNotFound.
    """
    try:
        yield
    except (OSError, AccessDenied) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        code = cause.errno or 0
        name = errno.errorcode.get(code, str(code))
        if code in (errno.EACCES, errno.EPERM) and str(cause.filename or "") not in label:
            label = f"{label}: {cause.filename}"
        raise FAULTS.error(code, label, operation, shown=name) from cause


def damaged(label: str) -> ProviderError:
    """The error for a file with unusable content; the fault is not quoted, as it may be secret."""
    return ProviderError(
        f"{label} is damaged, or of an unknown kind", hint="put it back from a backup"
    )
