"""Filling a folder in memory with the files of a model, after all checks."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from functools import partial
from typing import TYPE_CHECKING

from keymgmt._system.free_memory import check_free_memory
from keymgmt._system.swap import unencrypted_swap
from keymgmt._trust.candidate import step
from keymgmt._verbs.open import SealedModel, open_model
from keymgmt.errors import KeymgmtError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator

    from keymgmt._config.config import Config

    Write = Callable[[str, int, Callable[[mmap.mmap], None]], None]

__all__ = ["decrypt_files", "opened", "warn_of_swap"]

log = logging.getLogger("keymgmt")


def warn_of_swap() -> bool:
    """Warn of swap that is not encrypted; whether there is any."""
    devices = unencrypted_swap()
    if devices:
        log.warning(
            "plaintext may be swapped out to %s, which is not encrypted; "
            "encrypt it, switch it off, or set MemorySwapMax=0 for this service",
            ", ".join(devices),
        )
    return bool(devices)


@contextlib.contextmanager
def opened(
    path: str | os.PathLike[str] | SealedModel,
    name: str | None,
    keys: Config | str | os.PathLike[str] | None,
) -> Iterator[SealedModel]:
    """A model that is open already, which stays open; or one that is opened for the block."""
    if isinstance(path, SealedModel):
        yield path
    else:
        with open_model(path, name=name, keys=keys) as sealed:
            yield sealed


def decrypt_files(
    sealed: SealedModel,
    write: Write,
    only: Callable[[str], bool] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Decrypt the files of a model, or those for which ``only`` is true, each through ``write``.

    Raises:
        KeymgmtError: there is too little memory, or the system refuses it; raises also as
            ``SealedModel.read_into``.
    """
    files = [entry for entry in sealed.manifest.files if not only or only(entry.path)]
    for entry in files:
        with sealed.naming(entry.path):
            # A reader checks that the file is as long as the manifest says. Only then is it right
            # to reserve memory for the size that the manifest states.
            sealed.reader(entry.path).close()
    total = sum(entry.size for entry in files)
    check_free_memory(total, sealed.manifest.name)
    done = 0
    for entry in files:
        report = step(progress, done, total)
        try:
            write(entry.path, entry.size, partial(sealed.read_into, entry.path, progress=report))
        except OSError as error:
            raise KeymgmtError(
                f"{entry.path} ({entry.size:,} bytes) cannot be held in memory: {error.strerror}",
                hint="nothing was handed out; "
                + (
                    "each file takes a descriptor: raise their limit (ulimit -n)"
                    if error.errno in (errno.EMFILE, errno.ENFILE)
                    else "free some memory or raise the container's limit"
                ),
            ) from error
        done += entry.size
