"""What the file system's answers mean, and how damage is said."""

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
    AccessDenied, "permission denied", "run as the owner of the key directory, who may write in it"
)
_NO_DIRECTORY: Final = Fault(ProviderUnavailable, "it is not a directory", "correct `path`")
_FULL: Final = Fault(ProviderUnavailable, "there is no room for it", "make room and try again")
FAULTS: Final[FaultTable[int]] = FaultTable(
    {
        errno.EACCES: _DENIED,
        errno.EPERM: _DENIED,
        errno.EROFS: Fault(
            AccessDenied,
            "its file system is read-only",
            "mount it so that it can be written, or correct `path`",
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
            "fuser(1) says which process has the file .lock in it open",
            passing=True,
        ),
    },
    operations={("read", errno.ENOENT): Fault(KeyNotFound, "there is no such key file")},
    unknown=Fault(ProviderUnavailable, "the system refused", "look at the disk and its mount"),
)


@contextlib.contextmanager
def translated(label: str, operation: str = "") -> Iterator[None]:
    """Turn what the system refused into the errors of ``FAULTS``.

    The house's readers are to raise AccessDenied; where the system was the cause, what it said
    counts.

    Args:
        label: the file or directory in question, for messages.
        operation: "read" where a file that is missing is a key that is missing.
    """
    try:
        yield
    except (OSError, AccessDenied) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        code = cause.errno or 0
        name = errno.errorcode.get(code, str(code))
        raise FAULTS.error(code, label, operation, shown=name) from cause


def damaged(label: str) -> ProviderError:
    """A file whose content cannot be used; what of it is wrong may be secret and is not said."""
    return ProviderError(f"{label} is damaged or unknown here", hint="put it back from a backup")
