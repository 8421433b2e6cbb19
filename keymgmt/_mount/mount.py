"""A sealed model as a folder of ordinary files that are on no disk, for programs that take paths.

What a program opened in the folder stays open after it is gone, so the ``with`` block is around
the opening, not around the use.
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
        # The folder is gone; the pipeline has open what it needs.

    The process becomes non-dumpable and stays so (``keymgmt.harden``). The files are read-only (but
    a .gguf, which readers map writable) and exist in this process and its forks alone: a program
    that is executed sees nothing. On exit the folder is removed, and the descriptors that others
    opened in it are set to close on exec. Memory goes back when the last of those is closed.

    Where there is swap that is not encrypted, the files are locked in memory as far as the limit
    permits (``ulimit -l``), until the last of what mapped them lets go. What was read from them
    into other memory is not, so a warning names the swap all the same.

    They are memfds behind a folder of links; where the system has none, the call is refused. What
    resolves its files to a real path does not work here, but with ``keymgmt.private_folder``; what
    it writes beside them is an ordinary file, and goes with the folder. Another process of the
    same user can list the names, and can exchange the links before they are followed. At the end
    of the block it is noticed that a link was exchanged, also if it was put back; not, that a whole
    folder was moved away and back. Where other processes of this user are not trusted, run it as a
    user of its own.

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
                hint="whatever was loaded from it is not to be trusted; end this process, "
                "and look which process of this user does that",
            )
