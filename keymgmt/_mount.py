"""A sealed model as a folder of ordinary files that are on no disk, for programs that take paths.

Each file is a memfd (memfd_create(2)), sealed against writing, and the folder holds one symbolic
link for each, to ``/proc/self/fd/N``: which only this process can follow. The process is made
non-dumpable before any plaintext exists, so that another process of the same user cannot follow
them either, through ``/proc/PID/fd``; root still can.

What a program opened through a link stays open after the folder is gone, so the ``with`` block is
around the opening, not around the use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from keymgmt._harden import harden, unencrypted_swap
from keymgmt._open import open_model
from keymgmt.errors import KeymgmtError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keymgmt._config import Config
    from keymgmt._open import SealedModel

__all__ = ["mount"]

log = logging.getLogger("keymgmt")

_MFD_NOEXEC_SEAL: Final = 0x0008  # <linux/memfd.h>, Linux 6.3; Python names it from 3.14 on
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

File = tuple[int, int]  # device and inode


@contextlib.contextmanager
def mount(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
) -> Iterator[Path]:
    """Give a sealed model's files by path, decrypted in memory, while the block runs.

    Example::

        with keymgmt.mount("embedder.sealed", name="embedder") as directory:
            pipeline = TextEmbeddingPipeline(directory, "CPU")
        # The folder is gone; the pipeline has open what it needs.

    The process becomes non-dumpable and stays so (``keymgmt.harden``). The files are read-only
    and exist in this process and its forks alone: a program that is executed sees nothing. On
    exit the links are removed, and the descriptors that others opened through them are set to
    close on exec. Memory goes back when the last of those is closed.

    A program that resolves links to a real path, or writes beside its files, does not work here.
    Another process of the same user can list the names, and can exchange the links before they
    are followed; that is noticed at the end of the block.

    Args:
        path: the sealed model.
        name: the model that is expected; another one is refused.
        keys: a loaded config, or the path of one.

    Yields:
        The folder, with the paths of the manifest below it.

    Raises:
        KeymgmtError: this system cannot keep the files to this process, there is too little
            memory, or somebody exchanged a link; nothing is handed out, and never on a disk.
        SealedModelError, CannotUnlock, ConfigError: as ``keymgmt.open``.
    """
    harden()
    if devices := unencrypted_swap():
        log.warning(
            "plaintext may be swapped out to %s, which is not encrypted; "
            "encrypt it, switch it off, or set MemorySwapMax=0 for this service",
            ", ".join(devices),
        )
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(_Files())
        with open_model(path, name=name, keys=keys) as sealed:
            files.fill(sealed)
        folder = stack.enter_context(_folder())
        links = {folder / file: f"/proc/self/fd/{fd}" for file, fd in files.descriptors.items()}
        _link(links)
        yield folder
        for link, target in links.items():
            if not link.is_symlink() or str(link.readlink()) != target:
                raise KeymgmtError(
                    f"{link} was changed while the model was mounted",
                    hint="whatever was loaded from it is not to be trusted; end this process, "
                    "and look which process of this user does that",
                )


class _Files:
    """Sealed memfds by their path in the model."""

    def __init__(self) -> None:
        self.descriptors: dict[str, int] = {}

    def fill(self, sealed: SealedModel) -> None:
        for entry in sealed.manifest.files:
            descriptor = _memfd()
            self.descriptors[entry.path] = descriptor
            _write(sealed, entry.path, entry.size, descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        ours = {_identity(fd) for fd in self.descriptors.values()}
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        # OpenVINO opens without O_CLOEXEC: a program executed later would inherit plaintext.
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # the one of this listing is closed by now
                if _identity(int(link.name)) in ours:
                    os.set_inheritable(int(link.name), False)


def _identity(descriptor: int) -> File:
    info = os.fstat(descriptor)
    return info.st_dev, info.st_ino


def _memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        try:
            return os.memfd_create("keymgmt", flags | _MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.memfd_create("keymgmt", flags)  # before Linux 6.3
    except OSError as error:
        raise KeymgmtError(
            f"this system has no files in memory (memfd_create: {error.strerror}), "
            "and a disk is not used instead",
            hint="load the model from memory (keymgmt_openvino.load), or permit memfd_create in "
            "the container's seccomp profile",
        ) from error


def _write(sealed: SealedModel, path: str, size: int, descriptor: int) -> None:
    """Decrypt a file straight into its memfd, then forbid any change."""
    os.fchmod(descriptor, 0o400)
    if size:
        try:
            os.posix_fallocate(descriptor, 0, size)  # no room is an error here, not a SIGBUS later
        except OSError as error:
            raise KeymgmtError(
                f"not enough memory for {path} ({size:,} bytes): {error.strerror}",
                hint="nothing was handed out; free some memory or raise the container's limit",
            ) from error
        memory = mmap.mmap(descriptor, size)
        # On failure it is zeros, and goes with the error whose frames still show it.
        sealed.read_into(path, memory)
        memory.close()
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A private folder for links; they hold no plaintext, so a disk would do."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None  # noqa: S108
    folder = Path(tempfile.mkdtemp(prefix="keymgmt-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link(links: dict[Path, str]) -> None:
    for link, target in links.items():
        link.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        link.symlink_to(target)
        try:
            link.open("rb").close()
        except OSError as error:
            raise KeymgmtError(
                f"this system does not let a process open its own files again: {error.strerror}",
                hint="/proc must be mounted, and /proc/self/fd must be this process's",
            ) from error
