"""A sealed model as a folder of ordinary files that are on no disk, for programs that take paths.

What a program opened in the folder stays open after it is gone, so the ``with`` block is around
the opening, not around the use.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from functools import partial
from typing import TYPE_CHECKING

from keymgmt._harden import harden, unencrypted_swap
from keymgmt._open import SealedModel, open_model
from keymgmt._private_files import private_folder
from keymgmt.errors import KeymgmtError
from keymgmt.room import check_room

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from keymgmt._config import Config
    from keymgmt._private_files import PrivateFolder

__all__ = ["mount"]

log = logging.getLogger("keymgmt")


@contextlib.contextmanager
def mount(
    path: str | os.PathLike[str] | SealedModel,
    *,
    name: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
    only: Callable[[str], bool] | None = None,
) -> Iterator[Path]:
    """Give a sealed model's files by path, decrypted in memory, while the block runs.

    Example::

        with keymgmt.mount("embedder.sealed", name="embedder") as directory:
            pipeline = TextEmbeddingPipeline(directory, "CPU")
        # The folder is gone; the pipeline has open what it needs.

    The process becomes non-dumpable and stays so (``keymgmt.harden``). The files are read-only
    and exist in this process and its forks alone: a program that is executed sees nothing. On
    exit the folder is removed, and the descriptors that others opened in it are set to close on
    exec. Memory goes back when the last of those is closed.

    Where there is swap that is not encrypted, the files are locked in memory as far as the limit
    permits (``ulimit -l``), until the last of what mapped them lets go. What was read from them
    into other memory is not, so a warning names the swap all the same.

    They are memfds behind a folder of links; where the system has none, a ramfs that is mounted
    nowhere; and where it permits neither, the call is refused. A program that resolves its files
    to a real path does not work here; what it writes beside them is an ordinary file, and goes
    with the folder. With memfds, another process of the same user can list the names, and can
    exchange the links before they are followed; that is noticed at the end of the block.

    Args:
        path: the sealed model; or one that is open already, which stays open (then ``name`` and
            ``keys`` say nothing).
        name: the model that is expected; another one is refused.
        keys: a loaded config, or the path of one.
        only: called with each path of the manifest; a file for which it is false is left out.

    Yields:
        The folder, with the paths of the manifest below it.

    Raises:
        KeymgmtError: this system cannot keep the files to this process, there is too little
            memory, or somebody exchanged a link; nothing is handed out, and never on a disk.
        SealedModelError, CannotUnlock, ConfigError: as ``keymgmt.open``.
    """
    harden()
    # Locking costs half of the decrypting again, so it is done where there is swap to keep from.
    if devices := unencrypted_swap():
        log.warning(
            "plaintext may be swapped out to %s, which is not encrypted; "
            "encrypt it, switch it off, or set MemorySwapMax=0 for this service",
            ", ".join(devices),
        )
    with contextlib.closing(private_folder(lock=bool(devices))) as folder:
        if isinstance(path, SealedModel):
            _decrypt(path, folder, only)
        else:
            with open_model(path, name=name, keys=keys) as sealed:
                _decrypt(sealed, folder, only)
        yield folder.path
        if changed := folder.changed():
            raise KeymgmtError(
                f"{changed} was exchanged while the model was mounted at {folder.path}",
                hint="whatever was loaded from it is not to be trusted; end this process, "
                "and look which process of this user does that",
            )


def _decrypt(
    sealed: SealedModel, folder: PrivateFolder, only: Callable[[str], bool] | None
) -> None:
    files = [entry for entry in sealed.manifest.files if not only or only(entry.path)]
    for entry in files:
        with sealed.naming(entry.path):
            sealed.reader(entry.path).close()  # is as long as the manifest says: room for it is due
    check_room(sum(entry.size for entry in files), sealed.manifest.name)
    for entry in files:
        try:
            folder.write(entry.path, entry.size, partial(sealed.read_into, entry.path))
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
