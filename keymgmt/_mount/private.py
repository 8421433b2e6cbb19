"""A sealed model as a folder of real paths, which only this process and what it starts can see."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keymgmt._mount.decrypt import decrypt_files, opened, warn_of_swap
from keymgmt._mount.folders import MountedFolder, locked_folder
from keymgmt._system.harden import harden, is_dumpable
from keymgmt._system.locks import release_lock
from keymgmt._system.namespace import (
    FOLDER,
    enter_mount_namespace,
    mount_memory,
    mount_read_only,
    unmount,
)
from keymgmt.errors import KeymgmtError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from keymgmt._config.config import Config
    from keymgmt._system.namespace import User
    from keymgmt._verbs.open import SealedModel

__all__ = ["PrivateMount", "no_namespace", "private_folder"]

_SPARE: Final = 1 << 20  # bytes for what a file system needs besides the files
_SWITCHES: Final = (
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "AppArmor forbids it (Ubuntu 24.04): give this Python a profile with the rule 'userns,'",
    ),
    (
        "/proc/sys/kernel/unprivileged_userns_clone",
        "0",
        "Debian's switch forbids it: sysctl kernel.unprivileged_userns_clone=1",
    ),
    (
        "/proc/sys/user/max_user_namespaces",
        "0",
        "the limit of user namespaces is 0: sysctl user.max_user_namespaces=10000",
    ),
)


class PrivateMount:
    """A file system in memory over ``target``, filled through ``descriptor``, then read-only."""

    def __init__(self, target: Path, sizes: Iterable[int], user: User | None = None) -> None:
        """Mount it with room for files of ``sizes`` bytes; OSError as the system says."""
        self.target = target
        size_limit = _SPARE + sum(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes)
        mount_memory(target, size_limit, mode=0o700, user=user)
        self.descriptor = os.open(target, FOLDER)

    def protect(self) -> None:
        """Make ``target`` read-only; through ``descriptor`` the files can still be written."""
        mount_read_only(self.target)

    def close(self) -> None:
        """Unmount the file system; files that are open in it stay open."""
        os.close(self.descriptor)
        with contextlib.suppress(OSError):  # there is one mount only, if it was not protected yet
            unmount(self.target)
            unmount(self.target)


@contextlib.contextmanager
def private_folder(
    path: str | os.PathLike[str] | SealedModel,
    *,
    name: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
) -> Iterator[Path]:
    """Give a sealed model's files by real paths, decrypted in memory, while the block runs.

    For libraries that resolve paths, map files to write to them, or pass a path to a program that
    they start. ``keymgmt.mount`` is for all others, and changes less of this process. Example::

        with keymgmt.private_folder("detector.sealed", name="detector") as directory:
            session = onnxruntime.InferenceSession(directory / "model.onnx")

    The folder is a read-only file system in memory that is never swapped. From here on this thread
    is in a mount namespace of its own, with the threads and programs that it starts; threads that
    ran before do not see the folder. For root nothing else changes. Another user gets a user
    namespace too. For that, this process must have one thread, and must not be non-dumpable yet
    (``keymgmt.harden``). In a user namespace, files of root are shown as nobody's, so a config or
    model that root owns is refused from then on: open further models before, and give them here.

    The process becomes non-dumpable (``keymgmt.harden``) before anything is decrypted. Programs
    that it starts are not, and another process of the same user can read their memory: where such
    processes are not trusted, use ``keymgmt exec --user``. At the end of the block the folder is
    gone; its memory is freed when the last open file in it is closed.

    Args:
        path: the sealed model; or an open ``SealedModel``, which stays open (then ``name`` and
            ``keys`` are ignored).
        name: the name that the model must have; another model is refused.
        keys: a loaded config, or the path of a config file.

    Yields:
        The folder, with the paths of the manifest below it.

    Raises:
        KeymgmtError: this system permits no private file system, or there is too little memory;
            nothing is handed out, and never on a disk.
        SealedModelError, CannotUnlock, ConfigError: as ``keymgmt.open``.
    """
    with contextlib.ExitStack() as stack:
        with opened(path, name, keys) as sealed:
            target, lock = locked_folder()
            stack.callback(release_lock, lock)
            stack.callback(target.rmdir)
            try:
                enter_mount_namespace()
                mounted = PrivateMount(target, (entry.size for entry in sealed.manifest.files))
            except OSError as error:
                raise no_namespace(str(error.strerror), "use keymgmt.mount") from error
            stack.callback(mounted.close)
            harden()
            warn_of_swap()
            decrypt_files(sealed, MountedFolder(mounted.descriptor).write)
        mounted.protect()
        yield target


def no_namespace(why: str, instead: str) -> KeymgmtError:
    """The error that this system permits no private file system; its hint says what forbids it."""
    ways = [hint for file, value, hint in _SWITCHES if _reads(file) == value]
    if "Seccomp:\t2" in (_reads("/proc/self/status") or ""):
        ways.append(
            "a seccomp profile is on, and that of Docker and Kubernetes forbids it: add "
            "CAP_SYS_ADMIN, or a profile that permits unshare and mount"
        )
    if why == os.strerror(errno.EINVAL):
        ways.append("this process has several threads: call it before any is started")
    if not is_dumpable() and os.geteuid() != 0:
        ways.append(
            "this process is non-dumpable (keymgmt.harden, keymgmt.mount), which forbids it: "
            "take the private folder first"
        )
    return KeymgmtError(
        f"this system permits no private file system ({why})", hint="; ".join([*ways, instead])
    )


def _reads(file: str) -> str | None:
    try:
        return Path(file).read_text().strip()
    except OSError:
        return None
