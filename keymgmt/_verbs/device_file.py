"""Files that one device keeps beside a sealed model: costly to compute, and as secret as the model.

Each file is a payload (FLOE) under a key that is derived from the model's data key and a secret of
the device, a file of 32 bytes in the same folder. So only those who may open the model read it, and
only on this device; another recipient of the same model cannot make one for it. The file is bound
to manifest.json and to whatever else the caller names. A file with another binding is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt._crypto.dek import fill_random, wipe
from keymgmt._system.closing import Closing
from keymgmt._system.files import left_behind, replace_file, replacing
from keymgmt._system.locks import lock_file
from keymgmt._system.trusted_file import check_trusted, read_file
from keymgmt.errors import ConfigError, FormatError, IntegrityError
from keymgmt.floe import HEADER_LENGTH, OVERHEAD
from keymgmt.sealed.ciphertext import FileCiphertext
from keymgmt.sealed.payload import PayloadReader, seal_payload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["DeviceFile"]

_SECRET: Final = "device.secret"  # noqa: S105 - a file name
_SECRET_LENGTH: Final = 32
_LOCK: Final = ".lock"
_SEGMENT: Final = 1 << 20
_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO does not block


class DeviceFile(Closing):
    """One such file, which may not exist yet; a context manager that wipes its key."""

    def __init__(
        self, folder: Path, name: str, bound_to: bytes, key: Callable[[bytearray], bytearray]
    ) -> None:
        """Create the folder (0700) and its secret (0600) if they are missing.

        Args:
            folder: the folder of the files; its parent exists.
            name: name of the file; a later file of this name replaces it.
            bound_to: everything on which the content depends.
            key: derives the file's key, 32 bytes, from the device's secret.

        Raises:
            ConfigError: others can use the folder or the secret, or they cannot be created.
        """
        self.path = folder / name
        self._aad = hashlib.sha256(bound_to).digest()
        secret = _secret(folder)
        try:
            self._key = key(secret)
        finally:
            wipe(secret)

    def open(self) -> PayloadReader | None:
        """A reader of the file, which the caller closes; None where this device has no such file.

        Reads may still raise IntegrityError where the file is damaged.

        Raises:
            OSError: it cannot be read.
        """
        try:
            descriptor = os.open(self.path, _FLAGS)
        except FileNotFoundError:
            return None
        info = os.fstat(descriptor)
        segments = max(1, -(-(info.st_size - HEADER_LENGTH) // _SEGMENT))
        # The last segment proves the length: it is marked as the last.
        size = info.st_size - HEADER_LENGTH - segments * OVERHEAD
        if not stat.S_ISREG(info.st_mode) or size < 0:
            os.close(descriptor)
            return None
        try:
            return PayloadReader(
                FileCiphertext(descriptor),
                size,
                key=self._key,
                aad=self._aad,
                segment_length=_SEGMENT,
            )
        except (IntegrityError, FormatError):
            return None

    def write(self, content: memoryview) -> None:
        """Encrypt ``content``, and replace the file by it atomically.

        Raises:
            OSError: writing failed, or another process is writing; the old file is whole.
        """
        with _sole_writer(self.path), replacing(self.path, mode=0o600) as file:
            seal_payload(
                content,
                len(content),
                file.fileno(),
                key=self._key,
                aad=self._aad,
                segment_length=_SEGMENT,
                digest="blake3",
            )

    def close(self) -> None:
        """Wipe the key; may be called again."""
        wipe(self._key)


@contextlib.contextmanager
def _sole_writer(path: Path) -> Iterator[None]:
    """Hold the folder's lock, under which a half-written file is that of a killed process."""
    with lock_file(path.with_name(_LOCK), 0):
        for left in left_behind(path):
            left.unlink(missing_ok=True)
        yield


def _secret(folder: Path) -> bytearray:
    """The device's secret, created on the first call."""
    path = folder / _SECRET
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            check_trusted(folder, label="folder", private=True)
            new_secret = bytearray(_SECRET_LENGTH)
            fill_random(new_secret)
            with contextlib.suppress(FileExistsError):  # another process was faster
                replace_file(path, new_secret, mode=0o600, exclusive=True)
            wipe(new_secret)
    except OSError as error:
        raise ConfigError(
            f"cannot keep files for this device in {folder}: {error.strerror}",
            hint="name a folder of your own on a local disk, or do without",
        ) from error
    check_trusted(folder, label="folder", private=True)
    secret = read_file(path, label="secret", limit=_SECRET_LENGTH, access="private")
    if len(secret) != _SECRET_LENGTH:
        raise ConfigError(f"{path} does not hold a {_SECRET_LENGTH}-byte secret", hint=f"rm {path}")
    return secret
