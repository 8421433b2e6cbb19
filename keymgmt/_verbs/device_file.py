"""Files that one device keeps for itself of a sealed model: dear to compute, and no less secret.

Each is a payload (FLOE) under a key that takes the model's data key and a secret of the device, a
file of 32 bytes beside it. So it is read by who may open the model, and on this device; another
recipient of the same model cannot make one for it. It is bound to manifest.json and to what the
caller says that it depends on; one that is bound to anything else is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from keymgmt._crypto.dek import fill_random, wipe
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

_SECRET: Final = "device.secret"  # noqa: S105 - its name
_SECRET_LENGTH: Final = 32
_LOCK: Final = ".lock"
_SEGMENT: Final = 1 << 20
_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO does not block


class DeviceFile:
    """One such file, there or not; a context manager that wipes its key."""

    def __init__(
        self, folder: Path, name: str, bound_to: bytes, key: Callable[[bytearray], bytearray]
    ) -> None:
        """Make the folder (0700) and its secret (0600) if need be.

        Args:
            folder: whose parent exists.
            name: of the file, by which a later one replaces it.
            bound_to: all that the content depends on.
            key: makes the file's key, 32 bytes, of the device's secret.

        Raises:
            ConfigError: others can use the folder or the secret, or neither can be made.
        """
        self.path = folder / name
        self._aad = hashlib.sha256(bound_to).digest()
        secret = _secret(folder)
        try:
            self._key = key(secret)
        finally:
            wipe(secret)

    def open(self) -> PayloadReader | None:
        """A reader of it, which the caller closes; None where there is none for this device.

        What it reads may raise IntegrityError all the same: it was damaged.

        Raises:
            OSError: it cannot be read.
        """
        try:
            descriptor = os.open(self.path, _FLAGS)
        except FileNotFoundError:
            return None
        info = os.fstat(descriptor)
        segments = max(1, -(-(info.st_size - HEADER_LENGTH) // _SEGMENT))
        # What the length says is proved by the last segment, which says that it is the last.
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
        """Encrypt ``content`` and put it in the file's place, atomically.

        Raises:
            OSError: as the system says, or another process writes here; what was there is whole.
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _sole_writer(path: Path) -> Iterator[None]:
    """Nobody else writes in the folder: what is half written there was left by a killed process."""
    with lock_file(path.with_name(_LOCK), 0):
        for left in left_behind(path):
            left.unlink(missing_ok=True)
        yield


def _secret(folder: Path) -> bytearray:
    """The device's secret, made on the first call."""
    path = folder / _SECRET
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            check_trusted(folder, label="folder", private=True)
            made = bytearray(_SECRET_LENGTH)
            fill_random(made)
            with contextlib.suppress(FileExistsError):  # another process was faster
                replace_file(path, made, mode=0o600, exclusive=True)
            wipe(made)
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
