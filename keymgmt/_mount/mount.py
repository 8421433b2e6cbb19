"""A sealed model as a folder of ordinary files that are on no disk, for programs that take paths.

A file that a program opened in the folder stays open after the folder is gone. So the ``with``
block is around the opening of the model, and not around its use.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from keymgmt._mount.decrypt import decrypt_files, opened, warn_of_swap
from keymgmt._mount.folders import MemfdFolder
from keymgmt._system.harden import harden
from keymgmt.errors import KeymgmtError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from keymgmt._config.config import Config
    from keymgmt._verbs.open import SealedModel

__all__ = ["mount"]


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
        # The folder is gone; the pipeline keeps the files open that it needs.

    The process becomes non-dumpable and stays so (``keymgmt.harden``). The files are read-only (but
    a .gguf, which readers map writable) and exist in this process and its forks alone: a program
    that is executed sees nothing. On exit the folder is removed, and the descriptors that others
    opened in it are set to close on exec. Memory goes back when the last of those is closed.

    Where there is swap that is not encrypted, the files are locked in memory as far as the limit
    permits (``ulimit -l``), until the last mapping of them ends. A copy that a program makes of
    them is not locked, so a warning names the swap all the same.

    The files are memfds behind a folder of links; where the system has no memfds, the call is
    refused. A program that resolves its files to real paths cannot use this folder; use
    ``keymgmt.private_folder`` for it. A file that a program writes beside them is an ordinary file,
    and is removed with the folder. Another process of the same user can list the names, and can
    exchange the links before they are followed. At the end of the block an exchanged link is
    noticed, also if it was put back; but not a whole folder that was moved away and back. Where
    other processes of this user are not trusted, run this process as a user of its own.

    Args:
        path: the sealed model; or an open ``SealedModel``, which stays open (then ``name`` and
            ``keys`` are ignored).
        name: the name that the model must have; another model is refused.
        keys: a loaded config, or the path of a config file.
        only: called with each path of the manifest; a file for which it is false is left out.

    Yields:
        The folder, with the paths of the manifest below it.

    Raises:
        KeymgmtError: this system cannot keep the files to this process, there is too little
            memory, or somebody exchanged a link; nothing is handed out, and never on a disk.
        SealedModelError, CannotUnlock, ConfigError: as ``keymgmt.open``.
    """
    harden()
    # Locking takes half as long as decrypting, so it is done only where there is such swap.
    lock = warn_of_swap()
    try:
        folder = MemfdFolder(lock)
    except OSError as error:
        raise KeymgmtError(
            "this system has no files in memory that only one process can reach "
            f"(memfd: {error.strerror or error}), and a disk is not used instead",
            hint="permit memfd_create in the container's seccomp profile, with /proc mounted; or "
            "use keymgmt.private_folder, or load the model from memory (keymgmt_openvino.load, or "
            "load_llm with a generation_config=)",
        ) from error
    with contextlib.closing(folder):
        with opened(path, name, keys) as sealed:
            decrypt_files(sealed, folder.write, only)
        yield folder.path
        if changed := folder.changed():
            raise KeymgmtError(
                f"{changed} was exchanged while the model was mounted at {folder.path}",
                hint="do not trust what was loaded from it: end this process, and look which "
                "process of this user exchanged it",
            )
