"""Unseal: the only verb that writes plaintext to a disk."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from keymgmt._remote.location import is_location, need_folder
from keymgmt._system.files import new_directory, to_system
from keymgmt._system.free_memory import check_free_memory
from keymgmt._system.namespace import file_system
from keymgmt._system.refused import translate
from keymgmt._system.swap import unencrypted_swap
from keymgmt._trust.candidate import step
from keymgmt._verbs.open import open_model
from keymgmt.errors import ConfigError
from keymgmt.sealed.ciphertext import write_exactly

if TYPE_CHECKING:
    from keymgmt._config.config import Config
    from keymgmt._verbs.open import SealedModel
    from keymgmt.sealed.manifest import Manifest

Progress = Callable[[int, int], object]

__all__ = ["unseal"]


def unseal(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    keys: Config | str | os.PathLike[str] | None = None,
    memory: bool = False,
    allow_swap: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write the plain files of a sealed model to a new folder (0700, files 0600).

    This is the only verb that writes plaintext to a disk. The folder appears when all files were
    verified, or not at all.

    Args:
        path: the sealed model's folder.
        directory: the folder to create; its parent exists.
        name: the model name that is expected; another one is refused.
        keys: a loaded config, or the path of one.
        memory: require a file system in memory, such as a tmpfs that another container shares.
        allow_swap: allow ``memory`` where it may be swapped to a device that is not encrypted.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ConfigError: ``directory`` exists, or cannot be written, or is not in memory, or is inside
            of the sealed model.
        KeymgmtError: as ``keymgmt.open``; or the disk is full.
    """
    need_folder(directory, new=True)
    target = Path(directory)
    inside = Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(path))
    if inside and not is_location(path):
        raise ConfigError(
            f"{target} is inside of {path}, and the plain files would go wherever that is copied",
            hint="name a folder outside of the sealed model",
        )
    with open_model(path, name=name, keys=keys) as model:
        done, total = 0, model.manifest.size
        try:
            with new_directory(target, mode=0o700) as folder:
                if memory:
                    _check_memory(folder, target, allow_swap)
                    check_free_memory(total, model.manifest.name)
                for entry in model.manifest.files:
                    file = folder / to_system(entry.path)
                    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    _write_plain(model, entry.path, file, step(progress, done, total))
                    done += entry.size
        except FileExistsError as error:
            raise ConfigError(f"{target} exists", hint="name another folder") from error
        except FileNotFoundError as error:
            raise ConfigError(
                f"the folder {target.parent} does not exist",
                hint=f"make it with: mkdir -p {shlex.quote(str(target.parent))}",
            ) from error
        except OSError as error:
            raise translate(error, target) from error
        return model.manifest


def _check_memory(folder: Path, target: Path, allow_swap: bool) -> None:
    """ConfigError unless ``folder``, which is to be ``target``, is in memory and stays there."""
    found = file_system(folder)
    if found is None:
        raise ConfigError(
            f"which file system {target} is on is not known: /proc/self/mountinfo does not tell",
            hint="mount /proc",
        )
    kind, options = found
    if kind not in ("tmpfs", "ramfs"):
        raise ConfigError(
            f"{target} would be on {kind}, which is not in memory",
            hint="name a folder in a tmpfs: an emptyDir with medium: Memory, tmpfs: of compose",
        )
    swap = () if kind == "ramfs" or "noswap" in options else unencrypted_swap()
    if swap and not allow_swap:
        raise ConfigError(
            f"{target} could be swapped out to {', '.join(swap)}, which is not encrypted",
            hint="encrypt it or switch it off, mount the tmpfs with noswap, or give --allow-swap",
        )


def _write_plain(
    model: SealedModel, path: str, file: Path, progress: Callable[[int], object] | None
) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    done = 0
    with open(descriptor, "wb", buffering=0), contextlib.ExitStack() as stack:  # noqa: PTH123 - a descriptor
        buffer = memoryview(bytearray(model.manifest.segment_length))
        with model.naming(path):
            content = stack.enter_context(model.open(path))
        while True:
            # An error in writing is not an error of the model.
            with model.naming(path):
                count = content.readinto(buffer)
            if not count:
                break
            write_exactly(descriptor, buffer[:count], done)
            done += count
            if progress is not None:
                progress(done)
