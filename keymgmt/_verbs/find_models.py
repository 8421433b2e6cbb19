"""Many sealed models below some folders: every one found once, and worked on in parallel.

What could not be looked at is told as a Failure: not seen is not the same as not there.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from keymgmt._system.files import target_of
from keymgmt._trust.candidate import Candidate
from keymgmt.errors import ConfigError, KeymgmtError, SealedModelError
from keymgmt.sealed.folder import KEYS, MANIFEST, PAYLOAD, SIGNATURES
from keymgmt.sealed.manifest import MAX_MANIFEST

if TYPE_CHECKING:
    from keymgmt.sealed.keys import UnlockPolicy

__all__ = ["Failure", "Link", "find_models", "is_model", "over_models", "read_models"]

CHUNK: Final = 128
_THREADS: Final = 8
_OURS: Final = b'"keymgmt-'
T = TypeVar("T")
Trees = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Failure:
    """A model, or folder, of a tree with which something was wrong."""

    path: str
    error: KeymgmtError

    def to_json(self) -> dict[str, object]:
        """As a JSON object."""
        return {"path": self.path, "error": self.error.to_json()}


@dataclass(frozen=True)
class Link:
    """A symbolic link of a tree to a folder, which was followed, and where it leads."""

    path: str
    target: str


def find_models(trees: Trees, links: list[Link] | None = None) -> Iterator[Path | Failure]:
    """Every sealed model at or below the ``trees``, each once, however many ways lead to it.

    Links to folders are followed, and told in ``links``. A Failure is a folder that cannot be read,
    a link that leads nowhere, and a tree without any model. A folder counts as a model also where
    half of it is missing or damaged, so that whoever opens it finds out; one model may lie inside
    of another. A ``manifest.json`` of some other program hides nothing.
    """
    seen: set[tuple[int, int]] = set()
    links = links if links is not None else []
    for tree in [trees] if isinstance(trees, (str, os.PathLike)) else trees:
        found = False
        for item in _walk(Path(tree), seen, links, frozenset(seen)):
            found = True
            if item is not None:
                yield item
        if not found:
            message = f"there is no sealed model at or below {tree}"
            yield Failure(str(tree), ConfigError(message, hint="is this the right folder?"))


def _walk(
    tree: Path, seen: set[tuple[int, int]], links: list[Link], before: frozenset[tuple[int, int]]
) -> Iterator[Path | Failure | None]:
    """What is at or below ``tree``; None for a folder that an earlier tree, in ``before``, had."""
    # Not os.walk, which recurses: folders may be nested deeper than Python's stack.
    waiting = [tree]
    while waiting:
        folder = waiting.pop()
        try:
            info = folder.stat()
            place = (info.st_dev, info.st_ino)
            if place in seen:
                if place in before:
                    yield None
                continue
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            # A tree that is not there was named wrongly; a folder in it may be damaged.
            yield _unreadable(folder, error, ConfigError if folder == tree else SealedModelError)
            continue
        seen.add(place)
        below = []
        for entry in found:
            path = folder / entry.name
            try:
                # Unlike DirEntry.is_dir, this fails where a link leads nowhere.
                is_folder = stat.S_ISDIR(entry.stat().st_mode)
            except OSError as error:
                yield _unreadable(path, error)
                continue
            if is_folder and entry.is_symlink():
                links.append(Link(str(path), os.path.realpath(path)))
            if is_folder:
                below.append(path)
        if _is_model(folder, {entry.name for entry in found}):
            yield folder
        waiting += below


def _unreadable(path: Path, error: OSError, kind: type[KeymgmtError] = SealedModelError) -> Failure:
    what = "follow the link" if os.path.islink(path) else "read"  # noqa: PTH114 - raises never
    return Failure(str(path), kind(f"cannot {what} {path}: {error.strerror}"))


def is_model(folder: Path) -> bool:
    """Whether a folder is a sealed model's, or what is left of one; yes where nobody can look."""
    try:
        return _is_model(folder, {entry.name for entry in folder.iterdir()})
    except OSError:
        return True


def _is_model(folder: Path, names: set[str]) -> bool:
    ours = names & {MANIFEST, KEYS, SIGNATURES, PAYLOAD}
    if ours >= {MANIFEST, KEYS, PAYLOAD}:
        return True
    if any(_says_so(folder / name, alone=len(ours) == 1) for name in ours - {PAYLOAD}):
        return True
    # A seal that was killed, or is at work, has written no recipient yet.
    if PAYLOAD not in ours or target_of(folder.name):
        return False
    try:
        return any(file.suffix == ".floe" for file in (folder / PAYLOAD).iterdir())
    except NotADirectoryError:
        return False
    except OSError:
        return True


def _says_so(file: Path, *, alone: bool) -> bool:
    """Whether a file is of our format; yes where it cannot be read, as then nobody knows."""
    try:
        if not file.is_file():
            return False
        with file.open("rb") as stream:
            content = stream.read(MAX_MANIFEST)
    except OSError:
        return True
    if _OURS in content or alone:
        return _OURS in content
    try:
        # Cut off where the format is not yet written, or of another program?
        json.loads(content)
    except (ValueError, RecursionError):
        return True
    return False


def over_models(
    found: Iterable[Path | Failure],
    prepare: Callable[[Sequence[Path]], Callable[[Path], T]],
    doing: str,
    *,
    threads: int = _THREADS,
) -> Iterator[T | Failure]:
    """Work on many models in parallel, and tell of each as it is done.

    What goes wrong with one is a Failure and stops no other.

    Args:
        found: the models, and what was wrong with finding them.
        prepare: makes of some models at once what is done with each of them.
        doing: the verb, for messages.
        threads: how many models at once.
    """
    found = iter(found)
    with ThreadPoolExecutor(threads, f"keymgmt {doing}") as pool:
        while chunk := list(itertools.islice(found, CHUNK)):
            yield from (item for item in chunk if isinstance(item, Failure))
            paths = [item for item in chunk if isinstance(item, Path)]
            yield from pool.map(_guarded(prepare(paths), doing), paths)


def _guarded(work: Callable[[Path], T], doing: str) -> Callable[[Path], T | Failure]:
    def one(path: Path) -> T | Failure:
        try:
            return work(path)
        except KeymgmtError as error:
            return Failure(str(path), error)
        except OSError as error:
            message = f"cannot {doing} {path}: {error.strerror}"
            return Failure(str(path), SealedModelError(message))

    return one


def read_models(found: Iterable[Path | Failure]) -> Iterator[tuple[Path, UnlockPolicy] | Failure]:
    """Who may open each model, from its small files alone; nothing of it is authenticated."""

    def read(path: Path) -> tuple[Path, UnlockPolicy]:
        with Candidate.read(path) as candidate:
            return path, candidate.policy()

    guarded = _guarded(read, "read")
    for item in found:
        yield item if isinstance(item, Failure) else guarded(item)
